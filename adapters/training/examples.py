"""Rows as token ids: what stands in the prompt, what must be answered, what every token is.

The ids of an example are tokens(prompt) + tokens(separator + target) + end of sequence, the same here,
in ranking and at inference with a stored template. Nothing is random but by the job's seeds, so the
server, the worker and the command line make the same examples. Knows no tensors and no model.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from adapters.errors import DataInvalid, JobInvalid, TemplateInvalid
from adapters.template import Template, text_of
from adapters.training.encoding import Encoder
from adapters.training.job import TrainingJob
from adapters.training.rows import Row

# Types of tokens, as CPT counts them; 0 is a token that the tokenizer added to the text.
ADDED, TEMPLATE_BEFORE, INPUT, TEMPLATE_AFTER, LABEL = 0, 1, 2, 3, 4
# Stands between the examples of a context.
EXAMPLE_SEPARATOR = "\n"
_SHOWN = 80
_COMPARED = 200


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    Attributes:
        prompt_ids: the rendered template, with what the tokenizer adds to a text.
        target_ids: separator and target, then the end of sequence where the job appends it.
        label: index into the job's labels; None without labels.
        row: which row of the data it is, counted from 1.
        types: of prompt and target, one a token: 1 template before the last column's value, 2 values,
            3 template after it, 4 target and its end of sequence; 0 what the tokenizer added.
    """

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    label: int | None
    row: int
    types: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and target together."""
        return len(self.prompt_ids) + len(self.target_ids)


@dataclass(frozen=True)
class Examples:
    """What a job trains on.

    Attributes:
        train: in the order of the rows.
        held_out: likewise; empty without a validation split.
        label_ids: every label as a target (separator, label, end of sequence), in the order of the
            job's labels; None without labels.
    """

    train: list[Example]
    held_out: list[Example]
    label_ids: list[tuple[int, ...]] | None


@dataclass(frozen=True)
class EncodedText:
    """A piece of text as tokens.

    Attributes:
        text: the piece.
        ids: its tokens.
        spans: the half-open range of characters of each.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def make_examples(job: TrainingJob, rows: Sequence[Row], encoder: Encoder) -> Examples:
    """Rows as the job trains on them.

    Raises:
        TemplateInvalid: the job's template does not parse.
        JobInvalid: a label without tokens, an end of sequence that the tokenizer lacks, a split that
            holds out nothing, or no row left to train on.
        DataInvalid: a row lacks a column, its target is not among the labels, or it is too long.
    """
    renderer = Renderer(job, encoder)
    train, held_out = split(job, renderer.examples(rows))
    if job.train_on_context is False:
        train = without_context(job, train)
    return fit(job, Examples(train, held_out, renderer.label_ids()))


