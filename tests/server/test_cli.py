"""The command line, run as a newcomer runs it."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
import urllib.request

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app
from server.demo.install import DemoAdapter
from server.provenance import Provenance
from server.settings import Settings
from server.showcase import curl_line
from tests.server.http_server import save_prefix_adapter
from tests.server.jobs.examples import a_job

WIDE = {"COLUMNS": "200"}


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env=WIDE)


def test_help_tells_every_option():
    text = run("serve", "--help").output
    for option in ("--base", "--revision", "--data-dir", "--host", "--port", "--dtype", "--device"):
        assert option in text
    assert "GRAFTWORK_PORT" in text


def test_settings_lists_every_setting():
    text = run("settings").output
    assert all(f"GRAFTWORK_{name.upper()}" in text for name in Settings.model_fields)


def test_a_wrong_option_is_told_in_a_sentence():
    result = run("serve", "--port", "70000")
    assert result.exit_code == 2


def test_adapters_add_and_list(tiny_base, tmp_path):
    folder = save_prefix_adapter(tmp_path / "mine")
    data = str(tmp_path / "data")
    added = run("adapters", "add", str(folder), "--base", str(tiny_base), "--data-dir", data)
    assert "mine@1 registered" in added.output
    assert "PREFIX_TUNING" in run("adapters", "list", "--data-dir", data).output
    (folder / "adapter_config.json").write_text("{}")
    refused = run("adapters", "add", str(folder), "--base", str(tiny_base), "--data-dir", data)
    assert refused.exit_code == 2


def test_the_printed_curl_line_is_one_shell_command(tmp_path):
    job = a_job(template="Text: {text} Label:")
    demo = DemoAdapter("c", tmp_path, Provenance(job, {}, {}))
    words = shlex.split(curl_line("0.0.0.0", 8000, demo))
    assert words[2] == "http://127.0.0.1:8000/generate?adapter=c"
    assert json.loads(words[-1])["inputs"].endswith(" Label:")


@pytest.mark.slow
def test_serve_comes_up_answers_and_goes_down(tiny_base, tmp_path):
    command = [sys.executable, "-m", "server", "serve", "--base", str(tiny_base), "--port", "0"]
    command += ["--data-dir", str(tmp_path / "data"), "--threads", "1", "--kv-mib", "16"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        url = ""
        end = time.monotonic() + 120
        while not url and time.monotonic() < end:
            line = process.stderr.readline()
            if " on http://" in line:
                url = line.split(" on ")[1].split(",")[0].strip()
        _wait_ready(url)
        body = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
        reply = httpx.post(f"{url}/generate", json=body)
        assert reply.status_code == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0


def _wait_ready(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/readyz"):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)
