"""Adapters and the base side by side, as `server.cli.evaluation`, ranked by a running server.

The server renders and ranks (`POST /classify`); here the right labels are found and counted. A row that
is too long is refused there: nothing is cut. Knows no command.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from adapters.errors import DataInvalid, JobInvalid, TemplateInvalid
from adapters.template import Template, text_of
from adapters.training.ranking import score
from adapters.training.rows import Row
from server.cli.evaluation import Evaluation, Normalization, Result, require_words
from server.cli.http_client import RemoteServer

# Enough for the server to fill its steps, and few enough for a bar that moves.
_ROWS_AT_ONCE = 32
_REQUESTS_AT_ONCE = 8
_NORMALIZATIONS = {"sum": "sum", "mean": "token_mean"}
# What a server says of labels where no adapter is named.
_OF_THE_BASE = {"target_separator": " ", "append_eos": False}


@dataclass(frozen=True)
class RemoteContestant:
    """One that is evaluated.

    Attributes:
        reference: what the server is asked for; None is the base.
        name: what it is called in the output.
        method: such as "ia3".
        template: that rows are rendered with.
        target: the column with the answer.
        labels: what may be answered.
        label_names: value of that column -> label; None where they are the same.
        keep_trailing_space: whether white space at the template's end stays in the prompt.
        stored: whether the template is the adapter's own, which the server has.
    """

    reference: str | None
    name: str
    method: str
    template: str
    target: str
    labels: list[str]
    label_names: dict[str, str] | None
    keep_trailing_space: bool
    stored: bool


def contestant_of(
    reference: str | None,
    shown: Mapping[str, Any],
    given: Mapping[str, Any],
    inherited: Mapping[str, Any],
) -> RemoteContestant:
    """What to send for an adapter, or the base.

    Args:
        reference: see `RemoteContestant`.
        shown: the adapter as `AdapterPlace.show` has it; empty for the base.
        given: words that take the place of the stored ones.
        inherited: words for what is neither stored nor given.

    Raises:
        JobInvalid: a word is missing, or the server would rank by another.
    """
    words = {**inherited, **stored_words(shown), **given}
    name = f"{shown['name']}@{shown['version']}" if shown else "the base"
    require_words(name, words)
    for field, default in _OF_THE_BASE.items():
        served = shown.get(field) if shown else default
        if field in given and given[field] != served:
            raise JobInvalid(
                f"{name}: a server ranks with the {field} that is stored, {served!r}; came "
                f"{given[field]!r}; evaluate it without --url",
                field=field,
                expected=repr(served),
                came=repr(given[field]),
            )
    return RemoteContestant(
        reference,
        name,
        str(shown.get("peft_type", "base")).lower(),
        words["template"],
        words["target"],
        words["labels"],
        words.get("label_names"),
        words.get("tokenization") == "as_written",
        bool(shown) and not {"template", "tokenization"} & given.keys(),
    )


def stored_words(shown: Mapping[str, Any]) -> dict[str, Any]:
    """The words that are stored with an adapter; those that are not are left out."""
    recipe = shown.get("recipe") or {}
    words = {name: recipe.get(name) for name in ("target", "label_names")}
    words |= {name: shown.get(name) for name in ("template", "labels", "tokenization")}
    return {name: value for name, value in words.items() if value is not None}


def evaluate_remotely(
    server: RemoteServer,
    contestants: Sequence[RemoteContestant],
    rows: Sequence[Row],
    *,
    normalization: Normalization = "sum",
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Evaluation:
    """Rank the labels after every row, for all contestants together.

    Args:
        server: has the adapters.
        contestants: at least one.
        rows: at least one.
        normalization: as `server.cli.evaluation.evaluate` takes it.
        on_progress: called with the rows that are done, and all there are, once for each contestant.

    Raises:
        DataInvalid: words and rows do not go together.
        ServerRefused: the server ranked nothing.
    """
    right = [_right_labels(one, rows) for one in contestants]
    work = [
        (one, begin, _body(one, rows[begin : begin + _ROWS_AT_ONCE], begin, normalization))
        for begin in range(0, len(rows), _ROWS_AT_ONCE)
        for one in contestants
    ]
    done, lock = 0, threading.Lock()
    found: dict[tuple[str, int], list[list[float]]] = {}

    def ask(one: RemoteContestant, begin: int, body: dict[str, Any]) -> None:
        nonlocal done
        replies = server.post("/classify", body, adapter=one.reference)
        logprobs = [[reply["logprobs"][label] for label in one.labels] for reply in replies]
        with lock:
            found[one.name, begin] = logprobs
            done += len(logprobs)
            on_progress(done, len(rows) * len(contestants))

    began = time.monotonic()
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for future in [pool.submit(ask, *one) for one in work]:
            future.result()
    seconds = time.monotonic() - began
    results = []
    for one, own in zip(contestants, right, strict=True):
        logprobs = [
            row for begin in range(0, len(rows), _ROWS_AT_ONCE) for row in found[one.name, begin]
        ]
        chosen = [row.index(max(row)) for row in logprobs]
        results.append(Result(one.reference, score(chosen, own), logprobs, chosen))
    return Evaluation(results, len(rows), seconds)


def _body(
    one: RemoteContestant, rows: Sequence[Row], begin: int, normalization: Normalization
) -> dict[str, Any]:
    template = Template.parse(one.template, keep_trailing_space=one.keep_trailing_space)
    asked: dict[str, Any] = {
        "labels": one.labels,
        "normalization": _NORMALIZATIONS[normalization],
    }
    try:
        texts = [template.fill(row).text for row in rows]
    except TemplateInvalid as error:
        number = next(n for n, row in enumerate(rows) if not {*template.columns} <= row.keys())
        raise DataInvalid(
            f"row {begin + number + 1}: {error.message}",
            row=begin + number + 1,
            expected=error.expected,
            came=error.came,
        ) from error
    if one.stored:  # as in training: what stands in a row is never a special token
        kept = [{name: row[name] for name in template.columns} for row in rows]
        return {**asked, "rows": kept}
    return {**asked, "inputs": texts}


def _right_labels(one: RemoteContestant, rows: Sequence[Row]) -> list[int]:
    """The index of each row's own label."""
    indices = {label: index for index, label in enumerate(one.labels)}
    right: list[int] = []
    for number, row in enumerate(rows, start=1):
        if one.target not in row:
            raise DataInvalid(
                f"row {number}: has no column {one.target!r}, the target column",
                row=number,
                expected=one.target,
                came=", ".join(row),
            )
        text = text_of(row[one.target])
        label = text if one.label_names is None else one.label_names.get(text, text)
        if label not in indices:
            raise DataInvalid(
                f"row {number}: {one.target} is {text[:80]!r}, which is none of the labels",
                row=number,
                expected=", ".join(one.labels),
                came=text[:80],
            )
        right.append(indices[label])
    return right
