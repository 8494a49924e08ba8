"""A back-up made while the server works, restored into an empty folder, serves the same."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import tarfile
import threading

from tests.docker.files import DOCKER
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, upload

BODY = {"inputs": "Tweet text : hello", "parameters": {"max_new_tokens": 12, "do_sample": False}}
STAYS = ("one", "two", "three")


def answers(client, names):
    replies = {
        name: client.post("/generate", params={"adapter": name}, json=BODY) for name in names
    }
    return {name: reply.json()["generated_text"] for name, reply in replies.items()}


def make_backup(data_dir):
    command = [sys.executable, str(DOCKER / "backup.py"), str(data_dir)]
    result = subprocess.run(command, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout


def come_and_go(client, home, stop):
    """Adapters are uploaded, replaced and deleted for as long as nobody says stop."""
    for seed in itertools.count(100):
        if stop.is_set():
            return
        folder = save_prefix_adapter(home / f"adapter-{seed}", seed=seed)
        upload(client, folder, f"passing-{seed % 3}")
        if seed % 2:
            client.delete(f"/adapters/passing-{(seed - 1) % 3}")


def test_a_back_up_of_a_busy_server_is_served_the_same(tiny_base, tmp_path):
    settings = make_settings(tiny_base, tmp_path / "data", train_workers=0)
    with running_server(settings) as client:
        for seed, name in enumerate(STAYS):
            folder = save_prefix_adapter(tmp_path / name, seed=seed, n=3 + seed)
            assert upload(client, folder, name, labels='["a", "b"]').status_code == 201
        client.put("/adapters/one/aliases/best", json={"version": 1})
        rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(4)]
        job = {"adapter": "x", "method": "ia3", "template": "{text}", "target": "label"}
        assert client.post("/train", json={**job, "rows": rows}).status_code == 202
        expected = answers(client, [*STAYS, "one@best"])
        stop = threading.Event()
        busy = threading.Thread(target=come_and_go, args=(client, tmp_path, stop))
        busy.start()
        try:
            made = [make_backup(settings.data_dir) for _ in range(4)]
        finally:
            stop.set()
            busy.join()
    assert len(set(expected.values())) > 1  # the adapters differ, or nothing is shown here

    for number, backup in enumerate(made):
        restored = tmp_path / f"restored-{number}"
        with tarfile.open(fileobj=io.BytesIO(backup)) as archive:
            archive.extractall(restored, filter="data")
        assert {path.name for path in restored.iterdir()} <= {
            "registry.db",
            "blobs",
            "files",
            "jobs",
        }
    with running_server(make_settings(tiny_base, restored, train_workers=0)) as client:
        listed = client.get("/adapters").json()["adapters"]
        assert {one["name"] for one in listed} >= set(STAYS)
        assert {one["status"] for one in listed} == {"ok"}
        assert answers(client, [*STAYS, "one@best"]) == expected
        every = answers(client, [one["name"] for one in listed])
        assert all(every.values())
        assert [one["adapter"] for one in client.get("/train").json()["jobs"]] == ["x"]


def test_a_folder_without_a_database_is_refused(tmp_path):
    command = [sys.executable, str(DOCKER / "backup.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "no data directory" in result.stderr
