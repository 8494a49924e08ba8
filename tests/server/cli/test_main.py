"""The command line, run as a newcomer runs it."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from typing import Any

import httpx
import pytest
import typer

from adapters.training.provenance import Provenance
from server.cli.demo import curl_line
from server.cli.main import app
from server.config.settings import Settings
from server.demo.install import DemoAdapter
from server.store.data_dir import held_by_server
from tests.documentation import hooks
from tests.server.cli.runner import refusal, run, run_json
from tests.server.jobs.examples import a_job


def commands(group=None, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every command by its words."""
    group = typer.main.get_command(app) if group is None else group
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, (*path, name))
        else:
            found[" ".join((*path, name))] = command
    return found


# They run until they are stopped, and print log lines.
SERVICES = {"serve", "worker"}
VERBS = (
    "serve generate eval train worker bench doctor settings demo "
    "adapters:list,add,show,remove,rollback,alias,download,preload,unload,combine,merge "
    "jobs:list,show,compare,cancel,remove,log,events keys:create,list,revoke"
)


def test_every_verb_is_there():
    words = set()
    for verb in VERBS.split():
        name, _, inner = verb.partition(":")
        words |= {f"{name} {one}" for one in inner.split(",")} if inner else {name}
    assert set(commands()) == words


@pytest.mark.parametrize("words", sorted(commands()))
def test_every_command_has_help_with_an_example(words):
    command = commands()[words]
    text = run(*words.split(), "--help").output
    assert f"graftwork {words}" in text.split("Options")[0].split("Usage", 1)[1].split("\n", 1)[1]
    assert all(one.opts[0] in text for one in command.params if one.opts[0].startswith("-"))


@pytest.mark.parametrize("words", ["", *sorted(commands()), "adapters", "jobs", "keys"])
def test_help_fits_a_terminal_of_80_columns(words):
    result = run(*words.split(), "--help", COLUMNS="80")
    assert result.exit_code == 0
    assert [line for line in result.output.splitlines() if len(line) > 80] == []
    # Nothing is cut, no markup is left, and an example stays on lines of its own.
    assert "..." not in re.sub(r"[A-Z}\]]\.\.\.", "", result.output)
    assert not re.search(r"\[/?(dim|bold)\]|\x08", result.output)
    if words in commands():
        assert re.search(rf"^  graftwork {words}", result.output, re.MULTILINE)
        listed = {
            one.opts[0]: one for one in commands()[words].params if one.opts[0] in result.output
        }
        assert [flag for flag, one in listed.items() if not one.help] == []


def test_version_and_completion():
    assert run("--version").output == f"graftwork {version('graftwork')}\n"
    assert "--install-completion" in run("--help").output
    assert run("adapters", "add", "-h").output == run("adapters", "add", "--help").output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--learning-rates", "1"], "--learning-rate"),
        (["generate", "--max-token", "1"], "--max-new-tokens"),
        (["generate", "--model", "x"], "(Possible options: --adapter, --base)"),
        (["train", "--output_dir", "x"], "(Possible options: --out)"),
        (["jobs", "list", "--server", "x"], "(Possible options: --url)"),
        (["keys", "list", "--zzzz"], "No such option: --zzzz\n"),
        (["keys", "create"], "Missing options '--name' / '-n' and '--scope' / '-s'."),
        (["adapters", "alias"], "'NAME' and 'ALIAS'"),
        (["adapters", "delete", "x"], "No such command 'delete'. Did you mean 'remove'?"),
        (["predict"], "Did you mean 'generate'?"),
        (["version"], "Did you mean '--version'?"),
        (["jobs", "logs", "x"], "Did you mean 'log'?"),
        (["jobs", "follow", "x"], "Did you mean 'events'?"),
        (["generate", "-a", "x", "hello", "you"], "did you mean --prompt 'hello you'?"),
        (["train", "--method", "ia3", "--data", "a.csv", "b.csv"], "did you mean --data b.csv?"),
        (["serve", "--threads", "many"], "expected a whole number, came 'many'"),
        (["serve", "--dtype", "bf16"], "expected 'bfloat16', 'float32', 'float16'"),
        (["jobs", "list", "--limit", "0"], "expected a number of at least 1, came"),
        (["adapters", "rollback", "x", "one"], "expected a whole number, came 'one'"),
        (["adaptors", "list"], "Did you mean 'adapters'?"),
        (["adapters", "lst"], "Did you mean 'list'?"),
    ],
)
def test_a_mistyped_word_gets_the_word_that_was_meant(words, said):
    result = run(*words)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not re.search("Input should|Value error", result.stderr)


def test_an_option_may_be_typed_like_a_field():
    assert "missing.jsonl" in refusal(
        "train", "--method", "IA3", "--data", "missing.jsonl", "--learning_rate", "1", "--out", "x",
        "--if_exists", "new_version",
    )  # fmt: skip


def test_the_documentation_s_table_has_every_command_and_no_other():
    table = re.findall(r"^\| \[`([a-z ]+)`\]", hooks().command_table(), re.MULTILINE)
    assert sorted(table) == sorted(commands())


@pytest.mark.parametrize("words", sorted(set(commands()) - SERVICES))
def test_every_command_that_prints_has_json(words):
    assert "--json" in {option for one in commands()[words].params for option in one.opts}


def test_commands_that_look_at_something_print_json(server):
    url = ["--url", server.base_url]
    assert {one["name"] for one in run_json("adapters", "list", *url)} >= {"complaints", "other"}
    assert run_json("adapters", "show", "other", *url)["name"] == "other"
    assert isinstance(run_json("jobs", "list", *url), list)
    names = {one["variable"] for one in run_json("settings")}
    assert names == {f"GRAFTWORK_{name.upper()}" for name in Settings.model_fields}


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


def test_refusals_are_never_wrapped_or_read_as_markup(tmp_path):
    long = tmp_path / ("x" * 120) / "[red]not red[/red]"
    told = refusal("adapters", "list", "--data-dir", long, COLUMNS="40")
    assert str(long) in told


def test_the_printed_curl_line_is_one_shell_command(tmp_path):
    job = a_job(template="Text: {text} Label:")
    demo = DemoAdapter("c", tmp_path, Provenance(job, {}, {}))
    words = shlex.split(curl_line("0.0.0.0", 8000, demo))
    assert words[2] == "http://127.0.0.1:8000/generate?adapter=c"
    assert json.loads(words[-1])["inputs"].endswith(" Label:")


@pytest.mark.slow
def test_a_port_in_use_is_named_with_its_option(tiny_base, tmp_path):
    command = [sys.executable, "-m", "server", "serve", "--base", str(tiny_base)]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command += ["--data-dir", str(tmp_path / "data"), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    told = " ".join(done.stderr.split())
    assert f"port {port} of 127.0.0.1 is in use" in told
    assert "--port" in told


@pytest.mark.slow
def test_serve_refuses_a_data_directory_that_a_server_of_another_base_uses(tiny_base, tmp_path):
    command = [sys.executable, "-m", "server", "serve", "--base", str(tiny_base), "--port", "0"]
    command += ["--data-dir", str(tmp_path), "--threads", "1", "--kv-mib", "16"]
    with held_by_server(tmp_path, "other", "f" * 64):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "a server of another base, other (ffffffffffff)" in done.stderr
    assert "Traceback" not in done.stderr


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
