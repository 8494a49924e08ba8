"""`graftwork jobs` with jobs in several states: in a data directory, and over a running server."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from server.cli import render
from server.cli.job_tables import EXPENDABLE, jobs_table
from server.store.jobs import JobStore
from tests.server.cli.runner import refusal, run_json
from tests.server.cli.runner import run as run_graftwork
from tests.server.conftest import make_settings
from tests.server.http_server import running_server
from tests.server.jobs.examples import EXAMPLES, a_job


def run(*arguments: object):
    return run_graftwork("jobs", *arguments)


@pytest.fixture(scope="module")
def idle(tiny_base, tmp_path_factory):
    """A server that runs no jobs itself."""
    data = tmp_path_factory.mktemp("jobs") / "data"
    with running_server(make_settings(tiny_base, data, train_workers=0)) as client:
        yield client, data


@pytest.fixture(params=["directory", "server"])
def place(request, tmp_path) -> tuple[Path, list[object]]:
    """A data directory without jobs, and the options that name it or its server."""
    if request.param == "directory":
        return tmp_path, ["--data-dir", tmp_path]
    client, data = request.getfixturevalue("idle")
    return data, ["--url", client.base_url]


@pytest.fixture
def where(place) -> list[object]:
    return place[1]


@pytest.fixture
def store(place):
    store = JobStore(place[0])
    yield store
    for record in store.list():
        store.cancel(record.id)
        if record.state == "running":
            store.finish(claims[record.id], "cancelled")
        store.delete(record.id)
    store.close()


# Of the jobs that a test runs, so that they can be ended.
claims: dict[str, object] = {}


@pytest.fixture
def running(store) -> tuple[str, object]:
    """The oldest job, which runs at step 3 of 8; another waits."""
    job_id = store.create(a_job("first"), EXAMPLES).id
    store.create(a_job("[second]"), EXAMPLES)
    claim = claims[job_id] = store.claim(60)
    store.add_event(claim, "step", {"step": 3, "max_steps": 8, "loss": 0.123456789})
    (store.directory(job_id) / "log.txt").write_text("one\ntwo\nthree é\n", encoding="utf-8")
    return job_id, claim


def test_list_shows_the_newest_first(store, running, where):
    shown = run("list", *where).output
    assert shown.index("[second]") < shown.index("first")
    assert "3 of 8" in shown
    listed = json.loads(run("list", *where, "--json").output)
    assert [(one["adapter"], one["state"]) for one in listed] == [
        ("[second]", "queued"),
        ("first", "running"),
    ]
    part = run("list", *where, "--json", "--offset", 1, "--limit", 1)
    assert [one["id"] for one in json.loads(part.output)] == [running[0]]


def test_a_job_is_named_by_its_adapter_and_the_newest_is_meant(store, running, where):
    newer = store.create(a_job("first"), EXAMPLES).id
    assert run_json("jobs", "show", "first", *where)["id"] == newer
    assert run("log", "first", *where).output == ""
    assert f"{newer} is cancelled" in run("cancel", "first", *where).output
    assert run("events", "first", *where).output.splitlines()[-1].endswith("state cancelled")
    assert run_json("jobs", "remove", "first", *where) == {"id": newer, "deleted": True}
    assert run_json("jobs", "show", "first", *where)["id"] == running[0]
    told = refusal("jobs", "show", "nobody", *where)
    nobody = "there is no training job 'nobody', and none of an adapter of that name"
    assert told == f"{nobody}; GET /train lists the jobs"
    assert refusal("jobs", "show", "firs", *where).endswith("; did you mean 'first'?")
    assert refusal("jobs", "show", "job-1", *where).endswith("'job-1'; GET /train lists the jobs")


def test_the_list_has_loss_accuracy_and_time(store, running, where):
    job_id, claim = running
    assert "0.1235" in run("list", *where).output
    evaluation = {"loss": 0.5, "accuracy": 0.75}
    store.finish(claim, "succeeded", metrics={"loss": 0.25, "steps": 8, "evaluation": evaluation})
    line = next(one for one in run("list", *where).output.splitlines() if job_id in one)
    words = line.split()
    assert words[1:4] == ["succeeded", "first", a_job().method]
    assert {"0.25", "0.750", "0:00"} <= set(words)


def test_a_narrow_terminal_gets_ids_and_names_whole(store, running, where, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(render, "out", terminal)
    jobs = run_json("jobs", "list", *where)
    render.print_table(jobs_table(jobs), expendable=EXPENDABLE)
    lines = terminal.file.getvalue().splitlines()
    for one in jobs:
        assert any(one["id"] in line and one["adapter"] in line for line in lines)
    assert any("3 of 8" in line for line in lines)
    assert any("not shown for want of width: created" in line for line in lines)
    assert all(Text.from_ansi(line).cell_len <= 80 for line in lines)


def test_a_pipe_gets_no_padding(store, running, where):
    ids = [one.id for one in store.list()]
    for words in (["list"], ["show", running[0]], ["compare", *ids]):
        lines = run(*words, *where).output.splitlines()
        assert all(line == line.rstrip() for line in lines)


def test_jobs_are_compared(store, running, where):
    job_id, claim = running
    store.finish(claim, "succeeded", metrics={"loss": 0.25, "evaluation": {"accuracy": 0.75}})
    compared = run_json("jobs", "compare", "first", store.list()[0].id, *where)
    assert compared["jobs"] == [job_id, store.list()[0].id]
    assert compared["settings"] == {"adapter": ["first", "[second]"]}
    assert compared["metrics"]["loss"] == [0.25, None]
    assert compared["metrics"]["evaluation accuracy"] == [0.75, None]
    shown = run("compare", *compared["jobs"], *where).output
    assert "[second]" in shown
    assert "evaluation accuracy" in shown
    assert "expected two jobs or more" in refusal("jobs", "compare", "first", *where)


def test_show_tells_what_is_done(store, running, where):
    shown = run("show", running[0], *where).output
    assert "Text : {text} Label :" in shown
    told = json.loads(run("show", running[0], *where, "--json").output)
    assert (told["state"], told["progress"]["step"], told["labels"]) == ("running", 3, ["a", "b"])


def test_cancel_ends_what_waits_and_asks_what_runs(store, running, where):
    job_id, claim = running
    waiting = store.list()[0].id
    assert f"{waiting} is cancelled" in run("cancel", waiting, *where).output
    assert "about to stop" in run("cancel", job_id, *where).output
    assert store.renew(claim, 60) is True
    store.finish(claim, "cancelled")
    ended = run("cancel", job_id, *where).output
    assert ended == f"{job_id} had ended before (cancelled); nothing was cancelled\n"


def test_log_prints_the_end_or_all_of_it(store, running, where):
    assert run("log", running[0], *where).output == "one\ntwo\nthree é\n"
    assert run("log", running[0], *where, "--tail", 1).output == "three é\n"
    assert run("log", store.list()[0].id, *where).output == ""


def test_events_replay_from_an_id(store, running, where):
    lines = run("events", running[0], *where).output.splitlines()
    assert [line.split()[2] for line in lines] == ["state", "state", "step"]
    assert lines[2].endswith("step 3  max_steps 8  loss 0.1235")
    later = run("events", running[0], *where, "--after", 2, "--json").output
    event = json.loads(later)
    assert (event["id"], event["kind"], event["data"]["loss"]) == (3, "step", 0.123456789)


def test_events_follow_a_job_to_its_end(store, running, place):
    job_id, claim = running

    def end() -> None:
        other = JobStore(place[0])
        other.add_event(claim, "checkpoint", {"step": 5})
        other.finish(claim, "succeeded", adapter_version=1)
        other.close()

    timer = threading.Timer(0.3, end)
    timer.start()
    shown = run("events", job_id, *place[1], "--follow", "--json")
    timer.join()
    events = [json.loads(line) for line in shown.output.splitlines()]
    assert [event["id"] for event in events] == [1, 2, 3, 4, 5]
    assert events[-1]["data"] == {"state": "succeeded", "adapter_version": 1}


@pytest.mark.parametrize("command", ["show", "cancel", "log", "events", "remove"])
@pytest.mark.parametrize("job_id", ["job-" + "0" * 24, "../../etc"])
def test_an_unknown_job_is_told_in_a_sentence(store, where, command, job_id):
    told = refusal("jobs", command, job_id, *where)
    assert told.startswith("there is no training job")
    assert job_id in told


def test_what_changes_a_job_is_told_as_json(store, running, where):
    waiting = store.list()[0].id
    assert "is queued; cancel it" in refusal("jobs", "remove", waiting, *where)
    assert run_json("jobs", "cancel", waiting, *where)["state"] == "cancelled"
    assert run_json("jobs", "remove", waiting, *where) == {"id": waiting, "deleted": True}
    assert [record.id for record in store.list()] == [running[0]]
    asked = run_json("jobs", "cancel", running[0], *where)
    assert (asked["state"], asked["cancel_requested"]) == ("running", True)
    assert run_json("jobs", "log", running[0], *where)["log"].endswith("three é\n")


def test_events_of_a_job_that_tells_more_all_the_time_come_to_an_end(store, running, where):
    job_id, claim = running
    done = threading.Event()

    def tell() -> None:
        for step in range(4, 200):
            store.add_event(claim, "step", {"step": step, "max_steps": 200, "loss": 1.0})
            if done.wait(0.05):
                return

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        lines = run("events", job_id, *where).output.splitlines()
    finally:
        done.set()
        teller.join()
    assert 3 <= len(lines) < 190


def test_a_data_directory_that_is_not_there_is_not_made(tmp_path):
    assert "no data directory" in refusal("jobs", "list", "--data-dir", tmp_path / "no")
    assert not (tmp_path / "no").exists()