class Renderer:
    """Renders and encodes rows by a job's template, labels and token boundaries.

    Args:
        job: max_length, config and seeds are not read.
        encoder: the base's tokenizer.

    Raises:
        TemplateInvalid: the template does not parse.
        JobInvalid: the target stands in the template, or the tokenizer has no end of sequence.
    """

    def __init__(self, job: TrainingJob, encoder: Encoder) -> None:
        self._job = job
        self._encoder = encoder
        self._template = parse_template(job)
        self._end = _end_ids(job, encoder)
        self._indices = {label: index for index, label in enumerate(job.labels or ())}
        self._targets: dict[str, tuple[int, ...]] = {}  # labels come again and again

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Every row, of any length, in order.

        Raises:
            DataInvalid: see `make_examples`; also one class only.
        """
        texts = [self.target_text(row, number) for number, row in enumerate(rows, start=1)]
        if len(texts) > 1 and len(set(texts)) == 1:
            raise DataInvalid(
                f"all {len(texts)} rows have the same target, {texts[0][:_SHOWN]!r}: there is nothing "
                "to learn from one class",
                field=self._job.target,
                expected="at least two different targets",
                came=repr(texts[0][:_SHOWN]),
            )
        return [
            self._example(row, text, number)
            for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1)
        ]

    def target_text(self, row: Row, number: int) -> str:
        """The target in words.

        Raises:
            DataInvalid: no target, a value without a name, or a word that is no label.
        """
        job = self._job
        if job.target not in row:
            raise _no_column(job.target, "the target column", row, number)
        text = text_of(row[job.target])
        if job.label_names is not None:
            if text not in job.label_names:
                raise _unknown(text, job.label_names, "a value that label_names has", job, number)
            text = job.label_names[text]
        if job.labels is not None and text not in self._indices:
            raise _unknown(text, job.labels, "one of the labels", job, number)
        return text

    def prompt(self, row: Row, number: int) -> tuple[EncodedText, tuple[int, ...]]:
        """A row's prompt, and the type of each of its tokens.

        Raises:
            DataInvalid: a column is missing, or the prompt has no tokens.
        """
        try:
            filled = self._template.fill(row)
        except TemplateInvalid:
            missing = next(name for name in self._template.columns if name not in row)
            raise _no_column(missing, "a column of the template", row, number) from None
        encoded = self._encode(filled.text, add_special_tokens=True)
        if all(start == stop for start, stop in encoded.spans):
            raise DataInvalid(
                f"row {number}: the prompt has no tokens",
                row=number,
                expected="a prompt of at least one token",
                came=repr(filled.text[:_SHOWN]),
            )
        return encoded, _types(encoded, filled.ranges)

    def target(self, text: str) -> EncodedText:
        """The separator and a target, without the end of sequence."""
        return self._encode(self._job.target_separator + text, add_special_tokens=False)

    def target_ids(self, text: str) -> tuple[int, ...]:
        """The ids of separator, target and end of sequence; only the last where there are no others."""
        if text not in self._targets:
            self._targets[text] = (*self.target(text).ids, *self._end)
        return self._targets[text]

    def label_ids(self) -> list[tuple[int, ...]] | None:
        """See `Examples.label_ids`.

        Raises:
            JobInvalid: a label has no tokens, or two labels have the same.
        """
        if self._job.labels is None:
            return None
        found: dict[tuple[int, ...], str] = {}
        for label in self._job.labels:
            ids = self.target_ids(label)
            if label == "" or len(ids) == len(self._end):
                raise _bad_label(label, "has no tokens", "a label of at least one token")
            if ids in found:
                raise _bad_label(
                    label, f"has the same tokens as {found[ids][:_SHOWN]!r}", "labels that differ"
                )
            found[ids] = label
        return list(found)

    def context_ids(self, examples: Sequence[Example]) -> tuple[list[int], list[int]]:
        """Examples one after another, as a context: ids and CPT's types of them, (n,) each.

        Example k adds 4k to its types; the end of sequence, the separators and what the tokenizer
        adds have type 0. What it adds stands before the first example only.
        """
        separator = self._encode(EXAMPLE_SEPARATOR, add_special_tokens=False).ids
        ids: list[int] = []
        types: list[int] = []
        for index, example in enumerate(examples):
            own = list(zip((*example.prompt_ids, *example.target_ids), example.types, strict=True))
            if self._end:
                own[-1] = (own[-1][0], ADDED)
            for position, (token, kind) in enumerate(own):
                is_added = kind == ADDED and position < len(example.prompt_ids)
                if index and is_added:
                    continue
                ids.append(token)
                types.append(0 if kind == ADDED else kind + 4 * index)
            ids += separator
            types += [0] * len(separator)
        return ids, types

    def text(self, row: Row, number: int) -> str:
        """Prompt, separator and target as one text."""
        words = self.target_text(row, number)
        return self.prompt(row, number)[0].text + self._job.target_separator + words

    def text_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a text, nothing added."""
        return self._encode(text, add_special_tokens=False).ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> EncodedText:
        ids, spans = self._encoder.encode_with_offsets(text, add_special_tokens=add_special_tokens)
        return EncodedText(text, tuple(ids), tuple(spans))

    def _example(self, row: Row, target: str, number: int) -> Example:
        prompt, types = self.prompt(row, number)
        target_ids = self.target_ids(target)
        if target == "" or len(target_ids) == len(self._end):
            raise DataInvalid(
                f"row {number}: the target in column {self._job.target!r} has no tokens",
                row=number,
                field=self._job.target,
                expected="a target of at least one token",
                came=repr(target[:_SHOWN]),
            )
        return Example(
            prompt_ids=prompt.ids,
            target_ids=target_ids,
            label=self._indices.get(target),
            row=number,
            types=types + (LABEL,) * len(target_ids),
        )


