"""SIGTERM and `POST /drain` on a server in a process of its own; a drain's state by itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from server.draining import Draining
from tests.faults.storage_server import serving
from tests.server.http_server import save_tiny_base

TOKENS = 20_000
LONG = {"inputs": "x", "parameters": {"max_new_tokens": TOKENS, "ignore_eos": True}}
OPENAI = {"model": "tiny-base", "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
STREAMS = {
    "/generate_stream": LONG,
    "/v1/completions": {**OPENAI, "prompt": "x"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base with room for outputs that take minutes."""
    directory = save_tiny_base(tmp_path_factory.mktemp("drain") / "base")
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = 2 * TOKENS
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def served(base, tmp_path, monkeypatch, request):
    """A server that gives what runs so many seconds at a signal: the test's parameter, or 60."""
    monkeypatch.setenv("GRAFTWORK_SHUTDOWN_SECONDS", str(getattr(request, "param", 60)))
    with serving(base, tmp_path / "data", tmp_path / "log") as one:
        yield one


def descendants(served) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(served.process.pid).children(recursive=True)
    return found


def assert_ended(served, children: list[psutil.Process]) -> None:
    assert served.process.wait(30) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def data_of(lines) -> list[str]:
    return [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]


def told_at_the_end(path: str, frames: list[str]) -> str:
    """The words of the error that a stream ends with, in the shape of its protocol."""
    if not path.startswith("/v1/"):
        error = json.loads(frames[-1])
        assert error["error_type"] == "incomplete_generation"
        return str(error["error"])
    last = [frame for frame in frames if frame != "[DONE]"][-1]
    return str(json.loads(last)["error"]["message"])


def begin(served, path: str):
    """A stream whose first frame has come, and what is left of it."""
    context = served.client.stream("POST", path, json=STREAMS[path])
    reply = context.__enter__()
    lines = reply.iter_lines()
    next(lines)
    return context, lines


@pytest.mark.parametrize("path", STREAMS)
def test_a_second_signal_ends_streams_in_the_words_of_their_protocol(served, path):
    children = descendants(served)
    context, lines = begin(served, path)
    served.process.send_signal(signal.SIGTERM)
    with httpx.Client(base_url=served.client.base_url, timeout=60) as other:
        while (ready := other.get("/readyz")).status_code == 200:
            time.sleep(0.02)
        assert (ready.status_code, "draining" in ready.text) == (503, True)
        assert other.get("/livez").status_code == 200
        assert other.get("/adapters").status_code == 200
        for refused, body in STREAMS.items():
            reply = other.post(refused, json=body)
            assert reply.status_code == 503
            assert reply.headers["retry-after"]
        assert other.request("DELETE", "/drain").json()["status"] == "draining"
    assert served.process.poll() is None
    served.process.send_signal(signal.SIGTERM)
    assert "stopping" in told_at_the_end(path, data_of(lines))
    context.__exit__(None, None, None)
    assert_ended(served, children)


@pytest.mark.parametrize("served", [1], indirect=True)
def test_what_outlives_the_deadline_hears_of_it(served):
    """All protocols at once, and a reply that is not a stream."""
    children = descendants(served)
    begun = {path: begin(served, path) for path in STREAMS}
    whole = subprocess.Popen(
        [
            sys.executable, "-c",
            "import httpx, json, sys; reply = httpx.post(sys.argv[1] + '/generate', "
            "json=json.loads(sys.argv[2]), timeout=60); print(reply.status_code, reply.text)",
            str(served.client.base_url).rstrip("/"), json.dumps(LONG),
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with httpx.Client(base_url=served.client.base_url, timeout=60) as other:
        while _num_running(other) < len(STREAMS) + 1:
            time.sleep(0.05)
    served.process.send_signal(signal.SIGTERM)
    for path, (context, lines) in begun.items():
        assert "stopping" in told_at_the_end(path, data_of(lines))
        context.__exit__(None, None, None)
    told, _ = whole.communicate(timeout=60)
    assert told.startswith("503 ")
    assert_ended(served, children)


def _num_running(client: httpx.Client) -> int:
    lines = client.get("/metrics").text.splitlines()
    return int(
        sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:num_requests_running"))
    )


def test_a_short_stream_ends_whole_though_the_signal_reaches_the_whole_group(served):
    children = descendants(served)
    asked = {"max_new_tokens": 300, "ignore_eos": True, "details": True}
    body = {"inputs": "x", "parameters": asked}
    with served.client.stream("POST", "/generate_stream", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        for process in (*children, served.process):
            process.send_signal(signal.SIGTERM)
        frames = data_of(lines)
    assert json.loads(frames[-1])["details"]["generated_tokens"] == 300
    assert_ended(served, children)


def test_a_drain_waits_refuses_and_is_undone(served):
    client = served.client
    assert client.post("/drain").json() == {"status": "drained", "running": 0}
    assert client.get("/readyz").status_code == 503
    assert client.post("/generate", json={"inputs": "x"}).status_code == 503
    # The route counts, not how its path ends.
    assert client.put("/adapters/none/aliases/cancel").status_code == 503
    assert client.post(f"/train/job-{'0' * 24}/cancel").status_code == 404
    assert client.delete("/drain").json() == {"status": "ready", "running": 0}
    assert client.get("/readyz").status_code == 200
    context, _lines = begin(served, "/generate_stream")
    assert client.post("/drain?seconds=0").json() == {"status": "draining", "running": 1}
    context.__exit__(None, None, None)
    assert client.post("/drain?seconds=60").json() == {"status": "drained", "running": 0}


def test_the_hook_of_the_image_drains(served):
    hook = Path(__file__).parents[2] / "docker" / "drain.py"
    port = str(served.client.base_url.port)
    done = subprocess.run(
        [sys.executable, hook],
        env={**os.environ, "GRAFTWORK_PORT": port},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert served.client.get("/readyz").status_code == 503


def test_a_signal_while_the_engine_loads_ends_it_all(base, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "server", "serve", "--base", str(base), "--port", "0"]
    command += ["--data-dir", str(tmp_path / "data"), "--dtype", "float32"]
    with log.open("wb") as words:
        process = subprocess.Popen(command, stderr=words, cwd=Path(__file__).parents[2])
    while b"Waiting for application startup" not in log.read_bytes():
        assert process.poll() is None
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert b"Traceback" not in log.read_bytes()


async def test_a_drain_is_idle_once_nothing_runs():
    draining = Draining()
    assert not draining.active
    assert await draining.idle(0)
    draining.begin()
    with draining.run():
        assert (draining.active, draining.running) == (True, 1)
        assert not await draining.idle(0.05)
        waiting = asyncio.ensure_future(draining.idle(60))
        await asyncio.sleep(0.06)
        assert not waiting.done()
    assert await waiting
    with draining.run():
        waiting = asyncio.ensure_future(draining.idle(60))
        await asyncio.sleep(0)
        draining.end()
        assert not await waiting
    draining.stop()
    draining.end()
    assert (draining.active, draining.stopping, draining.hurried) == (True, True, False)
    draining.stop(hurry=True)
    assert draining.hurried
