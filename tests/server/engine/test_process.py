"""A real engine process behind its asyncio client: tokens, aborts, a full queue, and every way to end."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, GPTJConfig, T5Config, T5ForConditionalGeneration

from adapters.checkpoint.folder import digest_of
from server.engine.client import (
    EngineClient,
    EngineOverloaded,
    EngineStartFailed,
    EngineUnavailable,
    RequestFailed,
)
from server.engine.config import EngineConfig
from server.engine.request import AdapterRef
from tests.conformance.peft_oracle import make_adapter, prompt_ids
from tests.engine_tools import request, run, tiny_engine, tokens
from tests.tiny_models import VOCAB, tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")


def config_for(base: Path, blobs: Path, **changes) -> EngineConfig:
    options = {"max_running": 4, "max_queued": 3, "kv_bytes": 8 << 20, "threads": 1, **changes}
    return EngineConfig(
        str(base), str(blobs), dtype="float32", folds_dir=str(blobs / "folds"), **options
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def adapters(blobs):
    """Adapters of three kinds in the blob folder, with what names them."""
    out = {}
    for variant, num_virtual_tokens in (("prefix", 7), ("cpt", 9), ("ia3", 0)):
        directory = blobs / variant
        make_adapter(tiny_model("llama"), "llama", variant, directory)
        digest = digest_of(directory)
        directory.rename(blobs / digest)
        out[variant] = AdapterRef(digest, num_virtual_tokens, variant == "ia3")
    return out


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(base, blobs, adapters):
    client = EngineClient(config_for(base, blobs))
    await client.start()
    yield client
    await client.stop()


async def collect(stream):
    return [event async for event in stream]


async def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.01)


def long_requests(count):
    """Requests that run for a while."""
    return [request(f"long{i}", prompt_ids(5), max_new_tokens=400) for i in range(count)]


async def test_it_tells_what_it_serves(client):
    assert client.alive
    assert client.base.model_type == "llama"
    assert client.base.vocab_size == VOCAB
    assert len(client.base.digest) == 64
    assert client.max_sequence_tokens == 512
    assert (client.room(0), client.room(7)) == (512, 505)


async def test_tokens_are_those_of_an_engine_in_this_process(client, blobs, adapters):
    refs = [None, *adapters.values()]
    load = [
        request(f"t{i}", prompt_ids(9 + i), ref, 20, num_logprobs=2) for i, ref in enumerate(refs)
    ]
    streams = [client.submit(one) for one in load]
    got = await asyncio.gather(*map(collect, streams))
    folders = {ref.digest: blobs / ref.digest for ref in adapters.values()}
    here = tiny_engine(tiny_model("llama"), folders)
    expected = run(here, load)
    here.close()
    for one, events in zip(load, got, strict=True):
        assert tokens(events) == tokens(expected[one.request_id])
        assert [event.finish_reason for event in events] == [None] * 19 + ["length"]
        assert events[0].queue_seconds >= 0
        assert all(len(event.logprob.top) == 2 for event in events)
    assert client.num_in_flight == 0
    await until(lambda: client.residency(adapters["cpt"].digest) == "device")
    client.unload(adapters["cpt"].digest)  # told though the engine has nothing to do
    await until(lambda: client.residency(adapters["cpt"].digest) == "host")
    client.preload(adapters["cpt"])
    await until(lambda: client.residency(adapters["cpt"].digest) == "device")


async def test_an_abort_frees_its_row(client):
    stream = client.submit(long_requests(1)[0])
    events = aiter(stream)
    first = await anext(events)
    assert first.finish_reason is None
    await until(lambda: client.stats.num_running == 1)
    stream.abort()
    stream.abort()
    assert client.num_in_flight == 0
    await until(lambda: client.stats.num_running == client.stats.num_waiting == 0)


async def test_a_reader_that_stops_reading_frees_its_row(client):
    events = aiter(client.submit(long_requests(1)[0]))
    await anext(events)
    await events.aclose()
    assert client.num_in_flight == 0
    await until(lambda: client.stats.num_running == client.stats.num_waiting == 0)


async def test_a_full_queue_is_said_and_nothing_of_it_stays(client):
    load = long_requests(8)
    streams = [client.submit(one) for one in load[:7]]  # four run, three wait
    with pytest.raises(EngineOverloaded) as caught:
        client.submit(load[7])
    assert caught.value.retry_after_seconds >= 1
    assert client.num_in_flight == 7
    for stream in streams:
        stream.abort()
    assert len(await collect(client.submit(request("after", prompt_ids(5), None, 3)))) == 3


async def test_a_request_that_fails_fails_alone(client, blobs, adapters):
    good = client.submit(request("good", prompt_ids(5), adapters["ia3"], 30))
    missing = client.submit(request("missing", prompt_ids(5), AdapterRef("0" * 64, 7, False)))
    too_long = client.submit(request("long", prompt_ids(500), max_new_tokens=14))
    with pytest.raises(RequestFailed) as caught:
        await collect(missing)
    assert caught.value.code == "adapter_corrupt"
    with pytest.raises(RequestFailed, match="make 514; the base has 512 positions") as caught:
        await collect(too_long)
    assert caught.value.code == "too_long"
    assert len(await collect(good)) == 30
    assert client.num_in_flight == 0


async def test_content_that_changed_under_its_digest_is_corrupt(client, blobs, adapters):
    changed = blobs / ("f" * 64)
    shutil.copytree(blobs / adapters["prefix"].digest, changed)
    stream = client.submit(request("changed", prompt_ids(5), AdapterRef(changed.name, 7, False)))
    with pytest.raises(RequestFailed, match="digest") as caught:
        await collect(stream)
    assert caught.value.code == "adapter_corrupt"


async def test_a_process_that_dies_fails_its_requests(base, blobs):
    client = EngineClient(config_for(base, blobs))
    await client.start()
    streams = [client.submit(one) for one in long_requests(5)]
    readers = [asyncio.create_task(collect(stream)) for stream in streams]
    await until(lambda: client.stats.num_running > 0)
    os.kill(client._engine.process.pid, signal.SIGKILL)
    for reader in readers:
        with pytest.raises(RequestFailed) as caught:
            await asyncio.wait_for(reader, 10)
        assert caught.value.code == "engine_unavailable"
    await until(lambda: not client.alive)
    with pytest.raises(EngineUnavailable):
        client.submit(long_requests(1)[0])
    await client.stop()
    await client.stop()


async def test_stop_ends_the_process_and_says_so_to_who_waits(base, blobs):
    client = EngineClient(config_for(base, blobs))
    await client.start()
    readers = [asyncio.create_task(collect(client.submit(one))) for one in long_requests(5)]
    await until(lambda: client.stats.num_running > 0)
    process = client._engine.process
    began = time.monotonic()
    await client.stop()
    assert time.monotonic() - began < 5
    assert not process.is_alive()
    assert process.exitcode == 0
    assert not client.alive
    for reader in readers:
        with pytest.raises(RequestFailed) as caught:
            await asyncio.wait_for(reader, 5)
        assert caught.value.code == "aborted"
    with pytest.raises(EngineUnavailable):
        client.submit(long_requests(1)[0])


async def test_a_pipe_that_is_gone_is_a_dead_engine_though_the_process_lives(base, blobs):
    client = EngineClient(config_for(base, blobs))
    await client.start()
    reader = asyncio.create_task(collect(client.submit(long_requests(1)[0])))
    await until(lambda: client.stats.num_running > 0)
    os.kill(client._engine.process.pid, signal.SIGSTOP)  # it cannot notice and end
    try:
        with socket.socket(fileno=os.dup(client._engine.connection.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)
        with pytest.raises(RequestFailed) as caught:
            await asyncio.wait_for(reader, 10)
        assert caught.value.code == "engine_unavailable"
        assert client._engine.process.is_alive()
        assert not client.alive
        with pytest.raises(EngineUnavailable):
            client.submit(long_requests(1)[0])
        assert client.num_in_flight == 0
    finally:
        os.kill(client._engine.process.pid, signal.SIGCONT)
        await client.stop()


async def test_a_process_that_dies_while_it_starts_says_so(base, blobs):
    client = EngineClient(config_for(base, blobs))
    starting = asyncio.create_task(client.start())
    await until(lambda: client._engine is not None)
    client._engine.connection.send("unread, so that its end is a reset")
    os.kill(client._engine.process.pid, signal.SIGKILL)
    with pytest.raises(EngineStartFailed, match="exit status") as caught:
        await asyncio.wait_for(starting, 20)
    assert caught.value.kind == "EngineDied"
    assert not client.alive
    await client.stop()


async def test_stop_while_it_starts_does_not_wait_for_it(base, blobs):
    client = EngineClient(config_for(base, blobs))
    starting = asyncio.create_task(client.start())
    await until(lambda: client._engine is not None)
    began = time.monotonic()
    await client.stop()
    assert time.monotonic() - began < 3
    with pytest.raises(EngineStartFailed):
        await starting


async def test_kv_memory_that_is_too_small_is_a_reason_not_to_start(base, blobs):
    client = EngineClient(config_for(base, blobs, kv_bytes=1000))
    with pytest.raises(EngineStartFailed, match="kv_bytes is 1000, expected at least"):
        await client.start()
    await client.stop()


async def test_it_knows_which_adapters_are_in_flight(client, adapters):
    assert client.digests_in_flight() == set()
    streams = [
        client.submit(request(f"d{i}", prompt_ids(5), ref, 400))
        for i, ref in enumerate((adapters["cpt"], adapters["cpt"], None))
    ]
    assert client.digests_in_flight() == {adapters["cpt"].digest}
    for stream in streams:
        stream.abort()
    assert client.digests_in_flight() == set()


async def test_what_cannot_start_says_why(tmp_path, blobs):
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2}
    t5 = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    gptj = GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **special)
    AutoModelForCausalLM.from_config(gptj).save_pretrained(tmp_path / "gptj")
    clients = {
        name: EngineClient(config_for(tmp_path / name, blobs)) for name in ("t5", "gptj", "none")
    }
    failures = await asyncio.gather(
        *(client.start() for client in clients.values()), return_exceptions=True
    )
    reasons = dict(zip(clients, failures, strict=True))
    for reason in failures:
        assert isinstance(reason, EngineStartFailed)
        assert reason.kind == "BaseUnsupported"
    assert "encoder-decoder" in reasons["t5"].message
    assert "gptj" in reasons["gptj"].message
    assert "expected a directory" in reasons["none"].message
    for client in clients.values():
        assert not client.alive
        await client.stop()
        assert client._engine is None
