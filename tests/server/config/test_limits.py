"""Every limit on what a client may ask for: one case above it, with what is said, and one at it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from server.config.limits import Limits
from server.engine.client import EngineClient
from tests.server.conftest import make_settings
from tests.server.http_server import ServerClient, running_server, save_prefix_adapter, upload

LOW = {
    "max_body_mib": 1,
    "max_json_values": 200,
    "max_parts": 4,
    "max_field_kib": 1,
    "max_upload_mib": 2,
    "max_inflated_mib": 1,
    "max_tensors": 1,
    "max_virtual_tokens": 4,
    "max_prompt_characters": 200,
    "max_prompt_tokens": 20,
    "max_output_tokens": 8,
    "max_best_of": 2,
    "max_sequences": 4,
    "max_ranked": 6,
    "max_labels": 3,
    "max_aliases": 1,
    "max_messages": 3,
    "max_stops": 2,
    "max_stop_characters": 5,
    "max_logit_biases": 2,
    "max_data_mib": 1,
    "max_data_rows": 3,
    "max_queued_jobs": 1,
    "max_queued_jobs_mib": 1,
    "max_files": 2,
    "max_files_mib": 1,
}
# Asked of a server of their own, whose engine is held.
QUEUES = {"max_queued", "max_queued_per_adapter"}
Send = Callable[[httpx.Client], httpx.Response]
JOB = {"adapter": "made", "method": "ia3", "template": "{text}", "target": "label"}


@pytest.fixture(scope="module")
def low(tiny_base, tmp_path_factory) -> Iterator[ServerClient]:
    """A server with every limit very low, and the adapter `own`."""
    home = tmp_path_factory.mktemp("low")
    settings = make_settings(tiny_base, home / "data", train_workers=0, **LOW)
    with running_server(settings) as client:
        assert upload(client, save_prefix_adapter(home / "own"), "own").status_code == 201
        assert alias("first")(client).status_code == 200
        yield client


def complete(**changes: Any) -> Send:
    body = {"model": "tiny-base", "prompt": "a", "max_tokens": 1, **changes}
    return lambda client: client.post("/v1/completions", json=body)


def alias(name: str) -> Send:
    return lambda client: client.put(f"/adapters/own/aliases/{name}", json={"version": 1})


def classify(**changes: Any) -> Send:
    body = {"inputs": ["a"], "labels": ["x", "y"], **changes}
    return lambda client: client.post("/classify", json=body)


def chat(messages: int, parts: int = 1) -> Send:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}] * parts}
    body = {"model": "tiny-base", "messages": [message] * messages, "max_tokens": 1}
    return lambda client: client.post("/v1/chat/completions", json=body)


def prompt(text: str) -> Send:
    return lambda client: client.post("/tokenize", json={"inputs": text})


def text(inputs: str) -> Send:
    """On a route whose errors say their code."""
    return complete(prompt=inputs)


def adapter(fields: dict[str, str] | None = None, /, **tensors: torch.Tensor) -> Send:
    """An upload of these tensors in a zip, with a config that fits `prompt_embeddings`."""

    def send(client: httpx.Client) -> httpx.Response:
        rows = tensors["prompt_embeddings"]
        config = {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": len(rows),
            "token_dim": 16,
            "num_transformer_submodules": 1,
            "num_attention_heads": 2,
            "num_layers": 2,
            "prefix_projection": False,
            "encoder_hidden_size": 16,
        }
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("adapter_config.json", json.dumps(config))
            archive.writestr("adapter_model.safetensors", save(tensors))
        return client.post(
            "/adapters",
            data={"name": "sent", **(fields or {})},
            files=[("files", ("a.zip", packed.getvalue()))],
        )

    return send


def rows(number: int) -> torch.Tensor:
    return torch.ones(number, 64)


def form(**fields: str) -> Send:
    """An upload of good tensors with these fields beside them."""
    return lambda client: adapter(fields, prompt_embeddings=rows(4))(client)


def upload_of(size: int) -> Send:
    files = [("files", ("notes.bin", b"x" * size))]
    return lambda client: client.post("/adapters", data={"name": "sent"}, files=files)


def train(number: int, **changes: Any) -> Send:
    made = [{"text": f"a {place}", "label": "xy"[place % 2]} for place in range(number)]
    body = {**JOB, "rows": made, **changes}
    return lambda client: client.post("/train", params={"dry_run": True}, json=body)


def prefix_job(number: int) -> Send:
    return train(3, method="prefix_tuning", config={"num_virtual_tokens": number})


def train_file(size: int) -> Send:
    lines = "".join(
        json.dumps({"text": "a" * (place + 1), "label": label, "more": "x" * (size // 2 - 100)})
        + "\n"
        for place, label in enumerate("xy")
    )
    files = {"data": ("rows.jsonl", lines)}
    data = {"job": json.dumps(JOB)}
    return lambda client: client.post("/train", params={"dry_run": True}, data=data, files=files)


# What a client sees one above each limit: status, code, message.
ABOVE: list[tuple[str, Send, int, str, str]] = [
    (
        "max_body_mib",
        text("a" * 2**20),
        413,
        "body_too_large",
        "the body is larger than 1048576 bytes",
    ),
    (
        "max_json_values",
        complete(x=[1] * 175),
        413,
        "body_too_large",
        "body: expected at most 200 values, a field, list or object counting 4; came more",
    ),
    (
        "max_parts",
        form(description="a", labels='["x", "y"]', append_eos="true"),
        422,
        "invalid",
        "the form cannot be read: more than 4 parts",
    ),
    (
        "max_field_kib",
        form(description="a" * 1025),
        422,
        "invalid",
        "description: expected at most 1024 bytes, came more",
    ),
    (
        "max_upload_mib",
        upload_of(2 * 2**20),
        413,
        "body_too_large",
        "the body is larger than 2097152 bytes",
    ),
    (
        "max_inflated_mib",
        adapter(prompt_embeddings=rows(5000)),
        413,
        "checkpoint_too_large",
        "adapter_model.safetensors has 1280096 bytes, at most 1048576 are accepted",
    ),
    (
        "max_tensors",
        adapter(prompt_embeddings=rows(2), more=rows(1)),
        413,
        "checkpoint_too_large",
        "adapter_model.safetensors lists 2 tensors, at most 1 are accepted",
    ),
    (
        "max_virtual_tokens",
        adapter(prompt_embeddings=rows(5)),
        413,
        "checkpoint_too_large",
        "the adapter has 5 virtual tokens, at most 4 are accepted",
    ),
    (
        "max_virtual_tokens",
        prefix_job(5),
        422,
        "job_invalid",
        "config.num_virtual_tokens: too many virtual tokens; expected at most 4, came 5",
    ),
    (
        "max_prompt_characters",
        complete(prompt="a" * 201),
        422,
        "too_long",
        "prompt: expected at most 200 characters, came 201",
    ),
    (
        "max_prompt_tokens",
        complete(prompt=[5] * 21),
        422,
        "too_long",
        "prompt: expected at most 20 tokens, came 21",
    ),
    (
        "max_output_tokens",
        complete(max_tokens=9),
        422,
        "too_long",
        "max_tokens: expected at most 8 tokens, came 9",
    ),
    ("max_best_of", complete(n=3), 422, "invalid", "n: expected at most 2, came 3"),
    (
        "max_sequences",
        complete(prompt=["a"] * 3, n=2),
        422,
        "invalid",
        "prompt: 3 prompts with 2 samples each are 6 sequences; at most 4 are taken at once",
    ),
    (
        "max_sequences",
        complete(prompt=["a"] * 5),
        422,
        "invalid",
        "prompt: expected at most 4 values, came 5",
    ),
    (
        "max_ranked",
        classify(inputs=["a"] * 4),
        422,
        "invalid",
        "4 inputs with 2 labels each are 8 to rank; at most 6 are taken at once",
    ),
    (
        "max_ranked",
        classify(inputs=["a"] * 7, labels=["x"]),
        422,
        "invalid",
        "inputs: expected at most 6 values, came 7",
    ),
    (
        "max_labels",
        classify(inputs="a", labels=["x", "y", "z", "w"]),
        422,
        "invalid",
        "labels: expected at most 3 values, came 4",
    ),
    (
        "max_labels",
        form(labels='["x", "y", "z", "w"]'),
        422,
        "invalid",
        "labels: expected 2 to 3 different texts",
    ),
    (
        "max_aliases",
        alias("second"),
        422,
        "too_many_aliases",
        "'own' has 1 aliases, and the limit is 1; remove or move one of them",
    ),
    (
        "max_messages",
        chat(4),
        422,
        "invalid",
        "messages: expected at most 3 values, came 4",
    ),
    (
        "max_messages",
        chat(1, parts=4),
        422,
        "invalid",
        "messages.0.content: expected at most 3 values, came 4",
    ),
    (
        "max_stops",
        complete(stop=["x", "y", "z"]),
        422,
        "invalid",
        "stop: expected at most 2 values, came 3",
    ),
    (
        "max_stop_characters",
        complete(stop="x" * 6),
        422,
        "invalid",
        "stop.0: expected text of at most 5 characters, came ",
    ),
    (
        "max_logit_biases",
        complete(logit_bias={"5": 1, "6": 1, "7": 1}),
        422,
        "invalid",
        "logit_bias: expected at most 2 entries, came 3",
    ),
    (
        "max_data_mib",
        train_file(2**20 + 200),
        422,
        "data_invalid",
        "row 2 (line 2): expected at most 1048576 bytes of data, came more",
    ),
    ("max_data_rows", train(4), 422, "data_invalid", "there are more than 3 rows"),
]
# One below each, or just as much as may be.
WITHIN: list[tuple[str, Send]] = [
    ("max_body_mib", text("a" * (2**20 - 100))),
    ("max_json_values", complete(x=[1] * 174)),
    ("max_parts", form(description="a", labels='["x", "y"]')),
    ("max_field_kib", form(description="a" * 1024)),
    ("max_upload_mib", upload_of(2 * 2**20 - 1000)),
    ("max_inflated_mib", adapter(prompt_embeddings=rows(4))),
    ("max_tensors", adapter(prompt_embeddings=rows(4))),
    ("max_virtual_tokens", adapter(prompt_embeddings=rows(4))),
    ("max_virtual_tokens", prefix_job(4)),
    ("max_prompt_characters", prompt("a" * 200)),
    ("max_prompt_tokens", complete(prompt=[5] * 20)),
    ("max_output_tokens", complete(max_tokens=8)),
    ("max_best_of", complete(n=2)),
    ("max_sequences", complete(prompt=["a"] * 2, n=2)),
    ("max_ranked", classify(inputs=["a"] * 3)),
    ("max_labels", classify(inputs="a", labels=["x", "y", "z"])),
    ("max_labels", form(labels='["x", "y", "z"]')),
    ("max_aliases", alias("first")),  # moved
    ("max_messages", chat(3)),
    ("max_messages", chat(1, parts=3)),
    ("max_stops", complete(stop=["x", "y"])),
    ("max_stop_characters", complete(stop="x" * 5)),
    ("max_logit_biases", complete(logit_bias={"5": 1, "6": 1})),
    ("max_data_mib", train_file(2**20 - 200)),
    ("max_data_rows", train(3)),
]
# These requests are within their limit, and refused for what they are.
OTHERWISE = {
    "max_body_mib": "too_long",
    "max_upload_mib": "unsupported_file",
    "max_messages": "invalid",
}
# Asked below, each in a test of its own.
ALONE = QUEUES | {"max_queued_jobs", "max_queued_jobs_mib", "max_files", "max_files_mib"}
# Of callers with keys: see tests/server/api/keys.
PER_OWNER = {
    f"{name}_per_owner"
    for name in ("max_queued_jobs", "max_queued_jobs_mib", "max_files", "max_files_mib")
}


def told(reply: httpx.Response) -> tuple[str, str]:
    """Code and message, in whichever shape."""
    body = reply.json()
    error = body["error"] if isinstance(body["error"], dict) else {**body, "message": body["error"]}
    return error["code"], error["message"]


def test_every_limit_is_asked():
    fields = set(Limits.model_fields) - PER_OWNER
    assert {name for name, *_ in ABOVE} | ALONE == fields
    assert {name for name, _ in WITHIN} | ALONE == fields
    assert set(LOW) | QUEUES == fields


@pytest.mark.parametrize(
    ("name", "send", "status", "code", "message"), ABOVE, ids=[one[0] for one in ABOVE]
)
def test_above_the_limit(low, name, send, status, code, message):
    reply = send(low)
    assert reply.status_code == status, reply.text
    found, said = told(reply)
    assert found == code
    assert said.startswith(message)


@pytest.mark.parametrize(("name", "send"), WITHIN, ids=[one[0] for one in WITHIN])
def test_at_the_limit(low, name, send):
    reply = send(low)
    if name in OTHERWISE:
        assert told(reply)[0] == OTHERWISE[name]
        assert "at most 3" not in reply.text
    else:
        assert reply.status_code in (200, 201), reply.text


def test_output_is_cut_to_the_limit_where_none_is_asked_for(low):
    body = {"inputs": "a", "parameters": {"details": True, "ignore_eos": True}}
    assert low.post("/generate", json=body).json()["details"]["generated_tokens"] == 8


def test_files_are_limited_in_number_and_in_bytes(low):
    def send(size: int) -> httpx.Response:
        files = {"file": ("a.jsonl", b"x" * size)}
        return low.post("/v1/files", data={"purpose": "fine-tune"}, files=files)

    kept = [send(600_000).json()["id"]]
    reply = send(600_000)
    assert (reply.status_code, told(reply)[0]) == (413, "files_full")
    kept.append(send(10).json()["id"])
    reply = send(10)
    assert (reply.status_code, told(reply)[0]) == (413, "files_full")
    for one in kept:
        assert low.delete(f"/v1/files/{one}").status_code == 200
    reply = send(2**20 + 1)
    assert (reply.status_code, told(reply)[0]) == (413, "body_too_large")


def test_jobs_wait_up_to_the_limit(low):
    body = {**JOB, "rows": [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]}
    first = low.post("/train", json=body)
    assert first.status_code == 202
    reply = low.post("/train", json=body)
    assert (reply.status_code, told(reply)[0]) == (429, "too_many_jobs")
    assert int(reply.headers["retry-after"]) > 0
    low.post(f"/train/{first.json()['id']}/cancel")
    assert low.delete(f"/train/{first.json()['id']}").status_code == 200


# --- the queue ---------------------------------------------------------------------------------------


@pytest.fixture
def narrow(tiny_base, tmp_path) -> Iterator[ServerClient]:
    """Two requests at a time, three that wait, two in all for one adapter, 16 blocks for prefixes."""
    changes = {"max_running": 2, "max_queued": 3, "max_queued_per_adapter": 2}
    settings = make_settings(tiny_base, tmp_path / "data", train_workers=0, **changes)
    config = dataclasses.replace(settings.engine_config(), adapter_kv_share=16 / 4096)
    with running_server(settings, client=EngineClient(config)) as client:
        for seed, name in enumerate(("first", "second")):
            reply = upload(client, save_prefix_adapter(tmp_path / name, seed=seed), name)
            assert reply.status_code == 201
        yield client


@contextmanager
def held_engine(client: ServerClient) -> Iterator[None]:
    """Inside, the engine's process stands still: what is asked of it stays asked."""
    pid = client.app_services().client.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_for(client: ServerClient, number: int) -> None:
    end = time.monotonic() + 30
    while client.app_services().client.num_in_flight != number:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_one_adapter_does_not_take_the_queue(narrow):
    def ask(model: str) -> httpx.Response:
        body = {"model": model, "prompt": "a", "max_tokens": 1}
        return narrow.post("/v1/completions", json=body)

    with ThreadPoolExecutor() as threads, held_engine(narrow):
        waiting = []
        for model in ("first", "first@1", "second", "second", "tiny-base"):
            waiting.append(threads.submit(ask, model))
            wait_for(narrow, len(waiting))
            if len(waiting) == 2:
                full = ask("first")
        fuller = ask("tiny-base")
        os.kill(narrow.app_services().client.pid, signal.SIGCONT)
        # The others never noticed.
        assert [one.result().status_code for one in waiting] == [200] * 5
    assert (full.status_code, told(full)[0]) == (429, "adapter_overloaded")
    assert told(full)[1] == (
        "2 requests for the adapter 'first' run or wait, which is the limit; try again in 2 s"
    )
    assert full.headers["retry-after"] == "2"
    assert (fuller.status_code, told(fuller)[0]) == (429, "overloaded")
    assert int(fuller.headers["retry-after"]) > 0
    refused = 'graftwork_adapter_failures_total{adapter="first",code="adapter_overloaded"} 1.0'
    assert refused in narrow.get("/metrics").text
    assert ask("first").status_code == 200


