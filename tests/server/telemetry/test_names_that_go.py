"""Adapters come and go by the hundred: what the server keeps by name is what it kept before.

Not by a list of what there is to look at: everything that hangs on the server's services is walked.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Iterator, Sized
from typing import Any

from server.generation import generator as generation
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, upload

BEFORE, THEN = 40, 200
OURS = ("server.", "adapters.")
CONTAINERS = (dict, list, set, frozenset, deque)
# Halved every so many requests, see `server.telemetry.top_adapters`.
RECENT = "metrics._adapters._recent"


def sizes(services: Any) -> dict[str, int]:
    """Path -> entries, of every container that objects of ours hold, however deep."""
    return dict(_walk("", services, set()))


def _walk(path: str, one: Any, seen: set[int]) -> Iterator[tuple[str, int]]:
    if id(one) in seen or inspect.isclass(one) or inspect.isroutine(one):
        return
    seen.add(id(one))
    if isinstance(one, CONTAINERS) and isinstance(one, Sized):
        yield path, len(one)
        for value in list(one.values()) if isinstance(one, dict) else ():
            yield from _walk(f"{path}[]", value, seen)
    if not type(one).__module__.startswith(OURS):
        return
    names = list(getattr(one, "__dict__", {})) + list(getattr(type(one), "__slots__", ()))
    for name in names:
        yield from _walk(f"{path}.{name}".lstrip("."), getattr(one, name, None), seen)


def come_and_go(client, folder, numbers) -> None:
    weights = folder / "adapter_model.safetensors"
    for number in numbers:
        name = f"adapter-{number}"
        save_prefix_adapter(folder, seed=number, n=1)
        assert upload(client, folder, name).status_code == 201
        body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
        assert client.post(f"/generate?adapter={name}", json=body).status_code == 200
        assert client.post(f"/generate?adapter={name}-not", json=body).status_code == 404
        assert client.delete(f"/adapters/{name}").status_code in (200, 204)
    weights.unlink()


def test_hundreds_of_adapters_that_were_deleted_leave_nothing_in_memory(
    tiny_base, tmp_path, monkeypatch
):
    # For so long a request may still need what it resolved; nobody waits for a minute here.
    monkeypatch.setattr(generation, "_RESOLVED_SECONDS", 0.5)
    settings = make_settings(tiny_base, tmp_path / "data", metrics_adapters=2)
    with running_server(settings, collect_seconds=0.05) as client:
        services = client.app_services()
        come_and_go(client, tmp_path / "made", range(BEFORE))
        before = settled(services)
        assert len(before) > 30
        come_and_go(client, tmp_path / "made", range(BEFORE, BEFORE + THEN))
        after = settled(services)
        assert after.pop(RECENT) < 1024
        grown = {path: (before.get(path, 0), n) for path, n in after.items()}
        assert {path: both for path, both in grown.items() if both[1] > both[0] + 5} == {}
        assert services.client._residency == {}
        assert not services.adapter_use
        assert client.get("/adapters").json()["total"] == 0
        assert list((settings.data_dir / "blobs").iterdir()) == []


def settled(services) -> dict[str, int]:
    """Sizes once what was deleted is off the disk too."""
    end = time.monotonic() + 30
    while list(services.settings.blobs_dir.iterdir()) or services.client._residency:
        assert time.monotonic() < end, "it never went"
        time.sleep(0.1)
    time.sleep(0.2)
    return sizes(services)
