"""`/v1/fine_tuning/jobs` with the real client, a real worker and a tiny base: from a file to answers."""

from __future__ import annotations

import openai
import pytest

from tests.server.api.training.openai.conftest import PAIRS, ended, upload

IA3 = {"type": "ia3", "ia3": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}}


@pytest.fixture
def pairs_file(client):
    return upload(client, PAIRS)


@pytest.fixture(scope="module")
def trained(client):
    """A job of OpenAI's plainest kind that has succeeded."""
    pairs_file = upload(client, PAIRS)
    job = client.fine_tuning.jobs.create(
        model="tiny-base",
        training_file=pairs_file.id,
        suffix="complaints-1",
        seed=7,
        hyperparameters={"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 3},
        metadata={"team": "support", 'odd "name".x': ""},
    )
    assert job.status in ("queued", "running")
    assert job.fine_tuned_model is None
    client.files.delete(pairs_file.id)  # a job has its own rows
    return ended(client, job)


def answer(client, model, prompt=PAIRS[0]["prompt"]):
    reply = client.completions.create(
        model=model, prompt=prompt, max_tokens=8, temperature=0, logprobs=1
    )
    return reply.choices[0].logprobs.token_logprobs


def test_from_a_file_to_answers(client, trained):
    assert (trained.status, trained.error) == ("succeeded", None)
    assert trained.object == "fine_tuning.job"
    assert trained.model == "tiny-base"
    assert trained.training_file.startswith("file-")
    assert trained.fine_tuned_model == "complaints-1"
    assert (trained.validation_file, trained.result_files) == (None, [])
    assert trained.seed == 7
    assert trained.hyperparameters.to_dict() == {
        "n_epochs": 3,
        "batch_size": 4,
        "learning_rate_multiplier": 3.0,
    }
    assert (trained.method.type, trained.method.supervised.hyperparameters.n_epochs) == (
        "supervised",
        3,
    )
    assert trained.created_at <= trained.finished_at
    assert trained.metadata == {"team": "support", 'odd "name".x': ""}
    assert trained.fine_tuned_model in [model.id for model in client.models.list()]
    assert answer(client, trained.fine_tuned_model) != answer(client, "tiny-base")


def test_what_was_trained_on_is_what_is_asked(client, tuning_server, trained):
    """A prompt and its completion are the tokens of the two, one after the other, and the end."""
    job = tuning_server.get(f"/train/{trained.id}").json()
    assert (job["template"], job["target"], job["target_separator"]) == (
        "{prompt}",
        "completion",
        "",
    )
    assert (job["method"], job["append_eos"]) == ("ia3", True)
    tokenizer = tuning_server.app_services().need_generator().tokenizer
    count = sum(
        len(tokenizer.encode(pair["prompt"]))
        + len(tokenizer.encode(pair["completion"], add_special_tokens=False))
        + 1
        for pair in PAIRS
    )
    assert trained.trained_tokens == 3 * count
    prompt = PAIRS[0]["prompt"]
    as_text, as_ids = answer(client, "complaints-1", prompt), tokenizer.encode(prompt)
    assert answer(client, "complaints-1", list(as_ids)) == pytest.approx(as_text, abs=1e-5)
    # Its template is the prompt itself, so one user message is that prompt.
    chat = client.chat.completions.create(
        model="complaints-1",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=8,
        temperature=0,
        logprobs=True,
    )
    told = [token.logprob for token in chat.choices[0].logprobs.content]
    assert told == pytest.approx(as_text, abs=1e-5)


def test_events_come_newest_first_and_by_pages(client, trained):
    events = list(client.fine_tuning.jobs.list_events(trained.id, limit=3))
    numbers = [int(event.id.rpartition("-")[2]) for event in events]
    assert numbers == list(range(len(events), 0, -1))
    assert "succeeded" in events[0].message
    assert events[-1].type == "message"
    assert events[-1].message.startswith("The job waits for a worker. labels were not given")
    steps = [event for event in events if event.type == "metrics"]
    assert len(steps) >= 2
    assert all("training loss=" in event.message for event in steps)
    # The labels that were taken, and perhaps an adapter that learned too little.
    assert events[-1].level == "warn"
    assert {event.level for event in steps} == {"info"}
    page = client.fine_tuning.jobs.list_events(trained.id, limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    for after in ("x", f"ftevent-{trained.id}-x", "ftevent-job-" + "0" * 24 + "-1"):
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            client.fine_tuning.jobs.list_events(trained.id, after=after)
        assert caught.value.param == "after"


def test_a_list_has_pages_and_filters(client, tuning_server, trained):
    other = tuning_server.post(
        "/train",
        json={
            "adapter": "ours",
            "method": "prompt_tuning",
            "template": "{prompt}",
            "target": "completion",
            "rows": PAIRS,
            "hyperparameters": {"max_steps": 1},
        },
    ).json()
    found = list(client.fine_tuning.jobs.list(limit=1))
    listed = [job.id for job in found]
    assert listed[0] == other["id"]
    assert trained.id in listed
    ours = found[0]
    assert (ours.method.type, ours.training_file) == ("prompt_tuning", "")
    assert ours.hyperparameters.n_epochs is None
    ids = lambda **query: [job.id for job in client.fine_tuning.jobs.list(**query)]  # noqa: E731
    assert ids(after=other["id"]) == listed[1:]
    assert ids(metadata={"team": "support"}) == [trained.id]
    assert ids(metadata={"team": "sales"}) == []
    assert ids(metadata={'odd "name".x': ""}) == [trained.id]
    assert other["id"] in ids(extra_query={"metadata": "null"})
    assert trained.id not in ids(extra_query={"metadata": "null"})
    assert client.fine_tuning.jobs.checkpoints.list(trained.id).data == []
    client.fine_tuning.jobs.cancel(ours.id)


def test_a_method_with_all_there_is_to_say_and_held_out_rows(client, pairs_file):
    held_out = upload(client, PAIRS[:4])
    job = client.fine_tuning.jobs.create(
        model="tiny-base",
        training_file=pairs_file.id,
        validation_file=held_out.id,
        method={
            "type": "prompt_tuning",
            "prompt_tuning": {
                "config": {"num_virtual_tokens": 3},
                "labels": [" complaint", " no complaint"],
                "hyperparameters": {
                    "n_epochs": "auto",
                    "epochs": 2,
                    "learning_rate_multiplier": 0.5,
                    "early_stopping_patience": 5,
                },
            },
        },
    )
    job = ended(client, job)
    assert (job.status, job.validation_file) == ("succeeded", held_out.id)
    assert job.fine_tuned_model.startswith("ft-")
    said = job.method.model_extra["prompt_tuning"]
    assert said["config"]["num_virtual_tokens"] == 3
    assert said["labels"] == [" complaint", " no complaint"]
    assert job.hyperparameters.learning_rate_multiplier == 0.5
    events = list(client.fine_tuning.jobs.list_events(job.id))
    evaluations = [event for event in events if event.data["kind"] == "evaluation"]
    assert len(evaluations) == 2
    assert all(event.data["num_rows"] == 4 for event in evaluations)
    assert all("accuracy" in event.data for event in evaluations)
    assert answer(client, job.fine_tuned_model) != answer(client, "tiny-base")


def test_a_running_job_is_cancelled(client, pairs_file):
    job = client.fine_tuning.jobs.create(
        model="tiny-base",
        training_file=pairs_file.id,
        suffix="never",
        method={"type": "ia3", "ia3": {"hyperparameters": {"max_steps": 1_000_000}}},
    )
    assert client.fine_tuning.jobs.cancel(job.id).status in ("cancelled", "running")
    job = ended(client, job)
    assert (job.status, job.fine_tuned_model, job.trained_tokens) == ("cancelled", None, None)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "warn"
    with pytest.raises(openai.NotFoundError):
        answer(client, "never")


def test_plain_rows_by_a_template(client, tuning_server):
    rows = "text,label\n" + "".join(f"it was {w},{l}\n" for w in "abcd" for l in "xy")  # noqa: E741
    file = upload(client, rows.encode(), "rows.csv")
    block = {"template": "Text : {text} Label :", "target": "label", "labels": ["x", "y"]}
    job = client.fine_tuning.jobs.create(
        model="tiny-base",
        training_file=file.id,
        suffix="plain",
        method={"type": "supervised", "supervised": {**block, "hyperparameters": {"max_steps": 1}}},
    )
    planned = tuning_server.get(f"/train/{job.id}").json()
    assert (planned["template"], planned["target"]) == (block["template"], "label")
    assert (planned["labels"], planned["target_separator"]) == (["x", "y"], " ")
    assert (planned["num_rows"], planned["prompts"]) == (8, "template")
    client.fine_tuning.jobs.cancel(job.id)


# --- refusals --------------------------------------------------------------------------------------


def refused(client, **fields):
    with pytest.raises(openai.APIStatusError) as caught:
        client.fine_tuning.jobs.create(**{"model": "tiny-base", **fields})
    return caught.value


METHODS = "method.type"
NO_FILE = "file-" + "0" * 24
HYPER = "method.ia3.hyperparameters"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param", "words"),
    [
        ({"model": "complaints-1"}, 422, "invalid", "model", "not on other adapters"),
        ({"training_file": NO_FILE}, 404, "file_not_found", "training_file", NO_FILE),
        ({"training_file": "../registry.db"}, 404, "file_not_found", "training_file", "no file"),
        ({"validation_file": NO_FILE}, 404, "file_not_found", "validation_file", NO_FILE),
        ({"suffix": "Not A Name"}, 422, "name_invalid", "suffix", "try 'not-a-name'"),
        ({"suffix": "tiny-base"}, 422, "name_invalid", "suffix", "reserved"),
        ({"suffix": ""}, 422, "name_invalid", "suffix", "cannot be an adapter's name"),
        ({"method": {"type": "dpo"}}, 422, "invalid", METHODS, "supervised, prefix_tuning"),
        ({"method": {"type": "lora"}}, 422, "invalid", METHODS, "cpt"),
        ({"method": {"type": "ia3", "cpt": {}}}, 400, "contradiction", "method", "'cpt'"),
        (
            {"method": {"type": "ia3", "ia3": {"rank": 8}}},
            422,
            "invalid",
            "method.ia3.rank",
            "'rank'",
        ),
        (
            {"method": {"type": "ia3", "ia3": {"config": {"r": 8}}}},
            422,
            "job_invalid",
            "method.ia3.config.r",
            "r",
        ),
        (
            {"method": {"type": "ia3", "ia3": {"template": "{prompt}"}}},
            422,
            "invalid",
            "method.ia3.target",
            "together",
        ),
        ({"hyperparameters": {"n_epochs": 0}}, 422, "invalid", None, "n_epochs"),
        (
            {"hyperparameters": {"n_epoch": 1}},
            422,
            "invalid",
            "hyperparameters.n_epoch",
            "'n_epochs'?",
        ),
        (
            {
                "hyperparameters": {"n_epochs": 2},
                "method": {"type": "ia3", "ia3": {"hyperparameters": {"epochs": 3}}},
            },
            400,
            "contradiction",
            f"{HYPER}.epochs",
            "3 and 2",
        ),
        (
            {"seed": 1, "method": {"type": "ia3", "ia3": {"hyperparameters": {"seed": 2}}}},
            400,
            "contradiction",
            f"{HYPER}.seed",
            "2 and 1",
        ),
        (
            {"method": {"type": "ia3", "ia3": {"hyperparameters": {"epochs": 1, "max_steps": 1}}}},
            422,
            "job_invalid",
            f"{HYPER}.max_steps",
            "contradict",
        ),
        ({"extra_body": {"adapter": "x"}}, 400, "contradiction", "adapter", "suffix"),
        ({"metadata": {"x": "y" * 513}}, 422, "invalid", "metadata.x", "512"),
        ({"extra_query": {"adapter": "x"}}, 400, "unknown_parameter", "adapter", "adapter"),
    ],
)
def test_what_is_refused(client, trained, pairs_file, fields, status, code, param, words):
    error = refused(client, **{"training_file": pairs_file.id, **fields})
    assert (error.status_code, error.code) == (status, code), error.message
    assert param is None or error.param == param
    assert words in error.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "c"}\n', "row 2"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "row 2 (line 2)"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": [1]}\n', "row 2"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": ""}\n', "row 2"),
        (
            b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "b"}\n',
            "same target",
        ),
        (
            b'{"prompt": "a", "completion": "b"}\n' + b'{"prompt": "c", "completion": ""}\n' * 2,
            "_file, row 2; ",
        ),
        (b"\xff\xfe\x00\xd8", "line 1, the header"),
        (b"\n", "no rows"),
        (b'{"text": "a"}\n', "method.supervised.template"),
        (b'[{"prompt": "a", "completion": [1]}]', "row 1 (line 1), column 'completion'"),
    ],
)
def test_lines_that_cannot_be_trained_on(client, content, words):
    file = upload(client, content)
    error = refused(client, training_file=file.id)
    assert error.status_code == 422
    assert error.param == "training_file"
    assert error.body["message"].startswith("training_file")
    assert words in error.body["message"]
    if words == "same target":  # that is no fault of rows that are held out
        return
    good = upload(client, PAIRS)
    error = refused(client, training_file=good.id, validation_file=file.id)
    assert (error.status_code, error.param) == (422, "validation_file")


def test_no_such_job_and_no_such_route(client):
    for call in (
        client.fine_tuning.jobs.retrieve,
        client.fine_tuning.jobs.cancel,
        client.fine_tuning.jobs.list_events,
        client.fine_tuning.jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call("job-" + "0" * 24)
        assert caught.value.code == "job_not_found"
    for call in (client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.NotFoundError) as caught:
            call("job-" + "0" * 24)
        assert caught.value.code == "route_not_found"


def test_fields_of_openai_that_have_no_effect_are_named(client, pairs_file):
    reply = client.fine_tuning.jobs.with_raw_response.create(
        model="tiny-base",
        training_file=pairs_file.id,
        method=IA3,
        integrations=[{"type": "wandb", "wandb": {"project": "x"}}],
    )
    assert reply.headers["x-ignored-parameters"] == "integrations"
    job = reply.parse()
    assert job.integrations == []
    client.fine_tuning.jobs.cancel(job.id)
