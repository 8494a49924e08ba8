"""`graftwork train --url` and `graftwork eval --url`: a running server does what is done without one."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from server.cli.evaluation import evaluate_remotely, stored_contestant
from server.cli.found_adapters import find_adapters
from server.cli.http_client import RemoteServer
from server.engine.offline import OfflineEngine
from tests.server.api.training.test_train_to_serve import LABELS, ROWS
from tests.server.cli.runner import refusal, run, run_json
from tests.server.conftest import make_settings

TEMPLATE = "Tweet text : {tweet} Label :"
WORDS = ["--template", TEMPLATE, "--target", "Label", "--labels", ",".join(LABELS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows of which every fourth is not to be trained on."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for number, row in enumerate(ROWS):
            split = "held_out" if number % 4 == 3 else "train"
            file.write(json.dumps({**row, "split": split}) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(server, data, tmp_path_factory) -> tuple[dict, Path]:
    """What a training of two steps printed, and the folder that it was downloaded to."""
    out = tmp_path_factory.mktemp("trained") / "mine"
    told = run_json(
        *("train", "--url", server.base_url, "--method", "ia3", "--data", data, *WORDS),
        *("--where", "split=train", "--max-steps", 2, "--lr", 0.05, "--batch-size", 4),
        *("--register", "trained-there", "--out", out),
    )
    return told, out


def test_train_runs_at_the_server_and_brings_the_folder(server, trained):
    told, out = trained
    shown = server.get("/adapters/trained-there").json()
    assert told["registered"] == {"name": "trained-there", "version": shown["version"]}
    assert (told["job"]["state"], told["job"]["num_rows"]) == ("succeeded", 9)
    assert told["metrics"]["steps"] == 2
    assert shown["recipe"]["hyperparameters"]["learning_rate"] == 0.05
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_train_shows_the_run_on_standard_error(server, data):
    made = run(
        *("train", "--url", server.base_url, "--method", "ia3", "--data", data, *WORDS),
        *("--max-steps", 1, "--register", "shown"),
    )
    assert made.exit_code == 0, made.output
    assert f"registered as shown@1 at {server.base_url}" in made.stdout
    assert "is queued at" in made.stderr
    assert "step 1/1" in made.stderr


def test_a_dry_run_shows_the_plan_and_stores_nothing(server, data):
    before = server.get("/train").json()["total"]
    words = ["train", "--url", server.base_url, "--method", "ia3", "--data", data, *WORDS]
    assert "12 to train on" in run(*words, "--dry-run").stdout
    assert len(run_json(*words, "--dry-run")["preview"]) == 3
    assert server.get("/train").json()["total"] == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "expected --register NAME"),
        (["--register", "x", "--resume"], "a server goes on with its jobs by itself"),
        (["--register", "No Go"], "'No Go' cannot be an adapter's name"),
        (["--register", "x", "--max-steps", "1", "--epochs", "2"], "max_steps"),
        (["--register", "x", "--label-name", "complaint=nothing"], "nothing"),
        (["--register", "x", "--init-text", "the"], "init_text"),
    ],
)
def test_train_refuses_in_a_sentence(server, data, options, said):
    words = ["train", "--url", server.base_url, "--method", "ia3", "--data", data, *WORDS]
    assert said in refusal(*words, *options)


def test_a_job_that_somebody_cancels_is_told(server, data):
    def cancelled() -> str:
        while not (jobs := server.get("/train").json()["jobs"]) or jobs[0]["adapter"] != "endless":
            time.sleep(0.02)
        return server.post(f"/train/{jobs[0]['id']}/cancel").json()["id"]

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(cancelled)
        words = ["train", "--url", server.base_url, "--method", "ia3", "--data", data, *WORDS]
        told = run(*words, "--max-steps", 100_000, "--register", "endless")
    assert told.exit_code == 2
    assert f"{ended.result()} cancelled: it was cancelled by a request" in told.stderr


# --- eval -------------------------------------------------------------------------------------


def test_eval_gives_what_an_engine_of_its_own_gives(server, trained, tiny_base, data, tmp_path):
    local = ["--base", tiny_base, "--data-dir", tmp_path / "data", "--dtype", "float32"]
    run_json("adapters", "add", trained[1], "--name", "trained-there", *local[:4], *WORDS[:2])
    options = ["--adapters", "trained-there", "--data", data, *WORDS]
    there = run_json("eval", "--url", server.base_url, *options)
    here = run_json("eval", *options, *local, "--threads", 1, "--append-eos")
    # What is stored says how a label ends, and the server goes by it; the base's have no end.
    for report in (there, here):
        report.pop("seconds")
        report.pop("rows_per_second")
        report["results"] = report["results"][1:]
        for one in report["results"]:
            one["adapter"] = one["adapter"].split("@")[0]
    assert there == here
    assert "accuracy" in run("eval", "--url", server.base_url, *options).stdout


def test_scores_are_those_of_the_engine(server, trained, tiny_base, tmp_path):
    """Row by row and label by label, by the sum and by the mean."""
    shown = server.get("/adapters/trained-there").json()
    with RemoteServer(str(server.base_url)) as remote:
        own = stored_contestant("trained-there", shown, {}, {})
        base = stored_contestant(None, {}, {}, {**asdict(own.wording), "append_eos": True})
        summed = evaluate_remotely(remote, [base, own], ROWS)
        mean = evaluate_remotely(remote, [own], ROWS, normalization="mean")
    engine = OfflineEngine(tiny_base, dtype="float32", threads=1, kv_bytes=1 << 24)
    engine.add_adapter("mine", trained[1])
    try:
        targets, lengths = [], []
        for name, append_eos in ((None, False), ("mine", True)):
            for row in ROWS:
                prompt = engine.tokenizer(f"Tweet text : {row['tweet']} Label :")["input_ids"]
                for label in LABELS:
                    ids = engine.tokenizer(f" {label}")["input_ids"]
                    ids += [engine.tokenizer.eos_token_id] * append_eos
                    targets.append((name, prompt, ids))
                    lengths.append(len(ids))
        scores = engine.score(targets)
    finally:
        engine.close()
    found = [score for result in summed.results for row in result.logprobs for score in row]
    assert found == pytest.approx(scores, abs=1e-4)
    half = len(scores) // 2
    means = [score / count for score, count in zip(scores, lengths, strict=True)][half:]
    assert [x for row in mean.results[0].logprobs for x in row] == pytest.approx(means, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapters", "nobody"], "no adapter 'nobody'"),
        (["--adapters", "other"], "has no stored template"),
        (["--adapters", "trained-there", "--no-append-eos"], "ranks with the append_eos"),
        (["--adapters", "trained-there", "--target-separator", ""], "the target_separator"),
        (["--adapters", "trained-there", "--target", "no"], "row 1: has no column 'no'"),
        (["--adapters", "trained-there", "--template", "{x} :"], "row 1: row: the template takes"),
        (["--adapters", "trained-there", "--labels", "a,b"], "which is none of the labels"),
        ([], "the base has no stored template"),
    ],
)
def test_eval_refuses_in_a_sentence(server, trained, data, options, said):
    assert said in refusal("eval", "--url", server.base_url, "--data", data, *options)


def test_a_name_is_found_in_a_data_directory_or_nowhere(tiny_base, tmp_path):
    from adapters.errors import AdapterNotFound

    with pytest.raises(AdapterNotFound, match="there is neither"):
        find_adapters(["nobody"], make_settings(tiny_base, tmp_path))
