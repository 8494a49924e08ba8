"""What a client sends cannot forge a line of the log, end one, or colour it."""

from __future__ import annotations

import io
import logging

import pytest
import structlog

from server.logs import configure
from tests.hostile.case import request

HOSTILE = "/adapters/a%0d%0a2026-01-01T00:00:00Z%20[error]%20forged%1b%5b31m%e2%80%ae"


def test_a_path_stays_on_its_line(unharmed):
    before = len(unharmed.log.read_text())
    request("GET", HOSTILE)(unharmed)
    request("GET", "/info", headers={"x-request-id": "a b\tforged=1", "user-agent": "forged"})(
        unharmed
    )
    written = unharmed.log.read_text()[before:]
    assert all(line.isprintable() for line in written.split("\n"))
    assert [line for line in written.split("\n") if line.startswith("2026-01-01")] == []
    assert written.count("forged") == 1  # in the path, escaped


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_both_formats_write_one_line_an_event(log_format, monkeypatch):
    words = io.StringIO()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr("sys.stderr", words)
    try:
        configure(log_format, "info")
        structlog.get_logger("test").info("request", path="/a\r\nforged\x1b[31m\u202e\0")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    assert len(words.getvalue().splitlines()) == 1
    assert words.getvalue().rstrip("\n").isprintable()