def parse_template(job: TrainingJob) -> Template:
    """The job's template; "as_written" keeps the white space at its end.

    Raises:
        TemplateInvalid: it does not parse.
        JobInvalid: it has no column, or it has the target's.
    """
    template = Template.parse(job.template, keep_trailing_space=job.tokenization == "as_written")
    if not template.columns:
        raise JobInvalid(
            "template: it names no column, so every prompt would be the same",
            field="template",
            expected="at least one {column}",
            came=repr(job.template[:_SHOWN]),
        )
    if job.target in template.columns:
        raise JobInvalid(
            f"template: it holds the target column {job.target[:_SHOWN]!r}, which would give the "
            "answer away",
            field="template",
            expected="columns other than the target",
            came=repr(job.target[:_SHOWN]),
        )
    return template


def split(job: TrainingJob, examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to train on and examples held out, drawn by the job's seed, each in row order.

    With labels every label gives its share, and keeps at least one example to train on.

    Raises:
        JobInvalid: the split is not 0 and would hold out nothing.
    """
    share = job.hyperparameters.validation_split
    if share == 0.0:
        return list(examples), []
    groups = list(by_label(examples).values())
    shuffled = random.Random(job.hyperparameters.seed)  # noqa: S311 (a draw, not a secret)
    for group in groups:
        shuffled.shuffle(group)
    counts = _shares([len(group) for group in groups], share)
    held_out = {
        example.row
        for group, count in zip(groups, counts, strict=True)
        for example in group[:count]
    }
    if not held_out:
        raise JobInvalid(
            f"hyperparameters.validation_split: {share} of {len(examples)} rows holds out nothing "
            "(every label keeps a row to train on)",
            field="hyperparameters.validation_split",
            expected="a share that holds out at least one row",
            came=str(share),
        )
    return (
        [example for example in examples if example.row not in held_out],
        [example for example in examples if example.row in held_out],
    )


def by_label(examples: Iterable[Example]) -> dict[int | None, list[Example]]:
    """Examples of each label, labels in order; all under None without labels."""
    groups: dict[int | None, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.label, []).append(example)
    return dict(sorted(groups.items(), key=lambda item: -1 if item[0] is None else item[0]))


def alternating(groups: Iterable[Sequence[Example]]) -> list[Example]:
    """One example of each group in turn, until all are used up."""
    queues = [list(group) for group in groups]
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def context_of(job: TrainingJob, train: Sequence[Example]) -> list[Example]:
    """The examples of CPT's context: labels alternate, drawn by `context_seed`.

    Raises:
        JobInvalid: it wants more examples than there are.
    """
    count = job.context_examples or 0
    if count > len(train):
        raise JobInvalid(
            f"context_examples is {count}, but there are {len(train)} rows to choose from",
            field="context_examples",
            expected=f"at most {len(train)}",
            came=str(count),
        )
    draw = random.Random(job.context_seed or 0)  # noqa: S311
    groups = list(by_label(train).values())
    for group in groups:
        draw.shuffle(group)
    draw.shuffle(groups)
    return alternating(groups)[:count]


def without_context(job: TrainingJob, train: Sequence[Example]) -> list[Example]:
    """The examples that are not in CPT's context.

    Raises:
        JobInvalid: none is left.
    """
    context = {example.row for example in context_of(job, train)}
    left = [example for example in train if example.row not in context]
    if not left:
        raise JobInvalid(
            f"train_on_context is false, and the context takes all {len(train)} rows",
            field="train_on_context",
            expected="true, or fewer context_examples than rows",
            came="false",
        )
    return left


def fit(job: TrainingJob, examples: Examples) -> Examples:
    """Hold every example to the job's `max_length`, or drop the beginning of its prompt.

    A held-out example must also hold the longest label, since each is ranked after its prompt.

    Raises:
        DataInvalid: too long and not to be truncated, or a target that is too long by itself.
    """
    longest = max((len(ids) for ids in examples.label_ids or ()), default=0)
    return replace(
        examples,
        train=[_fitted(job, example, 0) for example in examples.train],
        held_out=[_fitted(job, example, longest) for example in examples.held_out],
    )


def kept_tokens(prompt_types: Sequence[int], room: int) -> list[int]:
    """Which tokens of a prompt stay in `room` tokens: what the tokenizer put first, then the last."""
    count = len(prompt_types)
    if count <= room:
        return list(range(count))
    first = next((i for i, kind in enumerate(prompt_types) if kind != ADDED), count)
    first = min(first, room)
    return [*range(first), *range(count - (room - first), count)]


def _fitted(job: TrainingJob, example: Example, longest_label: int) -> Example:
    answer = max(len(example.target_ids), longest_label)
    num_prompt = len(example.prompt_ids)
    if num_prompt + answer <= job.max_length:
        return example
    room = job.max_length - answer
    prompt_types = example.types[:num_prompt]
    num_added = sum(kind == ADDED for kind in prompt_types)
    if job.on_too_long == "error" or room <= num_added:
        alone = (
            "" if job.on_too_long == "error" else f", {answer} of them the target, which is kept"
        )
        raise DataInvalid(
            f"row {example.row}: it has {num_prompt + answer} tokens{alone}; max_length is "
            f"{job.max_length}"
            + ("; on_too_long='truncate' drops the beginning of its prompt" if not alone else ""),
            row=example.row,
            expected=f"at most {job.max_length} tokens",
            came=f"{num_prompt + answer} tokens",
        )
    kept = kept_tokens(prompt_types, room)
    return replace(
        example,
        prompt_ids=tuple(example.prompt_ids[i] for i in kept),
        types=tuple(prompt_types[i] for i in kept) + example.types[num_prompt:],
    )


def _types(prompt: EncodedText, ranges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The type of every token of a prompt, by its last character.

    A token that begins with the white space before a word belongs to the word.
    """
    kinds = bytearray([TEMPLATE_BEFORE]) * len(prompt.text)
    for start, stop in ranges:
        kinds[start:stop] = bytearray([INPUT]) * (stop - start)
    last = ranges[-1][1]
    kinds[last:] = bytearray([TEMPLATE_AFTER]) * (len(kinds) - last)
    return tuple(kinds[stop - 1] if start < stop else ADDED for start, stop in prompt.spans)


def _shares(sizes: Sequence[int], share: float) -> list[int]:
    """How many each group gives: its share, rounded so that the sum is right; each keeps one."""
    exact = [size * share for size in sizes]
    counts = [min(int(want), size - 1) for want, size in zip(exact, sizes, strict=True)]
    wanted = round(sum(sizes) * share)
    # The groups that lost most by rounding down give one more; the order of labels breaks ties.
    for index in sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i]):
        if sum(counts) < wanted and counts[index] < sizes[index] - 1:
            counts[index] += 1
    return counts


