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
# SHA-256 of the job and its examples. Recorded anew when jobs got inferred labels and warnings; without
# these, and with tokens shown as the characters that they cover, the digests were those from the time
# when a worker still rendered the rows itself.
RECORDED: dict[str, str] = {
    "ia3": "17b3f0e1749d9bef9e1c6628f81de41a32161a3d3f451fbcd6585b73bd24defe",
    "labels": "8cb23c5d154e29d224f4f65b38eac68663539de4a383407ccd924959e7576fa9",
    "names": "77ae1a72747c78e30f25fd6b3c88874a660e424f15d0e465b7231fd184f4c6c0",
    "as_written": "481b22600e4c4db81b7cf7c556f70103aab38dbfeda4c724e1e4c468339bd5d0",
    "prefix": "ca8a41638bc46d1d56be1a9fd72aa5a10c8b87761bce74ecd0aa2730741a7803",
    "prompt": "3479c2ba4dc37f8ce9a0f954acdbbc7439c30c1c3da165c00bd6e908a7bb1ebc",
    "text": "e99fd29e7f22a56b287ba3309d404bdd19bf4bce54851a55b3e55e638daf7f22",
    "vocabulary": "48fe17baff33d064660941a9a577063021d934b1c1fbfa272b4490a6b99db0ae",
    "p_tuning": "38539064ce272e6e6fc1d48d4ff3433f0bff627651ee7a47735516ccdeb39f35",
    "cpt": "745c9aa3f48a7fcd0e62aeb6c9e59be106b665525a2d9964352d6a710f1f48e4",
    "context": "8eada2cad4c8bf63d281fe25cc9cf1e781dd0f93ed964ad482af879356617a75",
    "truncated": "d6fe90db3894b2348ead957cdfdce196196cf3fc2e10e85be26bf8e71d2a282f",
    "chat": "09e71d82812de7c3ecf58c6e92d5c916c6b5f235b47cedc6cd3fd758d10b709d",
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
