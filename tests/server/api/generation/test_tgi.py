"""TGI's routes on a real server."""

from __future__ import annotations

import json

import pytest
import structlog
from starlette.requests import HTTPConnection

from server.api.middleware import headers


def frames(reply) -> list[dict]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("\n\n")
    return [json.loads(frame.removeprefix("data:")) for frame in reply.text.split("\n\n")[:-1]]


def generate(server, path="/generate", **parameters):
    query = parameters.pop("query", "")
    body = {"inputs": "the tweet", "parameters": {"max_new_tokens": 12, **parameters}}
    return server.post(path + query, json=body)


def test_the_base_and_an_adapter_answer_differently(server):
    base = generate(server)
    adapter = generate(server, query="?adapter=complaints")
    assert base.status_code == adapter.status_code == 200
    assert base.json()["generated_text"] != adapter.json()["generated_text"]
    assert base.headers["x-adapter-id"] == "tiny-base"
    assert adapter.headers["x-adapter-id"] == "complaints"
    assert adapter.headers["x-adapter-version"] == "1"
    assert int(adapter.headers["x-time-to-first-token"]) >= 0
    assert int(adapter.headers["x-queue-time"]) >= 0


def test_details_carry_tokens_prefill_and_top_tokens(server):
    reply = generate(server, details=True, decoder_input_details=True, top_n_tokens=3)
    details = reply.json()["details"]
    assert details["generated_tokens"] == len(details["tokens"]) == 12
    assert details["finish_reason"] == "length"
    assert details["seed"] is None
    assert details["prefill"][0]["logprob"] is None
    assert all(token["logprob"] <= 0 for token in details["prefill"][1:])
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) == 3
        assert top[0]["id"] == token["id"]
        assert top[0]["logprob"] == token["logprob"]
    texts = [token["text"] for token in details["tokens"] if not token["special"]]
    assert "".join(texts) == reply.json()["generated_text"]


def test_a_stream_says_what_the_whole_reply_says(server):
    whole = generate(server, details=True).json()
    events = frames(generate(server, "/generate_stream", details=True))
    assert [event["index"] for event in events] == list(range(1, 13))
    assert [event["token"]["id"] for event in events] == [
        token["id"] for token in whole["details"]["tokens"]
    ]
    assert all(event["generated_text"] is None for event in events[:-1])
    last = events[-1]
    assert last["generated_text"] == whole["generated_text"]
    assert last["details"] == {
        "finish_reason": "length",
        "generated_tokens": 12,
        "seed": None,
        "input_length": last["details"]["input_length"],
        "prompt_tokens": whole["details"]["prompt_tokens"],
    }


def test_stream_in_the_body_streams_from_generate_too(server):
    body = {"inputs": "x", "stream": True, "parameters": {"max_new_tokens": 2}}
    for path in ("/generate", "/"):
        assert len(frames(server.post(path, json=body))) == 2


def test_the_root_route_answers_a_list(server):
    assert generate(server, "/").json() == [generate(server).json()]


def test_a_stop_string_ends_the_output_and_stays_in_it(server):
    text = generate(server, max_new_tokens=20).json()["generated_text"]
    stop = text[5:8]
    end = text.index(stop) + len(stop)
    reply = generate(server, max_new_tokens=20, stop=[stop, "never there"], details=True).json()
    assert reply["generated_text"] == text[:end]
    assert reply["details"]["finish_reason"] == "stop_sequence"
    events = frames(generate(server, "/generate_stream", max_new_tokens=20, stop=[stop]))
    assert events[-1]["generated_text"] == text[:end]
    streamed = [event["token"]["text"] for event in events if not event["token"]["special"]]
    assert "".join(streamed) == text[:end]


def test_return_full_text_and_truncate(server):
    plain = generate(server).json()["generated_text"]
    assert generate(server, return_full_text=True).json()["generated_text"] == "the tweet" + plain
    cut = generate(server, truncate=1, details=True, decoder_input_details=True).json()
    assert len(cut["details"]["prefill"]) == 1


def test_sampling_reports_the_seed_that_repeats_it(server):
    first = generate(server, do_sample=True, temperature=1.5, details=True).json()
    seed = first["details"]["seed"]
    again = generate(server, do_sample=True, temperature=1.5, details=True, seed=seed).json()
    assert again == first
    # TGI samples where something that shapes sampling is given
    assert generate(server, temperature=1.5, details=True).json()["details"]["seed"] is not None
    greedy = generate(server, temperature=1.5, do_sample=False, details=True).json()
    assert greedy["details"]["seed"] is None