def _end_ids(job: TrainingJob, encoder: Encoder) -> tuple[int, ...]:
    if not job.append_eos:
        return ()
    if encoder.eos_token_id is None:
        raise JobInvalid(
            "append_eos is true, but the base's tokenizer has no end-of-sequence token",
            field="append_eos",
            expected="false",
            came="true",
        )
    return (encoder.eos_token_id,)


def _no_column(name: str, what: str, row: Row, number: int) -> DataInvalid:
    columns = ", ".join(repr(column[:_SHOWN]) for column in list(row)[:20]) or "none"
    return DataInvalid(
        f"row {number}: {what}, {name[:_SHOWN]!r}, is missing; the row has {columns}",
        row=number,
        field=name,
        expected=f"a column {name[:_SHOWN]!r}",
        came=columns,
    )


def _unknown(
    text: str, known: Iterable[str], what: str, job: TrainingJob, number: int
) -> DataInvalid:
    names = list(known)
    near = difflib.get_close_matches(text[:_COMPARED], names, n=3, cutoff=0.5)
    listed = ", ".join(repr(name[:_SHOWN]) for name in (near or names[:10]))
    return DataInvalid(
        f"row {number}: column {job.target[:_SHOWN]!r} holds {text[:_SHOWN]!r}, expected {what}: "
        f"{'near ones are ' if near else ''}{listed}",
        row=number,
        field=job.target,
        expected=listed,
        came=repr(text[:_SHOWN]),
    )


def _bad_label(label: str, fault: str, expected: str) -> JobInvalid:
    return JobInvalid(
        f"labels: {label[:_SHOWN]!r} {fault}",
        field="labels",
        expected=expected,
        came=repr(label[:_SHOWN]),
    )
