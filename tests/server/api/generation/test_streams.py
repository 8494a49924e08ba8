"""Clients that go away, adapters that are replaced, many at once, and other people's clients."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time

import httpx
import pytest
from huggingface_hub import InferenceClient

from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter, upload

LONG = {"max_new_tokens": 400, "ignore_eos": True}


def engine(client) -> dict:
    return client.get("/info").json()["engine"]


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def raw_post(client, path, body) -> socket.socket:
    url = client.base_url
    connection = socket.create_connection((url.host, url.port))
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    )
    connection.sendall(head.encode() + payload)
    return connection


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_goes_away_frees_its_row(server, path):
    body = {"inputs": "x", "parameters": LONG}
    connections = [raw_post(server, path, body) for _ in range(3)]
    wait_until(lambda: engine(server)["num_running"] > 0)
    for connection in connections:
        connection.close()
    began = time.monotonic()
    wait_until(lambda: engine(server)["num_running"] + engine(server)["num_waiting"] == 0)
    assert time.monotonic() - began < 5
    wait_until(lambda: server.app_services().client.num_in_flight == 0)


def test_a_stream_ends_on_the_version_it_began_with(server, tmp_path):
    upload(server, save_prefix_adapter(tmp_path / "v1", seed=21), "moving")
    body = {"inputs": "x", "parameters": {**LONG, "max_new_tokens": 300}}
    want = server.post("/generate?adapter=moving", json=body).json()["generated_text"]
    with server.stream("POST", "/generate_stream?adapter=moving", json=body) as reply:
        assert reply.headers["x-adapter-version"] == "1"
        lines = reply.iter_lines()
        next(lines)
        new = upload(server, save_prefix_adapter(tmp_path / "v2", seed=22), "moving")
        assert new.json()["version"] == 2
        assert server.delete("/adapters/moving").status_code == 200
        last = json.loads([line for line in lines if line][-1].removeprefix("data:"))
    assert last["generated_text"] == want
    assert server.post("/generate?adapter=moving", json=body).status_code == 404


async def test_many_at_once_give_what_each_gives_alone(server):
    """Streamed and not, over adapters and the base, joining at random times."""
    chosen = random.Random(0)
    cases = [
        (
            chosen.choice(["", "?adapter=complaints", "?adapter=other"]),
            {
                "inputs": "the tweet"[: chosen.randint(1, 9)] * chosen.randint(1, 4),
                "parameters": {
                    "max_new_tokens": chosen.randint(1, 30),
                    "do_sample": chosen.random() < 0.5,
                    "seed": chosen.randint(0, 99),
                },
            },
        )
        for _ in range(24)
    ]
    alone = [server.post("/generate" + query, json=body).json() for query, body in cases]

    async def ask(client, query, body):
        await asyncio.sleep(chosen.random() * 0.2)
        if chosen.random() < 0.5:
            return (await client.post("/generate" + query, json=body)).json()["generated_text"]
        reply = await client.post("/generate_stream" + query, json=body)
        last = reply.text.strip().split("\n\n")[-1]
        return json.loads(last.removeprefix("data:"))["generated_text"]

    async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as client:
        together = await asyncio.gather(*(ask(client, *case) for case in cases))
    assert together == [one["generated_text"] for one in alone]


async def test_a_request_with_an_adapter_waits_for_no_long_text(server):
    """Long texts are tokenised meanwhile; what became of the name is read from the database anew."""
    ended: list[str] = []
    began = asyncio.Event()

    async def long(client, number):
        began.set()
        reply = await client.post("/tokenize", json={"prompt": f"{number} the tweet " * 10_000})
        assert reply.status_code == 200
        ended.append(f"long-{number}")

    async with httpx.AsyncClient(base_url=server.base_url, timeout=120) as client:
        texts = [asyncio.create_task(long(client, number)) for number in range(24)]
        await began.wait()
        await asyncio.sleep(0.2)  # on their way
        alias = await client.put("/adapters/complaints/aliases/now", json={"version": 1})
        assert alias.status_code == 200
        body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
        reply = await client.post("/generate?adapter=complaints@now", json=body)
        assert reply.headers["x-adapter-id"] == "complaints"
        ended.append("short")
        await asyncio.gather(*texts)
    assert ended.index("short") < 8, ended


def test_streams_never_hold_half_a_character(server):
    for seed in range(6):
        parameters = {"do_sample": True, "temperature": 3.0, "seed": seed, "max_new_tokens": 40}
        body = {"inputs": "x", "parameters": parameters}
        reply = server.post("/generate_stream", json=body)
        events = [json.loads(f.removeprefix("data:")) for f in reply.text.split("\n\n")[:-1]]
        texts = [event["token"]["text"] for event in events if not event["token"]["special"]]
        assert "".join(texts) == events[-1]["generated_text"]


def test_hugging_faces_own_client(server):
    client = InferenceClient(str(server.base_url))
    plain = client.text_generation("the tweet", max_new_tokens=8)
    body = {"inputs": "the tweet", "parameters": {"max_new_tokens": 8}}
    assert plain == server.post("/generate", json=body).json()["generated_text"]
    adapted = client.text_generation("the tweet", max_new_tokens=8, adapter_id="complaints")
    assert adapted != plain
    details = client.text_generation(
        "the tweet", max_new_tokens=8, details=True, decoder_input_details=True, top_n_tokens=2
    )
    assert details.details.generated_tokens == len(details.details.tokens)
    streamed = "".join(
        client.text_generation("the tweet", max_new_tokens=8, adapter_id="complaints", stream=True)
    )
    assert streamed == adapted
    events = list(client.text_generation("x", max_new_tokens=4, details=True, stream=True))
    assert events[-1].details.finish_reason == "length"
    with pytest.raises(Exception, match="nobody"):
        client.text_generation("x", adapter_id="nobody")


def test_a_full_queue_is_429_with_a_time(tiny_base, tmp_path):
    settings = make_settings(tiny_base, tmp_path / "data", max_running=1, max_queued=1)
    with running_server(settings) as client:
        body = {"inputs": "x", "parameters": LONG}
        connections = [raw_post(client, "/generate", body) for _ in range(2)]
        wait_until(lambda: client.app_services().client.num_in_flight == 2)
        reply = client.post("/generate", json=body)
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json()["error_type"] == "overloaded"
        for connection in connections:
            connection.close()


def test_a_dead_engine_is_503_and_the_server_still_answers(tiny_base, tmp_path):
    with running_server(make_settings(tiny_base, tmp_path / "data")) as client:
        body = {"inputs": "x", "parameters": LONG}
        with client.stream("POST", "/generate_stream", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            client.app_services().client._engine.kill()
            last = json.loads([line for line in lines if line][-1].removeprefix("data:"))
        assert last["error_type"] == "unavailable"
        wait_until(lambda: client.get("/readyz").status_code == 503)
        reply = client.post("/generate", json=body)
        assert reply.status_code == 503
        assert reply.headers["retry-after"]
        assert client.get("/livez").status_code == 200
        assert client.get("/adapters").status_code == 200
