"""httpx on an ASGI application in this process: streams, errors, time limits, callers that go."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from server.cli.asgi_transport import ASGITransport

START = {"type": "http.response.start", "status": 200, "headers": [(b"x-kind", b"test")]}
CANCELLED = threading.Event()


async def app(scope, receive, send) -> None:
    """Echoes a body; /parts sends parts without end, /fails fails, /late fails after its start."""
    body = (await receive())["body"]
    if scope["path"] == "/fails":
        raise OSError(28, "no room", "file")
    await send(START)
    if scope["path"] == "/late":
        raise OSError(28, "no room", "file")
    if scope["path"] == "/parts":
        try:
            for number in range(10**9):
                part = b"%d\n" % number
                await send({"type": "http.response.body", "body": part, "more_body": True})
                await asyncio.sleep(0 if number < 2 else 60)
        finally:
            CANCELLED.set()
    text = scope["method"].encode() + b" " + scope["raw_path"] + b"?" + scope["query_string"]
    await send({"type": "http.response.body", "body": text + b" " + body, "more_body": False})


@pytest.fixture
def client():
    with httpx.Client(transport=ASGITransport(app), base_url="http://localhost") as client:
        yield client


def test_requests_and_replies_are_whole(client):
    reply = client.post("/a%20b", params={"x": "é"}, content=b"body")
    assert (reply.status_code, reply.headers["x-kind"]) == (200, "test")
    assert reply.text == "POST /a%20b?x=%C3%A9 body"


def test_parts_come_before_the_end_and_closing_cancels(client):
    CANCELLED.clear()
    with client.stream("GET", "/parts") as reply:
        lines = reply.iter_lines()
        assert [next(lines), next(lines)] == ["0", "1"]
    assert CANCELLED.wait(10)


def test_a_silence_is_a_read_timeout(client):
    patience = httpx.Timeout(5, read=0.2)
    with (
        pytest.raises(httpx.ReadTimeout),
        client.stream("GET", "/parts", timeout=patience) as reply,
    ):
        list(reply.iter_bytes())


@pytest.mark.parametrize("path", ["/fails", "/late"])
def test_what_the_application_raises_is_raised(client, path):
    with pytest.raises(OSError, match="no room"):
        client.get(path)


def test_many_threads_share_it(client):
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda n: client.post(f"/{n}", content=b"x").text, range(32)))
    assert replies == [f"POST /{n}? x" for n in range(32)]
