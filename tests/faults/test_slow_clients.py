"""Clients that are slow, or never come to an end, take nothing from the others and are cut.

Real sockets against `graftwork serve`; its time-outs are short here, its limits are the real ones.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.http.protocol import NUM_RESERVED, SEND_BUFFER_BYTES
from tests.faults.slow_sockets import Address, Slow, request, status_and_body
from tests.faults.storage_server import BODY, Served, serving, wait_for
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_tiny_base

SECONDS = 2.0
SETTINGS = {
    "HEADER_SECONDS": SECONDS,
    "BODY_IDLE_SECONDS": SECONDS,
    "STREAM_SEND_SECONDS": SECONDS,
    "KEEP_ALIVE_SECONDS": SECONDS,
}
# Its reply is more than what the kernel holds for a client that does not read.
LONG = request("POST", "/tokenize", {"inputs": "ab " * 4_000})
STREAM = request(
    "POST",
    "/generate_stream",
    {
        "inputs": "a",
        "parameters": {"max_new_tokens": 450, "ignore_eos": True, "top_n_tokens": 5},
    },
)
GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n"
NUM_OF_A_KIND = 125
NUM_STREAMS = 16
ENOUGH_SECONDS = 60


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("slow-base"))


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_base) -> Iterator[Served]:
    home: Path = tmp_path_factory.mktemp("slow")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(f"GRAFTWORK_{name}", str(value))
        with serving(tiny_base, home / "data", home / "log") as server:
            yield server


@pytest.fixture
def address(served) -> Address:
    url = served.client.base_url
    return url.host, url.port


def run(work: Any) -> Any:
    """Run a coroutine that must end."""

    async def bounded() -> Any:
        async with asyncio.timeout(ENOUGH_SECONDS):
            return await work

    return asyncio.run(bounded())


async def talk(address: Address, data: bytes) -> bytes:
    """Send all at once, and read until the server closes."""
    async with Slow(address) as client:
        await client.send(data)
        return await client.until_closed()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def private_mib(pid: int) -> float:
    told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"Private_\w+: +(\d+) kB", told)) / 1024


def metric(served: Served, pattern: str) -> float:
    """The sum of the rows that match."""
    rows = re.findall(rf"^{pattern} (\S+)$", served.client.get("/metrics").text, re.MULTILINE)
    assert rows, pattern
    return sum(float(value) for value in rows)


# --- five hundred at once --------------------------------------------------------------------------


async def dribbles(address: Address, beginning: bytes, piece: bytes) -> bytes:
    async with Slow(address) as client:
        await client.send(beginning)
        return await client.dribble(piece, 0.2)


async def reads_nothing(address: Address, asked: bytes, until: asyncio.Event) -> bytes:
    """Ask, and look only at the end at what came."""
    async with Slow(address, receive_bytes=4096) as client:
        await client.send(asked)
        await until.wait()
        return await client.until_closed()


async def is_idle(address: Address, first: bytes) -> bytes:
    async with Slow(address) as client:
        await client.send(first)
        return await client.until_closed()


async def everybody_reads(address: Address) -> None:
    asked = LONG.replace(b"host: localhost", b"host: localhost\r\nconnection: close")
    await asyncio.gather(*(talk(address, asked) for _ in range(NUM_OF_A_KIND - NUM_STREAMS)))


async def crowd(
    served: Served, address: Address, num_open: int
) -> tuple[list[list[bytes]], list[Any]]:
    """Everybody at once, and somebody who is in a hurry: their replies by kind, and its tokens.

    Ends when every stream counts as aborted and the server has `num_open` descriptors open again.
    """
    cut = asyncio.Event()
    body = request("POST", "/v1/completions", b'{"prompt": "', length=10_000)
    kinds = [
        [dribbles(address, GET, b"a") for _ in range(NUM_OF_A_KIND)],
        [dribbles(address, body, b"a") for _ in range(NUM_OF_A_KIND)],
        [reads_nothing(address, STREAM, cut) for _ in range(NUM_STREAMS)],
        [reads_nothing(address, LONG, cut) for _ in range(NUM_OF_A_KIND - NUM_STREAMS)],
        [is_idle(address, b"") for _ in range(NUM_OF_A_KIND // 2)],
        [is_idle(address, GET + b"\r\n") for _ in range(NUM_OF_A_KIND - NUM_OF_A_KIND // 2)],
    ]
    tasks = [[asyncio.create_task(one) for one in kind] for kind in kinds]
    hurried = []
    begun = metric(served, r'vllm:request_success_total\{.*finished_reason="abort".*\}')
    while True:
        reply = await asyncio.to_thread(served.client.post, "/generate", json=BODY)
        hurried.append((reply.status_code, reply.json()["details"]["tokens"]))
        now = await asyncio.to_thread(
            metric, served, r'vllm:request_success_total\{.*finished_reason="abort".*\}'
        )
        if now - begun == NUM_STREAMS and descriptors(served.process.pid) <= num_open:
            break
    # Long texts are tokenized two at a time: the last few replies may have begun only now.
    await asyncio.sleep(2 * SECONDS)
    cut.set()
    return [list(await asyncio.gather(*kind)) for kind in tasks], hurried


def ids_of(tokens) -> list[int]:
    return [token["id"] for token in tokens]


def test_five_hundred_slow_connections_take_nothing_from_the_others(served, address):
    pid = served.process.pid
    usual = served.client.post("/generate", json=BODY).json()["details"]["tokens"]
    # As many who do read: what the allocator keeps of their replies is nobody's leak.
    run(everybody_reads(address))
    open_before, memory_before = descriptors(pid), private_mib(pid)

    # The hurried client's own connection, and what a thread pool opened meanwhile, may stay.
    kinds, hurried = run(crowd(served, address, open_before + 8))

    assert {status for status, _ in hurried} == {200}
    # A log-probability may differ in its last bits: a step of more tokens adds up otherwise.
    assert all(ids_of(tokens) == ids_of(usual) for _, tokens in hurried)
    headers, bodies, streams, replies, silent, idle = kinds
    for reply in headers:
        status, told = status_and_body(reply)
        assert (status, told["code"], told["field"]) == (408, "request_timeout", "headers")
    for reply in bodies:
        status, told = status_and_body(reply)
        assert (status, told["error"]["code"]) == (408, "request_timeout")
        assert b"connection: close" in reply
    for stream in streams:
        assert stream == b"" or stream.startswith(b"HTTP/1.1 200 ")
        assert b'"generated_text":"' not in stream  # the last frame
    for reply in replies:
        # No more than the kernel holds on both sides ever left the server.
        assert len(reply) < 4 * SEND_BUFFER_BYTES
    assert set(silent) == {b""}
    assert all(reply.endswith(b'{"status":"alive"}') for reply in idle)
    wait_for(lambda: metric(served, r"vllm:num_requests_(?:running|waiting)\{.*\}") == 0)
    wait_for(lambda: private_mib(pid) < memory_before + 64)


# --- headers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        (GET + b"a: b\r\n" * 100 + b"\r\n", 431, "headers_too_large"),
        (GET + b"a: " + b"b" * 33_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (GET + b"a: " + b"b" * 100_000, 431, "headers_too_large"),
        (GET + b"a: b\r\n" * 100_000, 431, "headers_too_large"),
        (b"GET /" + b"a" * 8200 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 414, "url_too_long"),
        (b"GET /" + b"a" * 200_000, 414, "url_too_long"),
        (GET, 408, "request_timeout"),
        (b"G", 408, "request_timeout"),
        (b"\r\n\r\n", 400, "bad_request"),
    ],
    ids=[
        "many",
        "large",
        "large without an end",
        "many without an end",
        "url",
        "url without an end",
        "no end",
        "one byte",
        "empty",
    ],
)
def test_headers_have_limits(address, asked, status, code):
    reply = run(talk(address, asked))
    came, told = status_and_body(reply)
    assert (came, told["code"]) == (status, code)
    assert b"connection: close" in reply
    assert b"x-request-id: " in reply


def test_headers_below_every_limit_are_taken(address):
    asked = GET + b"a: b\r\n" * 97 + b"c: " + b"d" * 31_000 + b"\r\nconnection: close\r\n\r\n"
    assert run(talk(address, asked)).startswith(b"HTTP/1.1 200 ")


def test_a_refusal_has_the_shape_of_its_path(address):
    for path, keys in (
        ("/v1/models", {"error"}),
        ("/info", {"error", "error_type"}),
        ("/adapters", {"error", "error_type", "code", "field", "expected", "came"}),
    ):
        asked = request("GET", path)[:-2] + b"a: b\r\n" * 200 + b"\r\n"
        status, told = status_and_body(run(talk(address, asked)))
        assert (status, set(told)) == (431, keys)


def test_requests_in_a_row_have_the_same_limits(address):
    row = (GET + b"\r\n") * 3
    for last, status in (
        (GET + b"a: " + b"b" * 200_000 + b"\r\n\r\n", b"431"),
        (GET, b"408"),
        (GET + b"connection: close\r\n\r\n", b"200"),
    ):
        reply = run(talk(address, row + last))
        assert re.findall(rb"HTTP/1.1 (\d+) ", reply) == [b"200"] * 3 + [status]


# --- bodies ----------------------------------------------------------------------------------------


def test_a_body_that_stops_is_refused(address):
    asked = request("POST", "/adapters/evil/combine", b'{"a', length=100)
    status, told = status_and_body(run(talk(address, asked.replace(b"/evil/combine", b"/combine"))))
    assert (status, told["code"], told["field"]) == (408, "request_timeout", "body")


def test_an_upload_slower_than_the_pace_is_refused_and_leaves_nothing(served, address):
    form = b'--x\r\ncontent-disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'
    asked = request("POST", "/adapters", form, length=10**9).replace(
        b"application/json", b"multipart/form-data; boundary=x"
    )
    # Never a pause, and yet a week for all of it.
    status, told = status_and_body(run(dribbles(address, asked, b"a" * 200)))
    assert (status, told["code"], told["field"]) == (408, "request_timeout", "body")
    wait_for(lambda: served.staging() == [])


def test_a_body_above_the_pace_is_taken_however_long_it_takes(address):
    async def work() -> bytes:
        body = b'{"inputs": "' + b"a" * 60_000
        async with Slow(address) as client:
            await client.send(request("POST", "/tokenize", body, length=len(body) + 32 * 2048 + 2))
            for _ in range(32):  # twice as long as an idle body has
                await asyncio.sleep(SECONDS / 16)
                await client.send(b"b" * 2048)
            await client.send(b'"}')
            return await client.receive()

    assert run(work()).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_nobody_wants_is_not_taken_for_ever(address):
    asked = request("POST", "/nowhere", b"a", length=10**9)
    reply = run(dribbles(address, asked, b"a" * 100))
    assert reply.startswith(b"HTTP/1.1 404 ")


def chunked(path: str, body: bytes = b"") -> bytes:
    """A request whose body goes on in chunks."""
    head = request("POST", path, body).partition(b"content-length")[0]
    return head + b"transfer-encoding: chunked\r\n\r\n"


def in_chunks(data: bytes, size: int) -> bytes:
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/adapters/combine", "/adapters"])
def test_a_body_of_very_many_very_small_chunks_is_refused(address, path):
    asked = chunked(path).replace(b"application/json", b"multipart/form-data; boundary=x")
    body = b"--x\r\n" if path == "/adapters" else b" "
    status, told = status_and_body(run(talk(address, asked + in_chunks(body * 30_000, 1))))
    message = told["error"]["message"] if path.startswith("/v1/") else told["error"]
    if path == "/adapters":  # refused as a form before that
        assert status in (413, 422)
    else:
        assert (status, "small chunks" in message) == (413, True)


def test_small_chunks_are_taken_as_some_clients_send_them(address):
    body = b'{"inputs": "' + b"ab " * 5_000 + b'"}'
    close = b"connection: close\r\ntransfer-encoding"
    asked = chunked("/tokenize").replace(b"transfer-encoding", close)
    reply = run(talk(address, asked + in_chunks(body, 5) + b"0\r\n\r\n"))
    assert reply.startswith(b"HTTP/1.1 200 ")


def test_a_refused_body_of_chunks_is_not_read_to_its_end(address):
    async def work() -> bytes:
        async with Slow(address) as client:
            await client.send(chunked("/nowhere") + in_chunks(b"a" * 1000, 1))
            return await client.until_closed()  # the end of the body never comes

    began = time.monotonic()
    reply = run(work())
    assert reply.startswith(b"HTTP/1.1 404 ")
    assert b"\r\nconnection: close\r\n" in reply
    # At once, not after the time that a body of a known length has.
    assert time.monotonic() - began < ENOUGH_SECONDS / 2


def test_a_head_in_tiny_segments_is_taken(address):
    asked = GET + b"a: " + b"b" * 3_000 + b"\r\nconnection: close\r\n\r\n"

    async def work() -> bytes:
        async with Slow(address) as client:
            for start in range(0, len(asked), 4):
                await client.send(asked[start : start + 4])
            return await client.until_closed()

    assert run(work()).startswith(b"HTTP/1.1 200 ")


def test_requests_that_wait_for_no_reply_are_answered_in_their_order(address):
    row = b"".join(request("GET", path) for _ in range(50) for path in ("/livez", "/nowhere"))
    reply = run(talk(address, row + GET + b"connection: close\r\n\r\n"))
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", reply)
    assert statuses == [b"200", b"404"] * 50 + [b"200"]


def test_costly_bytes_of_eight_leave_the_server_to_the_others(served, address):
    async def work() -> list[bytes]:
        asked = chunked("/generate") + in_chunks(b" " * 200_000, 1)
        costly = [asyncio.create_task(talk(address, asked)) for _ in range(8)]
        beside = await asyncio.to_thread(served.client.post, "/generate", json=BODY)
        assert beside.status_code == 200
        return list(await asyncio.gather(*costly))

    for reply in run(work()):
        # Too many chunks; or, with the pace of this server, too few of them in their turns.
        assert reply.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 408 "))


# --- readers ---------------------------------------------------------------------------------------


def test_a_slow_reader_gets_all_of_it(served, address):
    whole = len(served.client.post("/tokenize", json={"inputs": "ab " * 4_000}).content)

    async def work() -> bytes:
        received = b""
        async with Slow(address, receive_bytes=16_384) as client:
            await client.send(LONG)
            while len(received.partition(b"\r\n\r\n")[2]) < whole:
                block = await client.receive()
                assert block, "cut"
                received += block
                await asyncio.sleep(len(block) / 200_000)
        return received

    assert len(run(work()).partition(b"\r\n\r\n")[2]) == whole


# --- connections -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_base) -> Iterator[Any]:
    """A server that takes four connections."""
    data = tmp_path_factory.mktemp("small") / "data"
    settings = make_settings(tiny_base, data, max_connections=4, keep_alive_seconds=600)
    with running_server(settings) as client:
        yield client


async def hold(address: Address, count: int, first: bytes) -> list[Slow]:
    """Connections that have sent something and are left open."""
    held = [await Slow(address).__aenter__() for _ in range(count)]
    for one in held:
        await one.send(first)
    return held


async def let_go(held: list[Slow]) -> None:
    for one in held:
        await one.__aexit__()


def test_above_the_limit_requests_are_refused_but_health_is_told(small):
    address = small.base_url.host, small.base_url.port

    async def work() -> tuple[bytes, ...]:
        held = await hold(address, 5, GET)
        await asyncio.sleep(0.2)
        asked = [request("GET", path) for path in ("/v1/models", "/info")]
        replies = [await talk(address, one) for one in asked]
        health = await talk(address, GET + b"connection: close\r\n\r\n")
        await let_go(held)
        return (*replies, health)

    openai, tgi, health = run(work())
    status, told = status_and_body(openai)
    assert (status, told["error"]["code"]) == (503, "too_many_connections")
    status, told = status_and_body(tgi)
    assert (status, told["error_type"]) == (503, "unavailable")
    for reply in (openai, tgi):
        assert b"retry-after: 5" in reply
        assert b"connection: close" in reply
    assert health.startswith(b"HTTP/1.1 200 ")


def test_far_above_the_limit_nobody_is_heard(small):
    address = small.base_url.host, small.base_url.port

    async def work() -> bytes:
        # One of them may take the place of the fixture's own client.
        held = await hold(address, 4 + NUM_RESERVED + 1, b"")
        await asyncio.sleep(0.2)
        reply = await talk(address, b"")
        await let_go(held)
        return reply

    status, told = status_and_body(run(work()))
    assert (status, told["code"]) == (503, "too_many_connections")


def test_an_idle_connection_makes_room(small):
    address = small.base_url.host, small.base_url.port

    async def work() -> tuple[bytes, bytes]:
        idle = (await hold(address, 1, GET + b"\r\n"))[0]
        first = b""
        while b"alive" not in first:
            first += await idle.receive()
        held = await hold(address, 4, GET)
        closed = await idle.until_closed()
        replies = []
        for one in held:
            await one.send(b"connection: close\r\n\r\n")
            replies.append(await one.until_closed())
        await let_go([idle, *held])
        assert all(reply.startswith(b"HTTP/1.1 200 ") for reply in replies)
        return first, closed

    first, closed = run(work())
    assert first.startswith(b"HTTP/1.1 200 ")
    assert closed == b""