def test_best_of_returns_the_likeliest_sample(server):
    reply = generate(server, do_sample=True, seed=1, best_of=3, details=True).json()

    def mean(details):
        return sum(token["logprob"] for token in details["tokens"]) / len(details["tokens"])

    others = reply["details"]["best_of_sequences"]
    assert len(others) == 2
    assert all(mean(reply["details"]) >= mean(other) for other in others)
    assert {reply["details"]["seed"], *(other["seed"] for other in others)} == {1, 2, 3}


def test_a_row_is_rendered_by_the_stored_template(server):
    row = {"row": {"Tweet text": "late again"}, "parameters": {"max_new_tokens": 5}}
    rendered = {
        "inputs": "Tweet text : late again Label :",
        "parameters": {"max_new_tokens": 5},
    }
    by_row = server.post("/generate?adapter=complaints", json=row)
    by_text = server.post("/generate?adapter=complaints", json=rendered)
    assert by_row.status_code == 200
    assert by_row.json() == by_text.json()
    assert server.post("/generate?adapter=other", json=row).status_code == 422
    assert server.post("/generate", json=row).status_code == 422
    wrong = {"row": {"Tweet": "late"}}
    assert "'Tweet text'" in server.post("/generate?adapter=complaints", json=wrong).json()["error"]


@pytest.mark.parametrize("name", ["complaints", "complaints@1"])
def test_an_adapter_may_be_named_in_the_parameters(server, name):
    by_query = generate(server, query=f"?adapter={name}").json()
    assert generate(server, adapter_id=name).json() == by_query
    both = generate(server, query=f"?adapter={name}", adapter_id=name)
    assert both.status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate?adaptor=complaints", {}),
        ("/generate?adapter=", {}),
        ("/generate?adapter=complaints&adapter=other", {}),
        ("/generate?adapter=complaints", {"parameters": {"adapter_id": "other"}}),
        ("/generate", {"parameters": {"adapter_id": ""}}),
        ("/generate", {"adapter": "complaints"}),
        ("/generate", {"adapter_name": None}),
        ("/generate", {"adapter_id": "complaints"}),
        ("/generate", {"adapters": ["complaints"]}),
        ("/generate", {"lora": "complaints"}),
        ("/generate", {"model": "complaints"}),
        ("/generate", {"parameters": {"adapter": "complaints"}}),
        ("/generate", {"parameters": {"model": "complaints"}}),
        ("/generate", {"row": {"a": "b"}}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_base_never_answers_in_silence(server, path, body, stream):
    reply = server.post(path, json={"inputs": "x", "stream": stream, **body})
    assert reply.status_code == 400
    assert set(reply.json()) == {"error", "error_type"}
    assert reply.headers["x-request-id"]
    assert reply.headers["x-adapter-id"] == "-"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"inputs": ""}, "inputs"),
        ({"inputs": None}, "inputs"),
        ({"inputs": 5}, "inputs"),
        ({"inputs": "x " * 2000}, "inputs"),
        ({"parameters": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"parameters": {"max_new_tokens": 10**30}}, "max_new_tokens"),
        ({"parameters": {"max_new_tokens": 100_000}}, "max_new_tokens"),
        ({"parameters": {"max_new_tokens": "5"}}, "max_new_tokens"),
        ({"parameters": {"max_new_tokens": True}}, "max_new_tokens"),
        ({"parameters": {"temperature": 0}}, "temperature"),
        ({"parameters": {"temperature": -1.0}}, "temperature"),
        ({"parameters": {"top_p": 0}}, "top_p"),
        ({"parameters": {"top_p": 1.5}}, "top_p"),
        ({"parameters": {"stop": [""]}}, "stop"),
        ({"parameters": {"stop": ["a"] * 17}}, "stop"),
        ({"parameters": {"best_of": 2}}, "best_of"),
        ({"parameters": {"best_of": 1000, "do_sample": True}}, "best_of"),
        ({"parameters": {"seed": -1}}, "seed"),
        ({"parameters": {"truncate": 0}}, "truncate"),
        ({"parameters": {"top_n_tokens": 1000}}, "top_n_tokens"),
        ({"parameters": [1]}, "parameters"),
        ({"stream": True, "parameters": {"decoder_input_details": True}}, "decoder_input_details"),
        ({"stream": True, "parameters": {"best_of": 2, "do_sample": True}}, "best_of"),
    ],
)
def test_what_is_out_of_range_is_refused_with_its_field(server, changes, field):
    reply = server.post("/generate", json={"inputs": "x", **changes})
    assert reply.status_code == 422, reply.text
    body = reply.json()
    assert set(body) == {"error", "error_type"}
    assert body["error_type"] == "validation"
    assert field in body["error"]


