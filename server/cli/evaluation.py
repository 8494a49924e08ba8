"""Adapters and the base side by side: which label each holds most likely, row by row.

Every row is rendered as the adapter was trained to see it. All rows, labels and adapters run as one
mixed batch of the engine. Knows no command and no registry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from adapters.base_model import BaseModelSpec
from adapters.errors import JobInvalid
from adapters.template import Tokenization
from adapters.training.encoding import Encoder
from adapters.training.examples import Example, Examples, fit
from adapters.training.job import OnTooLong
from adapters.training.ranking import Scores, score
from adapters.training.rendering import LABEL, Renderer, RowFormat
from adapters.training.rows import Row
from server.engine.offline import OfflineEngine, Target

Normalization = Literal["sum", "mean"]

_LENGTHS = ("max_length", "on_too_long")


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


def require_words(name: str, words: Mapping[str, object]) -> None:
    """Without these nothing can be ranked.

    Args:
        name: whose words they are, for the message.

    Raises:
        JobInvalid: neither stored nor given.
    """
    for field in ("template", "target", "labels"):
        if not words.get(field):
            raise JobInvalid(
                f"{name} has no stored {field}; give --{field}",
                field=field,
                expected=f"--{field}",
                came="none",
            )


@dataclass(frozen=True)
class Contestant:
    """One that is evaluated.

    Attributes:
        name: what `OfflineEngine.add_adapter` was told; None is the base.
        wording: how rows are put to it.
        num_virtual_tokens: positions that it takes.
    """

    name: str | None
    wording: Wording
    num_virtual_tokens: int = 0


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
        JobInvalid, DataInvalid, TemplateInvalid: words and rows do not go together.
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
