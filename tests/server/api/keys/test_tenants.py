"""What one tenant may take, and what it learns of another: shares, messages, counters, equal bytes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from server.store.files import FileStore
from server.store.job_limits import QueueLimits
from server.store.jobs import JobStore
from tests.server.api.keys.test_authentication import TRAIN

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
