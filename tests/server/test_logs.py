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
    lines = capfd.readouterr().err.splitlines()
    assert not any(SECRET in line for line in lines)
    requests = [json.loads(line) for line in lines if '"event": "request"' in line]
    generated = [one for one in requests if one["path"] == "/generate"]
    assert [one["status"] for one in generated] == [200, 422, 422]
    assert generated[0]["adapter"] == "tiny-base"


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
