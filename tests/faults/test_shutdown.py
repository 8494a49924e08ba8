"""SIGTERM and `POST /drain` on a server in a process of its own."""

from __future__ import annotations

import json
import signal

import httpx
import psutil
import pytest

from tests.faults.storage_server import serving
from tests.server.http_server import save_tiny_base

LONG = {"inputs": "x", "parameters": {"max_new_tokens": 480, "ignore_eos": True}}
OPENAI = {"model": "tiny-base", "prompt": "x", "max_tokens": 480, "stream": True}
STREAMS = [("/generate_stream", LONG), ("/v1/completions", {**OPENAI, "ignore_eos": True})]


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_SHUTDOWN_SECONDS", "30")
    base = save_tiny_base(tmp_path / "base")
    with serving(base, tmp_path / "data", tmp_path / "log") as one:
        yield one


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_second_signal_ends_streams_in_the_words_of_their_protocol(served, path, body):
    children = psutil.Process(served.process.pid).children(recursive=True)
    with served.client.stream("POST", path, json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        probe = httpx.get(f"{served.client.base_url}/livez")
        assert probe.status_code == 200
        refused = httpx.post(f"{served.client.base_url}/generate", json=LONG)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        ready = httpx.get(f"{served.client.base_url}/readyz")
        assert ready.status_code == 503
        assert "draining" in ready.text
        served.process.send_signal(signal.SIGTERM)
        frames = [line for line in lines if line.startswith("data:") and "[DONE]" not in line]
    error = json.loads(frames[-1].removeprefix("data:"))["error"]
    told = error["message"] if path.startswith("/v1/") else error
    assert "stopping" in told
    assert served.process.wait(30) == 0
    assert not [one for one in children if one.is_running()]


def test_a_short_stream_ends_whole(served):
    body = {"inputs": "x", "parameters": {"max_new_tokens": 60, "ignore_eos": True}}
    with served.client.stream("POST", "/generate_stream", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        frames = [line for line in lines if line]
    assert json.loads(frames[-1].removeprefix("data:"))["details"]["generated_tokens"] == 60
    assert served.process.wait(30) == 0


def test_a_drain_is_undone(served):
    assert served.client.post("/drain?seconds=0").json() == {"status": "drained", "running": 0}
    assert served.client.get("/readyz").status_code == 503
    assert served.client.delete("/drain").json() == {"status": "ready", "running": 0}
    assert served.client.post("/generate", json={"inputs": "x"}).status_code == 200
