"""Prompts that a chat template made, and rows that came to be held out."""

from __future__ import annotations

import pytest

from adapters.errors import JobInvalid
from adapters.training.job import TrainingJob
from adapters.training.plan import Plan, make_plan
from adapters.training.provenance import metadata_of
from tests.adapters.training.jobs import ROWS, plan, request, spec, stored_and_read, tokenizer

CHAT = [
    {"prompt": "<s>user\nthe tweet is </s>\n<s>assistant\n", "completion": "a complaint"},
    {"prompt": "<s>user\nanother </s>\n<s>assistant\n", "completion": "no complaint"},
]


def given(rows=ROWS, num_validation_rows=0, prompts="template", bos=True, **fields) -> Plan:
    return make_plan(
        request(**fields),
        rows,
        tokenizer(bos=bos),
        spec(),
        base_name="tiny",
        num_validation_rows=num_validation_rows,
        prompts=prompts,
    )


def chat(**fields) -> Plan:
    options = {"template": "{prompt}", "target": "completion", "target_separator": ""}
    return given(CHAT, prompts="chat", **{**options, **fields})


def test_special_tokens_of_a_chat_template_are_special_tokens():
    encoder = tokenizer(bos=True)
    made = chat()
    for example, row in zip(made.examples.train, CHAT, strict=True):
        assert example.prompt_ids == encoder.encode(row["prompt"], add_special_tokens=False)
        assert (example.prompt_ids.count(1), example.prompt_ids.count(2)) == (2, 1)
        target = encoder.encode(row["completion"], add_special_tokens=False)
        assert example.target_ids == (*target, encoder.eos_token_id)
    first = made.preview[0]
    assert "".join(token for token in first["tokens"] if token) == first["text"]
    assert first["prompt"] == CHAT[0]["prompt"]
    # The same text as data: a token is added, and the names are text.
    plain = given(CHAT, template="{prompt}", target="completion", target_separator="")
    assert plain.examples.train[0].prompt_ids.count(1) == 1
    assert plain.examples.train[0].prompt_ids.count(2) == 0


def test_a_prompt_starts_from_the_special_tokens_of_its_rows():
    made = chat(method="prompt_tuning", config={"num_virtual_tokens": 60})
    assert {1, 2} <= set(made.job.init_token_ids)
    text = chat(method="prompt_tuning", config={"num_virtual_tokens": 6}, init_text="</s>")
    assert 2 not in text.job.init_token_ids  # that is somebody's text


@pytest.mark.parametrize("method", ["ia3", "prefix_tuning", "cpt"])
def test_a_worker_reads_the_same_examples(method):
    made = chat(method=method)
    stored = TrainingJob.model_validate(made.job.model_dump(mode="json"))
    assert stored_and_read(stored, made) == made.examples


def test_only_an_adapter_for_data_keeps_a_template():
    assert metadata_of(chat().job, {}).template is None
    assert metadata_of(plan().job, {}).template == plan().job.template


def test_the_last_rows_are_held_out_and_shown_to_nobody():
    made = given(num_validation_rows=2, method="cpt", context_examples=4)
    assert [example.row for example in made.examples.train] == [1, 2, 3, 4]
    assert [example.row for example in made.examples.held_out] == [5, 6]
    assert (made.job.num_rows, made.job.num_validation_rows) == (6, 2)
    stored = TrainingJob.model_validate(made.job.model_dump(mode="json"))
    assert stored_and_read(stored, made) == made.examples
    assert given(
        num_validation_rows=1, hyperparameters={"early_stopping_patience": 1}
    ).job.hyperparameters.early_stopping_patience


def test_rows_to_hold_out_and_a_share_of_them():
    with pytest.raises(JobInvalid) as caught:
        given(num_validation_rows=1, hyperparameters={"validation_split": 0.5})
    assert caught.value.field == "hyperparameters.validation_split"
