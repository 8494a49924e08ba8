"""`graftwork jobs` against a data directory with jobs in several states."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.jobs.store import JobStore
from tests.server.jobs.examples import ROWS, a_job


def run(*arguments: object):
    words = ["jobs", *(str(argument) for argument in arguments)]
    return CliRunner().invoke(app, words, env={"COLUMNS": "200"})


@pytest.fixture
def store(tmp_path):
    store = JobStore(tmp_path)
    yield store
    store.close()


@pytest.fixture
def running(store) -> tuple[str, object]:
    """The oldest job, which runs at step 3 of 8; another waits."""
    job_id = store.create(a_job("first"), ROWS).id
    store.create(a_job("[second]"), ROWS)
    claim = store.claim(60)
    store.add_event(claim, "step", {"step": 3, "max_steps": 8, "loss": 0.123456789})
    (store.directory(job_id) / "log.txt").write_text("one\ntwo\nthree é\n", encoding="utf-8")
    return job_id, claim


def test_list_shows_the_newest_first(store, running, tmp_path):
    shown = run("list", "--data-dir", tmp_path).output
    assert shown.index("[second]") < shown.index("first")
    assert "3 of 8" in shown
    listed = json.loads(run("list", "--data-dir", tmp_path, "--json").output)
    assert [(one["adapter"], one["state"]) for one in listed] == [
        ("[second]", "queued"),
        ("first", "running"),
    ]
    part = run("list", "--data-dir", tmp_path, "--json", "--offset", 1, "--limit", 1)
    assert [one["id"] for one in json.loads(part.output)] == [running[0]]


def test_show_tells_what_is_done(store, running, tmp_path):
    shown = run("show", running[0], "--data-dir", tmp_path).output
    assert "Text : {text} Label :" in shown
    told = json.loads(run("show", running[0], "--data-dir", tmp_path, "--json").output)
    assert (told["state"], told["progress"]["step"], told["labels"]) == ("running", 3, ["a", "b"])


def test_cancel_ends_what_waits_and_asks_what_runs(store, running, tmp_path):
    job_id, claim = running
    waiting = store.list()[0].id
    assert f"{waiting} is cancelled" in run("cancel", waiting, "--data-dir", tmp_path).output
    assert "about to stop" in run("cancel", job_id, "--data-dir", tmp_path).output
    assert store.renew(claim, 60) is True
    store.finish(claim, "cancelled")
    assert f"{job_id} is cancelled" in run("cancel", job_id, "--data-dir", tmp_path).output


def test_log_prints_the_end_or_all_of_it(store, running, tmp_path):
    assert run("log", running[0], "--data-dir", tmp_path).output == "one\ntwo\nthree é\n"
    assert run("log", running[0], "--data-dir", tmp_path, "--tail", 1).output == "three é\n"
    assert run("log", store.list()[0].id, "--data-dir", tmp_path).output == ""


def test_events_replay_from_an_id(store, running, tmp_path):
    lines = run("events", running[0], "--data-dir", tmp_path).output.splitlines()
    assert [line.split()[2] for line in lines] == ["state", "state", "step"]
    assert lines[2].endswith("step 3  max_steps 8  loss 0.1235")
    later = run("events", running[0], "--data-dir", tmp_path, "--after", 2, "--json").output
    event = json.loads(later)
    assert (event["id"], event["kind"], event["data"]["loss"]) == (3, "step", 0.123456789)


def test_events_follow_a_job_to_its_end(store, running, tmp_path: Path):
    job_id, claim = running

    def end() -> None:
        other = JobStore(tmp_path)
        other.add_event(claim, "checkpoint", {"step": 5})
        other.finish(claim, "succeeded", adapter_version=1)
        other.close()

    timer = threading.Timer(0.3, end)
    timer.start()
    shown = run("events", job_id, "--data-dir", tmp_path, "--follow", "--json")
    timer.join()
    events = [json.loads(line) for line in shown.output.splitlines()]
    assert [event["id"] for event in events] == [1, 2, 3, 4, 5]
    assert events[-1]["data"] == {"state": "succeeded", "adapter_version": 1}


@pytest.mark.parametrize("command", ["show", "cancel", "log", "events"])
@pytest.mark.parametrize("job_id", ["job-" + "0" * 24, "../../etc"])
def test_an_unknown_job_is_told_in_a_sentence(store, tmp_path, command, job_id):
    refused = run(command, job_id, "--data-dir", tmp_path)
    assert refused.exit_code == 2
    assert job_id in refused.output


def test_a_data_directory_that_is_not_there_is_not_made(tmp_path):
    refused = run("list", "--data-dir", tmp_path / "no")
    assert refused.exit_code == 2
    assert not (tmp_path / "no").exists()
