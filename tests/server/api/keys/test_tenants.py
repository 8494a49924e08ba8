"""What one tenant may take, and what it learns of another: shares, messages, counters, equal bytes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from server.store.files import FileStore
from server.store.job_limits import QueueLimits
from server.store.jobs import JobStore
from tests.server.api.keys.test_authentication import TRAIN
from tests.server.http_server import save_prefix_adapter

FILE = {
    "data": {"purpose": "fine-tune"},
    "files": {"file": ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n')},
}


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_one_tenant_fills_its_share_and_no_other_hears_of_it(guarded, monkeypatch):
    services = guarded.client.app_services()
    there, waiting = len(services.files.list(limit=1000)), services.jobs.count_by_state()["queued"]
    files = FileStore(guarded.data_dir, max_files=there + 3, max_files_per_owner=2)
    jobs = JobStore(guarded.data_dir, queue=QueueLimits(max_jobs=waiting + 3, max_jobs_per_owner=2))
    monkeypatch.setattr(services, "files", files)
    monkeypatch.setattr(services, "jobs", jobs)
    greedy, again, other = (guarded.key("train", tenant=name) for name in ("a", "a", "b"))
    for path, body, status, code in (
        ("/v1/files", FILE, 413, "files_full"),
        ("/train", {"json": TRAIN}, 429, "too_many_jobs"),
    ):

        def ask(key: str, path: str = path, body: dict = body) -> tuple[int, str]:
            reply = guarded.ask("POST", path, key, **body)
            error = reply.json().get("error")
            told = error.get("message", "") if isinstance(error, dict) else error or ""
            return reply.status_code, told + str(reply.json().get("code", ""))

        assert [ask(greedy)[0], ask(again)[0], ask(greedy)[0]] == [ask(other)[0]] * 2 + [status]
        assert re.search("2 (files|training jobs)", ask(again)[1])
        assert code == "files_full" or code in ask(greedy)[1]
        # `other` has one more within its share, and the server has no room: no number of others.
        assert ask(other)[0] == status
        assert not re.search("[0-9]", ask(other)[1])
    for key in (greedy, other):
        for job in guarded.ask("GET", "/train", key).json()["jobs"]:
            guarded.ask("POST", f"/train/{job['id']}/cancel", key)
        for file in guarded.ask("GET", "/v1/files", key).json()["data"]:
            guarded.ask("DELETE", f"/v1/files/{file['id']}", key)
    files.close()
    jobs.close()


# --- equal bytes under two names ------------------------------------------------------------------


def test_two_tenants_with_equal_bytes_move_and_tell_nothing_of_each_other(guarded, tmp_path):
    folder = save_prefix_adapter(tmp_path / "equal", seed=4242)
    first, second = (
        guarded.key("adapters:write", "adapters:read", "generate", adapters=[name])
        for name in ("equal-a", "equal-b")
    )
    body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
    replies = []
    for key, name in ((first, "equal-a"), (second, "equal-b")):

        def where(key: str = key, name: str = name) -> str:
            model = guarded.ask("GET", f"/v1/models/{name}", key).json()["residency"]
            shown = guarded.ask("GET", f"/adapters/{name}", key).json()["residency"]
            assert model == shown
            return shown

        sent = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
        form = {"data": {"name": name}, "files": sent}
        # As if nobody else had these bytes, though the first's are on the device.
        reply = guarded.ask("POST", "/adapters", key, **form)
        assert (reply.status_code, reply.json()["residency"], where()) == (201, "disk", "disk")
        replies.append({**reply.json(), "name": "", "created_at": ""})
        assert guarded.ask("POST", f"/generate?adapter={name}", key, json=body).status_code == 200
        wait_for(lambda where=where: where() == "device")
    assert replies[0] == replies[1]
    engine = guarded.client.app_services().client
    digest = replies[0]["digest"]
    assert guarded.ask("POST", "/adapters/equal-b/unload", second).status_code == 202
    wait_for(lambda: guarded.ask("GET", "/adapters/equal-b", second).json()["residency"] == "host")
    assert guarded.ask("GET", "/adapters/equal-a", first).json()["residency"] == "device"
    assert guarded.ask("DELETE", "/adapters/equal-b", second).status_code == 200
    # The first's generation still finds it there: nothing was loaded anew.
    assert guarded.ask("POST", "/generate?adapter=equal-a", first, json=body).status_code == 200
    assert engine.residency(digest) == "device"
    assert guarded.ask("POST", "/adapters/equal-a/unload", first).status_code == 202
    wait_for(lambda: engine.residency(digest) == "host")
    assert guarded.ask("DELETE", "/adapters/equal-a", first).status_code == 200


def test_how_busy_the_engine_is_is_the_admins_to_know(guarded, keys):
    for scope, key in keys.items():
        info = guarded.ask("GET", "/info", key).json()
        live = {"num_running", "num_waiting", "kv_blocks_used"}
        assert set(info["engine"]) == {"kv_blocks_total"} | (live if scope == "admin" else set())
        assert info["base"]["num_layers"] > 0


def test_a_key_limited_to_names_tunes_without_a_suffix(guarded):
    key = guarded.key("train", adapters=["team-q-*"])
    rows = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", rows)}}
    file = guarded.ask("POST", "/v1/files", key, **form).json()["id"]
    body = {"model": "tiny-base", "training_file": file}
    reply = guarded.ask("POST", "/v1/fine_tuning/jobs", key, json=body)
    assert reply.status_code == 200, reply.text
    job = guarded.ask("GET", f"/train/{reply.json()['id']}", key).json()
    assert re.fullmatch("team-q-ft-[0-9a-f]{24}", job["adapter"])
    guarded.ask("POST", f"/train/{job['id']}/cancel", key)
    guarded.ask("DELETE", f"/v1/files/{file}", key)


def test_an_alias_that_a_key_cannot_see_stops_no_upload_and_no_job(guarded, tmp_path):
    admin, key = guarded.key("admin"), guarded.key("adapters:write", "train", adapters=["team-r"])
    alias = "/adapters/other/aliases/team-r"
    assert guarded.ask("PUT", alias, admin, json={"version": 1}).status_code == 200
    reply = guarded.ask("POST", "/train", key, json={**TRAIN, "adapter": "team-r"})
    assert reply.status_code == 202, reply.text
    guarded.ask("POST", f"/train/{reply.json()['id']}/cancel", key)
    folder = save_prefix_adapter(tmp_path / "r", seed=5)
    sent = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
    reply = guarded.ask("POST", "/adapters", key, data={"name": "team-r"}, files=sent)
    assert reply.status_code == 201, reply.text
    assert guarded.ask("GET", "/v1/models/team-r", admin).status_code == 404  # which of both?
    assert guarded.ask("DELETE", alias, admin).json()["name"] == "other"
    assert guarded.ask("GET", "/v1/models/team-r", admin).json()["id"] == "team-r"
    assert guarded.ask("DELETE", alias, admin).status_code == 404
    assert guarded.ask("DELETE", "/adapters/team-r", key).status_code == 200
