"""`/v1/files` with the real client: in, out, listed by pages, deleted, refused."""

from __future__ import annotations

import time

import openai
import pytest

from tests.server.api.training.openai.conftest import PAIRS, lines, upload


@pytest.fixture
def nothing_kept(client):
    """Starts and ends without files."""
    for file in client.files.list():
        client.files.delete(file.id)
    yield
    for file in client.files.list():
        client.files.delete(file.id)


def test_a_file_comes_back_as_it_went(client, tuning_server, nothing_kept):
    content = lines(PAIRS) + b"\xff not even text\n"
    before = time.time()
    made = client.files.create(file=("../../etc/pass wd.jsonl", content), purpose="fine-tune")
    assert made.id.startswith("file-")
    assert (made.object, made.bytes, made.purpose) == ("file", len(content), "fine-tune")
    assert (made.status, made.expires_at) == ("processed", None)
    assert made.filename == "../../etc/pass wd.jsonl"
    assert before - 1 <= made.created_at <= time.time()
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    assert client.files.wait_for_processing(made.id).id == made.id

    data_dir = tuning_server.app_services().settings.data_dir
    assert [path.name for path in (data_dir / "files").iterdir()] == [made.id]
    deleted = client.files.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "file")
    assert list((data_dir / "files").iterdir()) == []
    assert list((data_dir / "staging").iterdir()) == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(made.id)
        assert caught.value.code == "file_not_found"
        assert made.id in caught.value.message


def test_lists_have_pages_and_orders(client, nothing_kept):
    ids = [upload(client, PAIRS, f"{n}.jsonl").id for n in range(5)]
    assert [one.id for one in client.files.list()] == ids[::-1]
    assert [one.id for one in client.files.list(order="asc")] == ids
    assert [one.id for one in client.files.list(limit=2)] == ids[::-1]  # it turns the pages
    first = client.files.list(limit=2, order="asc")
    assert ([one.id for one in first.data], first.has_more) == (ids[:2], True)
    last = client.files.list(limit=3, after=ids[1], order="asc")
    assert ([one.id for one in last.data], last.has_more) == (ids[2:], False)
    assert len(client.files.list(purpose="fine-tune").data) == 5
    assert client.files.list(purpose="batch").data == []
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-" + "0" * 24)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"purpose": "batch"}, 422, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3600}}, 422, "expires_after"),
        ({"file": ("rows.jsonl", b"")}, 422, "file"),
        ({"file": ("rows.jsonl", b" " * (2**20 + 1))}, 413, "body"),
        ({"file": ("rows.jsonl", b" " * (3 * 2**20))}, 413, "body"),
        ({"extra_body": {"adapter": "x"}}, 422, "'adapter'"),
        ({"extra_query": {"adapter": "x"}}, 400, "adapter"),
    ],
)
def test_what_is_refused(client, fields, status, param):
    given = {"file": ("rows.jsonl", lines(PAIRS)), "purpose": "fine-tune", **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(**given)
    assert (caught.value.status_code, caught.value.param) == (status, param)
    assert client.files.list().data == []


def test_no_file_or_two_and_no_form(tuning_server):
    part = ("file", ("a.jsonl", b"{}"))
    for files in ([part, part], [("purpose", (None, "fine-tune"))]):
        reply = tuning_server.post("/v1/files", data={"purpose": "fine-tune"}, files=files)
        assert reply.status_code == 422, reply.text
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    reply = tuning_server.post("/v1/files", json={"purpose": "fine-tune"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "wrong_content_type")


def test_all_files_together_have_a_limit(client, nothing_kept):
    part = b" " * 2**20
    upload(client, part)
    upload(client, part)
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, b"{}")
    assert (caught.value.status_code, caught.value.code) == (413, "files_full")
    assert len(client.files.list().data) == 2
