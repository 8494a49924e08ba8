"""Adapters and the base side by side: which label each holds most likely, row by row.

    evaluate            an engine of this process ranks: rows are rendered as in training, in one mixed
                        batch of all rows, labels and adapters
    evaluate_remotely   a running server renders and ranks (`POST /classify`); a row that is too long is
                        refused there, and a label ends as the server has it stored

Counts the right labels. Knows no command and no registry.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from adapters.base_model import BaseModelSpec
from adapters.errors import DataInvalid, JobInvalid, TemplateInvalid
from adapters.template import Row, Template, Tokenization, text_of
from adapters.training.encoding import Encoder
from adapters.training.examples import Example, Examples, fit
from adapters.training.job import OnTooLong
from adapters.training.ranking import Scores, score
from adapters.training.rendering import LABEL, Renderer, RowFormat
from adapters.training.row_source import Used

if TYPE_CHECKING:
    from server.cli.http_client import RemoteServer
    from server.engine.offline import OfflineEngine, Target

Normalization = Literal["sum", "mean"]

_LENGTHS = ("max_length", "on_too_long")
# Enough for the server to fill its steps, and few enough for a bar that moves.
_ROWS_AT_ONCE = 32
_REQUESTS_AT_ONCE = 8
_NORMALIZATIONS = {"sum": "sum", "mean": "token_mean"}
# How a server ends the labels of the base, which has nothing stored.
_OF_THE_BASE = {"target_separator": " ", "append_eos": False}


@dataclass(frozen=True)
class Wording:
    """How rows are put to an adapter; the fields are those of `TrainingJob`."""

    template: str
    target: str
    labels: list[str]
    label_names: dict[str, str] | None = None
    target_separator: str = " "
    append_eos: bool = False
    tokenization: Tokenization = "boundary"
    max_length: int | None = None
    on_too_long: OnTooLong = "error"

    def row_format(self) -> RowFormat:
        """This metadata, for the renderer that training uses."""
        given = {name: value for name, value in vars(self).items() if name not in _LENGTHS}
        return RowFormat(**given)


def wording_of(title: str, metadata: Mapping[str, Any]) -> Wording:
    """The wording that metadata describes; None in it is as left out.

    Args:
        title: whose it is, for the message.
        metadata: fields of `Wording`; others are ignored.

    Raises:
        JobInvalid: template, target or labels are missing.
    """
    for field in ("template", "target", "labels"):
        if not metadata.get(field):
            raise JobInvalid(
                f"{title} has no stored {field}; give --{field}",
                field=field,
                expected=f"--{field}",
                came="none",
            )
    known = {name: metadata.get(name) for name in Wording.__dataclass_fields__}
    return Wording(**{name: value for name, value in known.items() if value is not None})


@dataclass(frozen=True)
class Contestant:
    """An adapter, or the base, that is evaluated.

    Attributes:
        name: the engine's or the server's name for it; None is the base.
        wording: how rows are put to it.
        num_virtual_tokens: positions that it takes.
        title: its name in the output.
        method: such as "ia3".
        is_stored: whether a server renders rows by the template that it has stored.
    """

    name: str | None
    wording: Wording
    num_virtual_tokens: int = 0
    title: str = "the base"
    method: str = "base"
    is_stored: bool = False


def stored_contestant(
    reference: str | None,
    shown: Mapping[str, Any],
    given: Mapping[str, Any],
    inherited: Mapping[str, Any],
) -> Contestant:
    """A server's adapter, or its base.

    Args:
        reference: the server's name for it; None is the base.
        shown: the adapter as `Backend.adapter` has it; empty for the base.
        given: metadata in place of what is stored.
        inherited: metadata for what is neither stored nor given.

    Raises:
        JobInvalid: metadata is missing, or the server would rank by other metadata.
    """
    title = f"{shown['name']}@{shown['version']}" if shown else "the base"
    wording = wording_of(title, {**inherited, **stored_metadata(shown), **given})
    for field, default in _OF_THE_BASE.items():
        served = shown.get(field) if shown else default
        if field in given and given[field] != served:
            raise JobInvalid(
                f"{title}: a server ranks with the {field} that is stored, {served!r}; came "
                f"{given[field]!r}; evaluate it without --url",
                field=field,
                expected=repr(served),
                came=repr(given[field]),
            )
    method = str(shown.get("peft_type", "base")).lower()
    is_stored = bool(shown) and not {"template", "tokenization"} & given.keys()
    return Contestant(reference, wording, title=title, method=method, is_stored=is_stored)


def stored_metadata(shown: Mapping[str, Any]) -> dict[str, Any]:
    """What a server has stored about rendering and labels; what it has not is left out."""
    recipe = shown.get("recipe") or {}
    found = {name: recipe.get(name) for name in ("target", "label_names")}
    found |= {name: shown.get(name) for name in ("template", "labels", "tokenization")}
    return {name: value for name, value in found.items() if value is not None}


def used_by(contestants: Iterable[Contestant]) -> Used:
    """The columns that contestants read; a row that lacks one of them is refused when it is rendered."""
    names = [
        name
        for one in contestants
        for name in (*Template.parse(one.wording.template).columns, one.wording.target)
    ]
    return Used((), tuple(dict.fromkeys(names)))


@dataclass(frozen=True)
class Result:
    """How one did.

    Attributes:
        name: as the contestant's.
        scores: accuracy and macro-F1.
        logprobs: of each row, the score of each label, in the order of its labels.
        chosen: of each row, the index of the label with the highest score.
    """

    name: str | None
    scores: Scores
    logprobs: list[list[float]]
    chosen: list[int]


@dataclass(frozen=True)
class Evaluation:
    """All results, and what they took.

    Attributes:
        results: in the order of the contestants.
        num_rows: rows of the data.
        seconds: in the engine.
    """

    results: list[Result]
    num_rows: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rows a second; a row counts once for each contestant."""
        return self.num_rows * len(self.results) / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class _Ballot:
    """A contestant's rows as token ids: a prompt and the right label of each, and every label."""

    prompts: list[tuple[int, ...]]
    right: list[int]
    label_ids: list[tuple[int, ...]]


