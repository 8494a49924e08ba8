"""Logs tell what happened, and never what was said."""

from __future__ import annotations

import json

import structlog

from server.logs import configure
from tests.server.conftest import make_settings
from tests.server.http_server import running_server

SECRET = "zanzibar"


def test_no_log_line_holds_a_prompt(tiny_base, tmp_path, capfd):
    settings = make_settings(tiny_base, tmp_path / "data", log_level="debug", log_format="json")
    with running_server(settings) as client:
        good = {"inputs": SECRET, "parameters": {"max_new_tokens": 2, "return_full_text": True}}
        assert SECRET in client.post("/generate", json=good).text
        client.post("/generate_stream", json=good)
        client.post("/generate", json={"inputs": SECRET, "parameters": {"top_p": 7}})
        client.post("/generate", json={"inputs": [SECRET]})
        client.post("/tokenize", json={"inputs": SECRET})
        several = {"model": "tiny-base", "prompt": [SECRET, f"{SECRET} "], "n": 2, "max_tokens": 3}
        usage = client.post("/v1/completions", json={**several, "ignore_eos": True}).json()["usage"]
        several["stream"] = True
        client.post("/v1/completions", json={**several, "ignore_eos": True})
        ranked = {"inputs": [SECRET, f"{SECRET} "], "labels": ["a", "b", "c"]}
        client.post("/classify", json=ranked)
    lines = capfd.readouterr().err.splitlines()
    assert not any(SECRET in line for line in lines)
    requests = [json.loads(line) for line in lines if '"event": "request"' in line]
    generated = [one for one in requests if one["path"] == "/generate"]
    assert [one["status"] for one in generated] == [200, 422, 422]
    assert generated[0]["adapter"] == "tiny-base"
    for one in requests:
        if one["status"] != 200 or one["path"] in ("/tokenize", "/readyz", "/livez"):
            assert "prompt_tokens" not in one
            continue
        assert 0 <= one["queue_milliseconds"] <= one["first_token_milliseconds"]
        assert one["first_token_milliseconds"] <= one["milliseconds"] + 1
    whole, streamed = (one for one in requests if one["path"] == "/v1/completions")
    assert whole["prompt_tokens"] == streamed["prompt_tokens"] == usage["prompt_tokens"]
    assert whole["generated_tokens"] == streamed["generated_tokens"] == 12
    ranking = next(one for one in requests if one["path"] == "/classify")
    assert (ranking["labels_ranked"], ranking["prompt_tokens"]) == (6, usage["prompt_tokens"])
    assert "generated_tokens" not in ranking


def test_a_traceback_shows_no_local_variables(capsys):
    for log_format in ("console", "json"):
        configure(log_format, "info")
        try:
            prompt = SECRET
            raise ValueError(len(prompt))
        except ValueError:
            structlog.get_logger().exception("it_failed")
        written = capsys.readouterr().err
        assert "it_failed" in written
        assert "ValueError" in written
        assert SECRET not in written
