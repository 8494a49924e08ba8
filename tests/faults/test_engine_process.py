"""An engine process that dies or falls silent: who hears of it, and what serves afterwards."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytest_asyncio

from adapters.checkpoint.folder import digest_of
from server.engine.client import EngineClient, EngineOverloaded, EngineUnavailable, RequestFailed
from server.engine.request import AdapterRef
from tests.conformance.peft_oracle import make_adapter, prompt_ids
from tests.engine_tools import request, tokens
from tests.server.conftest import make_settings
from tests.server.engine.test_process import config_for
from tests.server.http_server import running_server, save_tiny_base
from tests.tiny_models import tiny_model

LOOP = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def ref(blobs):
    make_adapter(tiny_model("llama"), "llama", "prefix", blobs / "new")
    digest = digest_of(blobs / "new")
    (blobs / "new").rename(blobs / digest)
    return AdapterRef(digest, 7, False, name="prefix")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(base, blobs):
    config = config_for(base, blobs, max_restarts=100, silence_seconds=2.0)
    client = EngineClient(config)
    await client.start()
    yield client
    await client.stop()


async def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.01)


async def collect(stream):
    return [event async for event in stream]


async def answers(client, ref):
    load = [
        request(f"a{i}", prompt_ids(9 + i), adapter, 20, do_sample=True, seed=i)
        for i, adapter in enumerate((None, ref, ref))
    ]
    got = await asyncio.gather(*(collect(client.submit(one)) for one in load))
    return [tokens(events) for events in got]


async def busy(client, ref, count=6):
    """Readers of long requests, most of which run and some of which wait."""
    load = [
        request(f"long{i}", prompt_ids(5, seed=i), (None, ref)[i % 2], 400) for i in range(count)
    ]
    readers = [asyncio.create_task(collect(client.submit(one))) for one in load]
    await until(lambda: client.stats.num_running > 0)
    return readers


async def assert_all_failed(readers, words):
    for reader in readers:
        with pytest.raises(RequestFailed, match=words) as caught:
            await asyncio.wait_for(reader, 30)
        assert caught.value.code == "engine_unavailable"


@LOOP
@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signal.SIGKILL, "ended unexpectedly"),
        (signal.SIGSTOP, "has reported nothing for 2 seconds"),
    ],
    ids=["killed", "hanging"],
)
async def test_an_engine_that_is_lost_is_replaced_and_answers_as_before(client, ref, how, words):
    moved = []
    client.on_residency = moved.append
    before = await answers(client, ref)
    assert client.residency(ref.digest) == "device"
    readers, pid, restarts = await busy(client, ref), client.pid, client.num_restarts
    os.kill(pid, how)
    await assert_all_failed(readers, words)
    assert client.num_in_flight == 0
    with pytest.raises(EngineUnavailable):
        client.submit(request("meanwhile", prompt_ids(5)))
    assert not client.lost
    await until(lambda: client.residency(ref.digest) == "disk")
    assert moved[-1].residency == "disk"
    await until(lambda: client.alive)
    assert client.num_restarts == restarts + 1
    assert client.pid != pid
    assert await answers(client, ref) == before
    await until(lambda: client.stats.num_running == 0)


@LOOP
async def test_a_loop_that_stands_still_loses_neither_tokens_nor_the_engine(client, ref):
    """Nobody takes what the engine sends for longer than it may be silent."""
    pid, expected = client.pid, await answers(client, ref)
    pending = asyncio.create_task(answers(client, ref))
    await until(lambda: client.num_in_flight == 3)
    time.sleep(2.5)
    assert await pending == expected
    assert client.pid == pid


@LOOP
async def test_a_stream_that_nobody_reads_holds_its_own_tokens_and_slows_nobody(client, ref):
    unread = client.submit(request("unread", prompt_ids(5), None, 300))
    expected = await answers(client, ref)
    await until(lambda: client.num_in_flight == 0)  # the engine went on without a reader
    assert len(unread._events) == 300
    assert len(await collect(unread)) == 300
    assert await answers(client, ref) == expected


@LOOP
async def test_commands_to_an_engine_that_takes_none_are_bounded(client, ref):
    await until(lambda: client.alive)
    pid = client.pid
    os.kill(pid, signal.SIGSTOP)

    def submit_and_abort():
        for number in range(10_000):
            client.submit(request(f"b{number}", prompt_ids(400), None, 5)).abort()

    with pytest.raises(EngineOverloaded):
        submit_and_abort()
    assert client.num_in_flight == 0
    os.kill(pid, signal.SIGCONT)
    # Heard of again or replaced, as the moment has it.
    await until(lambda: client.alive and client._engine.num_unsent == 0)
    assert len(await answers(client, ref)) == 3


@LOOP
async def test_a_request_that_cannot_even_be_queued_fails_alone(client, ref):
    await until(lambda: client.alive)
    pid, expected = client.pid, await answers(client, ref)
    odd = dataclasses.replace(request("odd", prompt_ids(5)), sampling=None)
    with pytest.raises(RequestFailed, match="could not be queued") as caught:
        await collect(client.submit(odd))
    assert caught.value.code == "engine_error"
    assert client.pid == pid
    assert await answers(client, ref) == expected


@LOOP
async def test_an_engine_that_cannot_be_started_again_is_given_up(base, blobs, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    client = EngineClient(config_for(copy, blobs, max_restarts=1))
    await client.start()
    shutil.rmtree(copy)
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: client.lost)
    assert not client.alive
    assert client.num_restarts == 0
    with pytest.raises(EngineUnavailable):
        client.submit(request("never", prompt_ids(5)))
    await client.stop()


@LOOP
async def test_stop_while_it_is_started_again_ends_all_of_it(base, blobs):
    client = EngineClient(config_for(base, blobs, max_restarts=5))
    await client.start()
    first = client._engine.process
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: client._engine.process is not first)
    second = client._engine.process
    await client.stop()
    assert not first.is_alive()
    assert not second.is_alive()
    assert not client.restarting
    assert not client.alive


def wait(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def restarts(client):
    text = client.get("/metrics").text
    return float(re.search(r"^graftwork_engine_restarts_total (\S+)$", text, re.MULTILINE)[1])


def test_an_engine_that_ended_is_started_again_by_a_server_that_lives(tmp_path):
    base = save_tiny_base(tmp_path / "base")
    with running_server(make_settings(base, tmp_path / "data")) as client:
        assert restarts(client) == 0
        os.kill(client.app_services().client.pid, signal.SIGKILL)
        wait(lambda: client.get("/readyz").status_code == 503)
        reply = client.get("/readyz")
        assert "started again" in reply.json()["error"]
        while client.get("/readyz").status_code == 503:
            assert client.get("/livez").status_code == 200
        assert restarts(client) == 1


WHOLE = [
    ("/generate", {"inputs": "x"}),
    ("/generate_stream", {"inputs": "x"}),
    ("/classify", {"inputs": "x", "labels": ["a", "b"]}),
    ("/v1/completions", {"model": "tiny-base", "prompt": ["x", "y"]}),
    ("/v1/completions", {"model": "tiny-base", "prompt": "x", "stream": True}),
]


def test_over_http_a_stream_ends_in_an_error_and_probes_say_what_helps(tmp_path):
    base = save_tiny_base(tmp_path / "base")
    settings = make_settings(base, tmp_path / "data", engine_restarts=1, engine_silence_seconds=2.0)
    body = {"inputs": "x", "parameters": {"max_new_tokens": 20, "details": True}}
    long = {"inputs": "x", "parameters": {"max_new_tokens": 480, "ignore_eos": True}}
    with running_server(settings) as client:
        before = client.post("/generate", json=body).json()
        engine = client.app_services().client
        with client.stream("POST", "/generate_stream", json=long) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.kill(engine.pid, signal.SIGSTOP)
            # In flight when it is lost: whole replies can still say so by their status.
            with ThreadPoolExecutor() as pool:
                lost = [pool.submit(client.post, path, json=sent) for path, sent in WHOLE]
            last = json.loads([line for line in lines if line][-1].removeprefix("data:"))
        assert "has reported nothing for 2 seconds" in last["error"]
        for reply in [one.result() for one in lost]:
            assert reply.status_code == 503
            assert "has reported nothing" in reply.text
            assert reply.headers["retry-after"] == "5"
        reply = client.post("/generate", json=body)
        assert reply.status_code == 503
        assert "started again" in reply.json()["error"]
        assert client.get("/readyz").status_code == 503
        reply = client.get("/livez")
        assert reply.status_code == 503
        assert "the engine hung" in reply.json()["error"]
        wait(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/livez").status_code == 200
        assert restarts(client) == 1
        after = client.post("/generate", json=body).json()
        assert after["generated_text"] == before["generated_text"]
        assert after["details"]["tokens"] == before["details"]["tokens"]
        # The one restart is used up: now only a new server helps, and /livez says so.
        os.kill(engine.pid, signal.SIGKILL)
        wait(lambda: client.get("/livez").status_code == 503)
        assert restarts(client) == 1
        assert "not started again" in client.get("/livez").text
        assert client.get("/readyz").status_code == 503
        assert client.get("/adapters").status_code == 200
