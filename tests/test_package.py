"""`import graftwork`: its names, its engine, and its client against a running server."""

from __future__ import annotations

import subprocess
import sys

import pytest

import adapters
import graftwork
from tests.server.conftest import TEMPLATE, make_settings
from tests.server.http_server import running_server, save_prefix_adapter, save_tiny_base

LABELS = ["complaint", "no complaint"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def client(base, tmp_path_factory):
    with (
        running_server(make_settings(base, tmp_path_factory.mktemp("data"))) as server,
        graftwork.Client(str(server.base_url)) as client,
    ):
        yield client


def test_every_public_name_is_there_and_no_other():
    for name in graftwork.__all__:
        assert getattr(graftwork, name) is not None
        assert name in dir(graftwork)
    assert graftwork.METHODS is adapters.METHODS
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = graftwork.Nothing


def test_the_client_loads_no_torch():
    code = "import graftwork, sys; graftwork.Client; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_engine_generates_with_an_adapter(base, tmp_path):
    engine = graftwork.Engine(base, dtype="float32", threads=1, kv_bytes=1 << 24)
    try:
        engine.add_adapter("one", save_prefix_adapter(tmp_path / "one"))
        prompts = [(None, "the tweet"), ("one", "the tweet")]
        plain, adapted = engine.generate(prompts, max_new_tokens=8)
    finally:
        engine.close()
    assert plain != adapted


def test_the_client_tells_wrong_arguments_in_its_own_words(client, tmp_path):
    def told(error, call, *args, **kwargs):
        with pytest.raises(error) as caught:
            call(*args, **kwargs)
        return str(caught.value)

    known = "unknown parameter 'max_token'; did you mean 'max_new_tokens'?"
    assert told(TypeError, client.generate, "x", max_token=3) == f"Client.generate: {known}"
    assert known in told(TypeError, client.stream, "x", max_token=3)
    assert "'template'" in told(TypeError, client.add_adapter, "a", tmp_path, templat="{x}")
    assert "nowhere" in told(FileNotFoundError, client.add_adapter, "a", tmp_path / "nowhere")
    words = {"method": "ia3", "template": "{x}", "target": "y"}
    twice = told(TypeError, client.train, "rows.json", adapter="a", **words)
    assert "multiple values for argument 'adapter'; expected the adapter's name, then" in twice
    file = told(TypeError, client.train, "a", "rows.json", **words)
    assert "rows: expected a list of dicts, came str" in file
    nobody = told(graftwork.ServerRefused, graftwork.Client("http://127.0.0.1:9").info)
    assert "graftwork serve" in nobody
    assert "--" not in nobody
    assert "url: expected" in told(graftwork.ServerRefused, graftwork.Client, "127.0.0.1:8000")


def test_the_client_uploads_generates_and_downloads(client, tmp_path):
    folder = save_prefix_adapter(tmp_path / "folder", seed=3)
    added = client.add_adapter("tweets", folder, template=TEMPLATE, labels=LABELS)
    assert (added["name"], added["version"], added["created"]) == ("tweets", 1, True)
    assert client.models() == ["tiny-base", "tweets"]
    assert [one["name"] for one in client.adapters()] == ["tweets"]
    assert client.adapter("tweets")["labels"] == LABELS
    assert client.info()["model_id"] == "tiny-base"

    row = {"Tweet text": "late again"}
    text = client.generate(row, adapter="tweets", max_new_tokens=6)
    prompt = TEMPLATE.format(**row).rstrip()  # its white space belongs to the target
    assert text == client.generate(prompt, adapter="tweets", max_new_tokens=6)
    assert text == "".join(client.stream(row, adapter="tweets", max_new_tokens=6))
    assert text != client.generate(prompt, max_new_tokens=6)
    assert client.classify(row, adapter="tweets")["label"] in LABELS
    assert client.classify(prompt, labels=["a", "b"])["label"] in ("a", "b")

    client.download_adapter("tweets", tmp_path / "back")
    name = "adapter_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert client.remove_adapter("tweets")["deleted_versions"] == [1]
    with pytest.raises(graftwork.ServerRefused, match="tweets") as refused:
        client.generate("x", adapter="tweets")
    assert (refused.value.status, refused.value.code) == (404, None)  # TGI's body has no code


def test_the_client_trains_and_tells_of_a_job_that_made_no_adapter(client):
    rows = [{"text": "late", "label": "complaint"}, {"text": "fine", "label": "no complaint"}]
    said = {"method": "ia3", "template": "{text} Label :", "target": "label", "labels": LABELS}
    job = client.train("trained", rows, **said, hyperparameters={"epochs": 1})
    assert client.wait_for_job(job)["adapter_version"] == 1
    assert client.classify({"text": "late"}, adapter="trained")["label"] in LABELS

    endless = client.train("endless", rows, **said, hyperparameters={"epochs": 10_000})
    client.cancel_job(endless)
    with pytest.raises(graftwork.JobFailed, match="made no adapter: it is cancelled") as failed:
        client.wait_for_job(endless)
    assert failed.value.job["state"] == "cancelled"
