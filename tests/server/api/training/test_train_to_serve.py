"""From rows to answers: `POST /train` on a server that runs its jobs, and what then serves."""

from __future__ import annotations

import json
import math

import pytest

from tests.server.conftest import make_settings
from tests.server.http_server import running_server

LABELS = ["complaint", "no complaint"]
WORDS = [("late", 0), ("broken", 0), ("lost", 0), ("great", 1), ("lovely", 1), ("quick", 1)]
ROWS = [
    {"tweet": f"it was {word} {when}", "Label": LABELS[which]}
    for when in ("today", "again")
    for word, which in WORDS
]
JOB = {
    "method": "ia3",
    "template": "Tweet text : {tweet} Label :",
    "target": "Label",
    "labels": LABELS,
    "rows": ROWS,
    "hyperparameters": {"epochs": 3, "validation_split": 0.25, "batch_size": 4},
}


@pytest.fixture(scope="module")
def training(tiny_base, tmp_path_factory):
    data = tmp_path_factory.mktemp("training") / "data"
    with running_server(make_settings(tiny_base, data, train_threads=1)) as client:
        yield client


def events_of(client, job_id):
    """Follow a job to its end: (kind, data) of every event."""
    found = []
    with client.stream("GET", f"/train/{job_id}/events", timeout=120) as reply:
        for line in reply.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            if line.startswith("data: "):
                found.append((kind, json.loads(line.removeprefix("data: "))))
    return found


def trained(client, **changes):
    """A job that succeeded, and its events."""
    reply = client.post("/train", json={**JOB, **changes})
    assert reply.status_code == 202, reply.text
    events = events_of(client, reply.json()["id"])
    job = client.get(f"/train/{reply.json()['id']}").json()
    assert job["state"] == "succeeded", (job["error"], client.get(f"/train/{job['id']}/log").text)
    return job, events


@pytest.fixture(scope="module")
def tweets(training):
    """The adapter of that name: the job that made its first version, and the job's events."""
    return trained(training, adapter="tweets")


def test_from_rows_to_answers_without_a_restart(training, tweets):
    job, events = tweets
    kinds = [kind for kind, _ in events]
    assert kinds[0] == kinds[-1] == "state"
    steps = [data for kind, data in events if kind == "step"]
    numbers = [data["step"] for data in steps]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == steps[-1]["max_steps"]
    assert all(math.isfinite(data["loss"]) for data in steps)
    assert all(data["learning_rate"] >= 0 for data in steps)
    evaluations = [data for kind, data in events if kind == "evaluation"]
    assert {"loss", "accuracy", "macro_f1"} <= evaluations[-1].keys()
    assert events[-1][1]["state"] == "succeeded"
    assert job["adapter_version"] == 1
    assert job["metrics"]
    assert job["progress"]["step"] == steps[-1]["step"]
    assert training.get(f"/train/{job['id']}/log").status_code == 200

    adapter = training.get("/adapters/tweets").json()["versions"][0]
    assert adapter["job_id"] == job["id"]
    assert adapter["metrics"] == job["metrics"]
    assert adapter["recipe"]["hyperparameters"] == job["hyperparameters"]
    assert adapter["recipe"]["default_temperature"] == 0
    assert adapter["template"] == JOB["template"]
    assert adapter["labels"] == LABELS
    assert (adapter["target_separator"], adapter["append_eos"]) == (" ", True)
    assert adapter["tokenization"] == "boundary"
    assert adapter["base_digest"] == training.app_services().client.base.digest
    listed = training.get("/adapters").json()["adapters"]
    assert [one["name"] for one in listed if one["job_id"]] == ["tweets"]

    assert prompt_of_first_row(training, JOB, "tweets").endswith(" :")
    row = {"tweet": "it was late today"}
    ranked = training.post("/classify?adapter=tweets", json={"row": row}).json()
    assert list(ranked["scores"]) == LABELS

    # A job that is deleted leaves the adapter that came of it.
    assert training.delete(f"/train/{job['id']}").status_code == 200
    assert training.get("/adapters/tweets").json()["versions"][0]["job_id"] == job["id"]


def prompt_of_first_row(client, job, adapter):
    """Serve the first row that was trained on, whose tokens must be those of training."""
    preview = client.post("/train?dry_run=true", json={"adapter": "x", **job}).json()["preview"][0]
    reply = client.post(
        f"/generate?adapter={adapter}",
        json={
            "row": {"tweet": ROWS[preview["row"] - 1]["tweet"]},
            "parameters": {"max_new_tokens": 4, "decoder_input_details": True},
        },
    )
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-adapter-id"] == adapter
    prefill = reply.json()["details"]["prefill"]
    assert [token["id"] for token in prefill] == preview["ids"][: preview["num_prompt_tokens"]]
    return "".join(token["text"] for token in prefill)


def test_the_same_name_again_is_a_new_version_with_a_recipe_of_its_own(training, tweets):
    changes = {
        "template": "Tweet text : {tweet} Label : ",
        "tokenization": "as_written",
        "hyperparameters": {"max_steps": 1},
    }
    job, _ = trained(training, adapter="tweets", **changes)
    assert job["adapter_version"] == 2
    adapter = training.get("/adapters/tweets").json()
    assert (adapter["version"], adapter["tokenization"]) == (2, "as_written")
    first, second = adapter["versions"]
    assert first["recipe"]["hyperparameters"]["max_steps"] is None
    assert second["recipe"]["hyperparameters"]["max_steps"] == 1
    assert prompt_of_first_row(training, {**JOB, **changes}, "tweets").endswith(" : ")
    once = {**JOB, "adapter": "tweets", "if_exists": "error"}
    assert training.post("/train", json=once).status_code == 412


def test_a_running_job_is_cancelled(training):
    hyperparameters = {"max_steps": 1_000_000}
    job = {**JOB, "adapter": "never", "hyperparameters": hyperparameters}
    job_id = training.post("/train", json=job).json()["id"]
    with training.stream("GET", f"/train/{job_id}/events", timeout=120) as reply:
        lines = reply.iter_lines()
        next(line for line in lines if line == "event: step")
        assert training.post(f"/train/{job_id}/cancel").status_code == 202
        last = [json.loads(line[6:]) for line in lines if line.startswith("data: ")][-1]
    assert last["state"] == "cancelled"
    assert training.get("/adapters/never").status_code == 404
    assert training.post(f"/train/{job_id}/cancel").status_code == 200
