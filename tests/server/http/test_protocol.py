"""Streams as they go over the wire, read by a client that takes HTTP word for word."""

from __future__ import annotations

import json
import socket

import h11
import pytest

PATHS = {
    "/generate_stream": {"inputs": "the tweet", "parameters": {"max_new_tokens": 12}},
    "/v1/completions": {
        "model": "complaints",
        "prompt": "the tweet",
        "max_tokens": 12,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
}
CHANGES = ("id", "created")


def connect(server) -> socket.socket:
    return socket.create_connection((server.base_url.host, server.base_url.port), timeout=30)


def head_and_body(path, version) -> bytes:
    body = json.dumps(PATHS[path]).encode()
    head = (
        f"POST {path} HTTP/{version}\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def read_reply(connection, client) -> tuple[h11.Response, list[bytes]]:
    """One reply, with its chunks; h11 raises where a byte is not as it must be."""
    response, chunks = None, []
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            client.receive_data(connection.recv(1 << 16))
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            # Of a chunk that came in two pieces, both.
            chunks += [b""] if event.chunk_start or not chunks else []
            chunks[-1] += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert response is not None
            return response, chunks


def ask(connection, client, path) -> tuple[h11.Response, list[bytes]]:
    headers = {"host": "localhost", "content-type": "application/json"}
    body = json.dumps(PATHS[path]).encode()
    headers["content-length"] = str(len(body))
    request = h11.Request(method="POST", target=path, headers=list(headers.items()))
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        connection.sendall(client.send(event) or b"")
    return read_reply(connection, client)


def without_what_changes(frames: bytes) -> list[object]:
    """The frames' data, but for what no two replies have alike."""
    came: list[object] = []
    for frame in frames.decode().split("\n\n")[:-1]:
        text = frame.removeprefix("data:").strip()
        data = text if text == "[DONE]" else json.loads(text)
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if key not in CHANGES}
        came.append(data)
    return came


@pytest.mark.parametrize("path", PATHS)
def test_every_frame_is_a_chunk_and_a_connection_goes_on_after_a_stream(server, path):
    replies = []
    with connect(server) as connection:
        client = h11.Connection(h11.CLIENT)
        for _ in range(3):
            response, chunks = ask(connection, client, path)
            assert response.status_code == 200
            assert all(chunk.endswith(b"\n\n") and chunk.count(b"\n\n") == 1 for chunk in chunks)
            replies.append(without_what_changes(b"".join(chunks)))
            client.start_next_cycle()
    assert len(replies[0]) > 6
    assert replies[0] == replies[1] == replies[2]


@pytest.mark.parametrize("path", PATHS)
def test_a_client_without_chunks_reads_the_same_frames_to_the_end(server, path):
    with connect(server) as connection:
        connection.sendall(head_and_body(path, "1.0"))
        reply = b""
        while piece := connection.recv(1 << 16):
            reply += piece
    head, _, old = reply.partition(b"\r\n\r\n")
    assert b"200" in head.splitlines()[0]
    assert b"transfer-encoding" not in head.lower()
    with connect(server) as connection:
        _, chunks = ask(connection, h11.Connection(h11.CLIENT), path)
    assert without_what_changes(old) == without_what_changes(b"".join(chunks))