def test_the_base_counts_as_an_adapter_and_samples_count_each(narrow):
    def ask(number: int) -> httpx.Response:
        body = {"inputs": ["a"], "labels": ["x", "y", "z"][:number]}
        return narrow.post("/classify", json=body)

    def sample() -> httpx.Response:
        body = {"model": "tiny-base", "prompt": ["a", "b"], "max_tokens": 1}
        return narrow.post("/v1/completions", json=body)

    with ThreadPoolExecutor() as threads, held_engine(narrow):
        waiting = [threads.submit(ask, 1), threads.submit(ask, 1)]
        wait_for(narrow, 2)
        full = sample()
        os.kill(narrow.app_services().client.pid, signal.SIGCONT)
        assert [one.result().status_code for one in waiting] == [200, 200]
    assert (full.status_code, told(full)[0]) == (429, "adapter_overloaded")
    assert told(full)[1].startswith("2 requests for the base run or wait")
    # More samples than may run at once follow one another.
    assert sample().status_code == 200
    assert ask(3).status_code == 200


def test_labels_that_find_no_place_wait_for_those_before_them(narrow):
    def ask(number: int) -> httpx.Response:
        body = {"inputs": ["a"], "labels": ["x", "y", "z"][:number]}
        return narrow.post("/classify", json=body)

    with ThreadPoolExecutor() as threads, held_engine(narrow):
        waiting = [threads.submit(ask, 1)]
        wait_for(narrow, 1)
        waiting.append(threads.submit(ask, 3))
        wait_for(narrow, 2)
        os.kill(narrow.app_services().client.pid, signal.SIGCONT)
        assert [one.result().status_code for one in waiting] == [200, 200]


def test_left_out_an_adapter_may_have_half_of_the_queue(tiny_base, tmp_path):
    settings = make_settings(tiny_base, tmp_path, max_running=4, max_queued=9)
    assert settings.engine_config().max_queued_per_adapter == 4 + 5


def test_an_adapter_that_no_request_could_use_is_refused_at_once(narrow):
    fits = adapter(prompt_embeddings=rows(16 * 16))(narrow)
    assert fits.status_code == 201, fits.text
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    assert narrow.post("/generate?adapter=sent", json=body).status_code == 200
    refused = adapter(prompt_embeddings=rows(16 * 16 + 1))(narrow)
    assert refused.status_code == 413, refused.text
    assert "at most 256 fit into the engine's memory for keys and values" in refused.text
    job = prefix_job(16 * 16 + 1)(narrow)
    assert job.status_code == 422, job.text
    assert "expected at most 256, came 257" in job.text
