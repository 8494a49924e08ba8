"""The plans of every method, down to each token id, are those that were recorded; what is stored of one
reads back the same."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import pytest

from adapters.errors import TrainingError
from adapters.training.examples import from_lines, to_lines
from adapters.training.job import TrainingJob
from adapters.training.plan import Plan, make_plan
from tests.adapters.training.jobs import (
    LABELS,
    ROWS,
    plan,
    request,
    spec,
    stored_and_read,
    tokenizer,
)

CHAT = [
    {"prompt": "<s>say it</s>", "completion": "it"},
    {"prompt": "<s>no</s>", "completion": "that"},
    {"prompt": "<s>a naïve 漢字</s>", "completion": "it"},
]
TRUNCATED: dict[str, Any] = {"max_length": 24, "on_too_long": "truncate"}


def _split(seed: int) -> dict[str, Any]:
    return {"hyperparameters": {"validation_split": 0.34, "seed": seed}}


def _chat() -> Plan:
    asked = request(template="{prompt}", target="completion", target_separator="")
    return make_plan(
        asked,
        CHAT,
        tokenizer(bos=True),
        spec(),
        base_name="tiny",
        num_validation_rows=1,
        prompts="chat",
    )


PLANS = {
    "ia3": lambda: plan(),
    "labels": lambda: plan(labels=LABELS, **_split(0)),
    "names": lambda: plan(
        label_names={"complaint": "yes", "no complaint": "no"}, append_eos=False, **_split(3)
    ),
    "as_written": lambda: plan(template="{text} :\n{ID} ", tokenization="as_written"),
    "prefix": lambda: plan(method="prefix_tuning", labels=LABELS, **_split(1)),
    "prompt": lambda: plan(method="prompt_tuning", encoder=tokenizer(bos=True), **_split(2)),
    "text": lambda: plan(method="p_tuning_v2", init_text="say whether it complains"),
    "vocabulary": lambda: plan(
        method="prompt_tuning", config={"prompt_tuning_init": "SAMPLE_VOCAB"}
    ),
    "p_tuning": lambda: plan(method="p_tuning", hyperparameters={"max_steps": 7}),
    "cpt": lambda: plan(method="cpt", labels=LABELS, encoder=tokenizer(bos=True)),
    "context": lambda: plan(
        method="cpt", context_examples=2, context_seed=5, train_on_context=False, labels=LABELS
    ),
    "truncated": lambda: plan(encoder=tokenizer(bos=True), labels=LABELS, **TRUNCATED, **_split(4)),
    "chat": _chat,
}
# SHA-256 of the job and its examples, recorded while a worker still rendered the rows itself.
RECORDED: dict[str, str] = {
    "ia3": "19f59573caa2a231c772901083ca51cc229f6ef0aebcb87229a65338b8e05eb6",
    "labels": "5f3107c08cf503d4e8e8a93228fcaf8e4c9755d618c8c12853506f4448bc6603",
    "names": "fab378d640f6015fa3a99bd133b30598d5ee70b1364933fcadf39dd31f88923d",
    "as_written": "d220e05b37c25ee7e56fd61b8964b7c63bd9f52263d4b16a42c5626aa115eb6e",
    "prefix": "165a5c0ec02a2b9d3e9fa02f744d33e0813071724ba580ea3d76f90931e81e9c",
    "prompt": "27b1efe0040681a7c7863430caf37cdce9010a30bd6890fa3b419fa265b5d362",
    "text": "8f6e8ff24b5d36e384d7331836c83905ce5306b673b8f35e29debbe478e9a00e",
    "vocabulary": "0b018d309c76d91274dfb4c2a1d919639dea6aa913b84ceb8260d27f78b6bbb2",
    "p_tuning": "30e7249bf9511d8bee82a26226f97d53b9a4e8209a7ea5a1ead522e33a70a455",
    "cpt": "a622bad478f9292d0bc2a388cea022911e9c0febe6bdadbddec6d36e6b4fde8e",
    "context": "a5a36df9a707f0fe54ac6ab8de22d52978acca04953bb97d6d4b92c773e64b7a",
    "truncated": "a144acbdbd83d83696bd297702d26004b7a5457ff8b911bd28fda80b78d80a45",
    "chat": "ad293d4c180dbf1ef4718c4283f5a86d600c09b08788ac71d83b69c8f5a75bd4",
}


def _digest(made: Plan) -> str:
    examples = [
        (one.row, one.label, one.prompt_ids, one.target_ids, one.types)
        for one in (*made.examples.train, *made.examples.held_out)
    ]
    parts = [
        made.job.model_dump_json(),
        json.dumps([len(made.examples.train), made.examples.label_ids, examples]),
        json.dumps([made.preview, made.lengths]),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def test_the_rows_are_those_of_all_methods() -> None:
    assert PLANS.keys() == RECORDED.keys()
    assert {made().job.method for made in PLANS.values()} == {
        "ia3",
        "prefix_tuning",
        "prompt_tuning",
        "p_tuning",
        "cpt",
    }
    assert len(ROWS) == 6


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_the_one_that_was_recorded(name: str) -> None:
    assert _digest(PLANS[name]()) == RECORDED[name]


@pytest.mark.parametrize("name", PLANS)
def test_a_worker_reads_what_was_planned(name: str) -> None:
    made = PLANS[name]()
    stored = TrainingJob.model_validate_json(made.job.model_dump_json())
    assert stored_and_read(stored, made) == made.examples


def _changed(line: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(line), **fields}).encode() + b"\n"


# What is done to the lines of a file: a head, and one line for each of six rows.
DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "empty": lambda lines: [],
    "no_head": lambda lines: lines[1:],
    "cut": lambda lines: [*lines[:-1], lines[-1][:-20]],
    "row_missing": lambda lines: lines[:-1],
    "row_too_many": lambda lines: [*lines, lines[-1]],
    "more_rows_than_the_job": lambda lines: [
        _changed(lines[0], num_train=7),
        *lines[1:],
        lines[-1],
    ],
    "no_rows": lambda lines: [_changed(lines[0], num_train=0)],
    "other_labels": lambda lines: [_changed(lines[0], label_ids=[[1]]), *lines[1:]],
    "no_label_of_the_job": lambda lines: [lines[0], _changed(lines[1], label=2), *lines[2:]],
    "negative_id": lambda lines: [
        lines[0],
        _changed(lines[1], ids=[-1, 2], types="14"),
        *lines[2:],
    ],
    "id_of_64_bits": lambda lines: [
        lines[0],
        _changed(lines[1], ids=[2**31, 2], types="14"),
        *lines[2:],
    ],
    "float_id": lambda lines: [lines[0], _changed(lines[1], ids=[1.0, 2], types="14"), *lines[2:]],
    "types_of_other_tokens": lambda lines: [lines[0], _changed(lines[1], types="14"), *lines[2:]],
    "no_target": lambda lines: [lines[0], _changed(lines[1], ids=[1, 2], types="11"), *lines[2:]],
    "no_prompt": lambda lines: [lines[0], _changed(lines[1], ids=[1, 2], types="44"), *lines[2:]],
    "longer_than_max_length": lambda lines: [
        lines[0],
        _changed(lines[1], ids=[1] * 65, types="1" * 64 + "4"),
        *lines[2:],
    ],
    "endless_line": lambda lines: [lines[0], b" " * 10_000 + lines[1], *lines[2:]],
    "unknown_field": lambda lines: [lines[0], _changed(lines[1], x=1), *lines[2:]],
    "python": lambda lines: [lines[0], b"cos\nsystem\n(S'true'\ntR.\n", *lines[2:]],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused(name: str) -> None:
    made = plan(labels=LABELS, max_length=64)
    lines = DAMAGE[name]([line.encode() for line in to_lines(made.examples)])
    with pytest.raises(TrainingError, match="tokenized rows are damaged"):
        from_lines(io.BytesIO(b"".join(lines)), made.job)
