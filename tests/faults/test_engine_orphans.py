"""A server that is killed leaves no process behind: not its engine, not what that has started."""

from __future__ import annotations

import signal

import psutil

from tests.faults.storage_server import serving, wait_for
from tests.server.http_server import save_tiny_base

LONG = {"max_new_tokens": 480, "ignore_eos": True}
GUIDED = {"max_new_tokens": 8, "grammar": {"type": "regex", "value": "[a-z]{3,5}"}}


def test_a_server_that_is_killed_while_it_generates_leaves_no_process(tmp_path):
    base = save_tiny_base(tmp_path / "base")
    with serving(base, tmp_path / "data", tmp_path / "log") as served:
        reply = served.client.post("/generate", json={"inputs": "x", "parameters": GUIDED})
        assert reply.status_code == 200, reply.text
        body = {"inputs": "x", "parameters": LONG}
        with served.client.stream("POST", "/generate_stream", json=body) as stream:
            next(stream.iter_lines())
            children = psutil.Process(served.process.pid).children(recursive=True)
            commands = [" ".join(child.cmdline()) for child in children]
            assert any("spawn_main" in command for command in commands), commands
            assert any("grammar_check" in command for command in commands), commands
            served.process.send_signal(signal.SIGKILL)
            served.process.wait()

        def gone():
            return not any(
                child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children
            )

        wait_for(gone)