def test_bodies_that_are_not_json(server):
    def post(content, kind="application/json"):
        return server.post("/generate", content=content, headers={"content-type": kind})

    assert post(b"{").status_code == 422
    assert post(b"[]").status_code == 422
    assert post(b"").status_code == 422
    assert post(b'{"inputs": "\\ud800"}').status_code == 422
    assert post(b'{"inputs": "x", "parameters": {"temperature": NaN}}').status_code == 422
    assert post(b'{"inputs": "x"}', "text/plain").status_code == 415
    assert post(b"[" * 100_000).status_code in (400, 422)
    assert post(b'{"inputs": "' + b"x" * (9 << 20) + b'"}').status_code == 413


def test_unknown_fields_are_named_in_a_header(server):
    body = {
        "inputs": "x",
        "extra": 1,
        "parameters": {"watermark": True, "nulled": None, "max_new_tokens": 1},
    }
    reply = server.post("/generate", json=body)
    assert reply.status_code == 200
    assert reply.headers["x-ignored-parameters"] == "extra, watermark"
    assert "x-did-you-mean" not in reply.headers
    body = {"inputs": "x", "max_new_tokens": 1, "parameters": {"max_tokens": 1, "temperatur": 1.0}}
    assert server.post("/generate", json=body).headers["x-did-you-mean"] == (
        "max_new_tokens: parameters.max_new_tokens, max_tokens: parameters.max_new_tokens, "
        "temperatur: parameters.temperature"
    )
    body = {"model": "other", "prompt": "x", "max_token": 1}
    meant = server.post("/v1/completions", json=body).headers["x-did-you-mean"]
    assert meant == "max_token: max_tokens"


def test_a_parameter_with_a_near_name_is_logged(monkeypatch):
    # The servers of these tests log faults only.
    captured = structlog.testing.LogCapture()
    level = structlog.make_filtering_bound_logger("warning")
    log = structlog.wrap_logger(None, processors=[captured], wrapper_class=level)
    monkeypatch.setattr(headers, "log", log)
    state = {"reply_headers": {"x-request-id": "r1"}}
    request = HTTPConnection({"type": "http", "path": "/generate", "state": state})
    known = {"max_new_tokens": "parameters.max_new_tokens"}
    headers.note_ignored(request, ["watermark"], known)
    headers.note_ignored(request, ["max_new_token"], known)
    (line,) = captured.entries
    assert (line["log_level"], line["request_id"]) == ("warning", "r1")
    assert line["did_you_mean"] == "max_new_token: parameters.max_new_tokens"


def test_an_unknown_adapter_is_404(server):
    for path in ("/generate", "/generate_stream", "/"):
        reply = generate(server, path, query="?adapter=nobody")
        assert reply.status_code == 404
        assert "nobody" in reply.json()["error"]
    assert generate(server, query="?adapter=complaints@7").status_code == 404


def test_a_sane_request_id_is_echoed_and_another_replaced(server):
    assert server.get("/livez", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == (
        "abc-1"
    )
    insane = server.get("/livez", headers={"x-request-id": "a b" * 100}).headers["x-request-id"]
    assert len(insane) == 32


def test_max_new_tokens_left_out_is_what_fits(server):
    limit = server.get("/info").json()["max_total_tokens"]
    body = {"inputs": "ab" * 500, "parameters": {"truncate": limit - 3, "details": True}}
    long = server.post("/generate", json=body).json()
    assert long["details"]["generated_tokens"] <= 3
    # A prompt that takes every position: the one new token takes none.
    body["parameters"]["truncate"] = limit - 1
    full = server.post("/generate", json=body).json()
    assert full["details"]["generated_tokens"] == 1
    short = generate(server, max_new_tokens=None, details=True, ignore_eos=True).json()
    assert short["details"]["generated_tokens"] == 64