def evaluate(
    engine: OfflineEngine,
    encoder: Encoder,
    contestants: Sequence[Contestant],
    rows: Sequence[Row],
    *,
    normalization: Normalization = "sum",
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Evaluation:
    """Rank the labels after every row, for all contestants together.

    Args:
        engine: has the adapters.
        encoder: the base's tokenizer.
        contestants: at least one.
        rows: at least one.
        normalization: a label's score is the log-likelihood of separator, label and (where the
            adapter learned it) end of sequence: their sum, or their mean a token.
        on_progress: called with the rankings of one label that are done, and all there are.

    Raises:
        JobInvalid, DataInvalid, TemplateInvalid: templates or labels do not fit the rows.
        GenerationFailed: the engine gave a row up.
    """
    ballots = [_ballot(engine.spec, encoder, one, rows) for one in contestants]
    targets: list[Target] = [
        (one.name, ballot.prompts[row], ids)
        for row in range(len(rows))
        for one, ballot in zip(contestants, ballots, strict=True)
        for ids in ballot.label_ids
    ]
    began = time.monotonic()
    found = iter(engine.score(targets, lambda done: on_progress(done, len(targets))))
    seconds = time.monotonic() - began
    logprobs: list[list[list[float]]] = [[] for _ in contestants]
    for _ in rows:
        for number, ballot in enumerate(ballots):
            logprobs[number].append(
                [
                    next(found) / (len(ids) if normalization == "mean" else 1)
                    for ids in ballot.label_ids
                ]
            )
    results = [
        _result(one.name, own, ballot.right)
        for one, own, ballot in zip(contestants, logprobs, ballots, strict=True)
    ]
    return Evaluation(results, len(rows), seconds)


def _ballot(
    spec: BaseModelSpec, encoder: Encoder, contestant: Contestant, rows: Sequence[Row]
) -> _Ballot:
    wording = contestant.wording
    renderer = Renderer(wording.row_format(), encoder)
    label_ids = renderer.label_ids()
    if label_ids is None or len(label_ids) < 2:
        raise JobInvalid(
            f"labels: expected at least two, came {len(label_ids or ())}",
            field="labels",
            expected="at least two labels",
            came=str(len(label_ids or ())),
        )
    examples = [
        _example(renderer, row, number, wording.labels) for number, row in enumerate(rows, start=1)
    ]
    # Held out: a row must leave room for the longest label.
    longest = spec.max_positions - contestant.num_virtual_tokens
    max_length = min(wording.max_length or longest, longest)
    fitted = fit(Examples([], examples, label_ids), max_length, wording.on_too_long).held_out
    right = [example.label for example in fitted if example.label is not None]
    return _Ballot([example.prompt_ids for example in fitted], right, label_ids)


def _example(renderer: Renderer, row: Row, number: int, labels: Sequence[str]) -> Example:
    # Not `Renderer.examples`: rows of one class are no reason to refuse here.
    text = renderer.target_text(row, number)
    prompt, types = renderer.prompt(row, number)
    ids = renderer.target_ids(text)
    return Example(prompt.ids, ids, labels.index(text), number, types + (LABEL,) * len(ids))


def _result(name: str | None, logprobs: list[list[float]], right: list[int]) -> Result:
    chosen = [row.index(max(row)) for row in logprobs]
    return Result(name, score(chosen, right), logprobs, chosen)


# --- by a server ------------------------------------------------------------------------------


def evaluate_remotely(
    server: RemoteServer,
    contestants: Sequence[Contestant],
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
        normalization: as for `evaluate`.
        on_progress: called with the rows that are done, and all there are, once for each contestant.

    Raises:
        DataInvalid: templates or labels do not fit the rows.
        ServerRefused: the server ranked nothing.
    """
    right = [_right_labels(one.wording, rows) for one in contestants]
    work = [
        (one, begin, _body(one, rows[begin : begin + _ROWS_AT_ONCE], begin, normalization))
        for begin in range(0, len(rows), _ROWS_AT_ONCE)
        for one in contestants
    ]
    done, lock = 0, threading.Lock()
    found: dict[tuple[str | None, int], list[list[float]]] = {}

    def rank(one: Contestant, begin: int, body: dict[str, Any]) -> None:
        nonlocal done
        replies = server.post("/classify", body, adapter=one.name)
        logprobs = [[reply["logprobs"][label] for label in one.wording.labels] for reply in replies]
        with lock:
            found[one.name, begin] = logprobs
            done += len(logprobs)
            on_progress(done, len(rows) * len(contestants))

    began = time.monotonic()
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for future in [pool.submit(rank, *one) for one in work]:
            future.result()
    seconds = time.monotonic() - began
    begins = range(0, len(rows), _ROWS_AT_ONCE)
    results = [
        _result(one.name, [row for begin in begins for row in found[one.name, begin]], own)
        for one, own in zip(contestants, right, strict=True)
    ]
    return Evaluation(results, len(rows), seconds)


def _body(
    one: Contestant, rows: Sequence[Row], begin: int, normalization: Normalization
) -> dict[str, Any]:
    wording = one.wording
    template = Template.parse(
        wording.template, keep_trailing_space=wording.tokenization == "as_written"
    )
    options = {"labels": wording.labels, "normalization": _NORMALIZATIONS[normalization]}
    try:
        texts = [template.fill(row).text for row in rows]
    except TemplateInvalid as error:
        number = next(n for n, row in enumerate(rows) if not {*template.required} <= row.keys())
        raise DataInvalid(
            f"row {begin + number + 1}: {error.message}",
            row=begin + number + 1,
            expected=error.expected,
            came=error.came,
        ) from error
    if one.is_stored:  # as in training: what stands in a row is never a special token
        kept = [{name: row[name] for name in template.columns if name in row} for row in rows]
        return {**options, "rows": kept}
    return {**options, "inputs": texts, "raw": True}  # rendered here, by another template


def _right_labels(wording: Wording, rows: Sequence[Row]) -> list[int]:
    """The index of each row's own label."""
    indices = {label: index for index, label in enumerate(wording.labels)}
    right: list[int] = []
    for number, row in enumerate(rows, start=1):
        if wording.target not in row:
            raise DataInvalid(
                f"row {number}: has no column {wording.target!r}, the target column",
                row=number,
                expected=wording.target,
                came=", ".join(row),
            )
        text = text_of(row[wording.target])
        label = (wording.label_names or {}).get(text, text)
        if label not in indices:
            raise DataInvalid(
                f"row {number}: {wording.target} is {text[:80]!r}, which is none of the labels",
                row=number,
                expected=", ".join(wording.labels),
                came=text[:80],
            )
        right.append(indices[label])
    return right
