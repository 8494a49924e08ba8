"""Renders one row to text and token ids: template, target, separator, end of sequence.

The ids of an example are tokens(prompt) + tokens(separator + target) + end of sequence. Training,
ranking and inference with a stored template all use this form. Length limits, splits and random draws
are handled elsewhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapters.errors import DataInvalid, JobInvalid, TemplateInvalid
from adapters.template import DEFAULT_SEPARATOR, Filled, Row, Template, Tokenization, text_of
from adapters.training.encoding import Encoder
from adapters.training.job import Prompts

# CPT's token types; 0 is a token that the tokenizer added to the text.
ADDED, TEMPLATE_BEFORE, INPUT, TEMPLATE_AFTER, LABEL = 0, 1, 2, 3, 4
# Separates the examples of a context.
EXAMPLE_SEPARATOR = "\n"
_SHOWN = 80
_COMPARED = 200
_ROWS_NAMED = 5


@dataclass(frozen=True)
class RowFormat:
    """How rows become prompts and targets; the fields are those of `TrainingJob`."""

    template: str
    target: str
    labels: list[str] | None = None
    label_names: dict[str, str] | None = None
    target_separator: str = DEFAULT_SEPARATOR
    append_eos: bool = True
    tokenization: Tokenization = "boundary"
    prompts: Prompts = "template"


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    Attributes:
        prompt_ids: the rendered template, with the special tokens that the tokenizer adds.
        target_ids: separator and target, then the end of sequence where the job appends it.
        label: index into the job's labels; None without labels.
        row: row number in the data, from 1.
        types: CPT type of each token of prompt and target: 1 template before the last column's value,
            2 values, 3 template after it, 4 target and its end of sequence, 0 added by the tokenizer.
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
class EncodedText:
    """A tokenized text.

    Attributes:
        text: the text.
        ids: its tokens.
        spans: half-open character range of each token.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Renderer:
    """Renders and encodes rows.

    Args:
        row_format: template, labels and token boundaries.
        encoder: the base's tokenizer.

    Raises:
        TemplateInvalid: the template does not parse.
        JobInvalid: the template contains the target column, or the tokenizer has no end of sequence.
    """

    def __init__(self, row_format: RowFormat, encoder: Encoder) -> None:
        self._format = row_format
        self._encoder = encoder
        self._template = parse_template(row_format)
        self._end = _end_ids(row_format, encoder)
        self._indices = {label: index for index, label in enumerate(row_format.labels or ())}
        self._targets: dict[str, tuple[int, ...]] = {}  # labels repeat

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Examples for all rows, in order, without a length limit.

        Raises:
            DataInvalid: no rows, a single class, a missing column, or a target that is empty or not a
                label.
        """
        if not rows:
            raise DataInvalid(
                "there are no rows: expected at least one",
                field="rows",
                expected="at least one row",
                came="none",
            )
        self._refuse_empty_targets(rows)
        texts = [self.target_text(row, number) for number, row in enumerate(rows, start=1)]
        if len(texts) > 1 and len(set(texts)) == 1:
            raise DataInvalid(
                f"all {len(texts)} rows have the same target, {texts[0][:_SHOWN]!r}: there is nothing "
                "to learn from one class",
                field=self._format.target,
                expected="at least two different targets",
                came=repr(texts[0][:_SHOWN]),
            )
        return [
            self._example(row, text, number)
            for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1)
        ]

    def target_text(self, row: Row, number: int) -> str:
        """The target as text.

        Raises:
            DataInvalid: no target, a value without a label name, or a text that is not a label.
        """
        row_format = self._format
        if row_format.target not in row:
            raise _no_column(row_format.target, "the target column", row, number)
        text = text_of(row[row_format.target])
        if row_format.label_names is not None:
            spelling = next((s for s in _spellings(text) if s in row_format.label_names), None)
            if spelling is None:
                raise _unknown(
                    text, row_format.label_names, "a value that label_names has", row_format, number
                )
            text = row_format.label_names[spelling]
        if row_format.labels is not None and text not in self._indices:
            raise _unknown(text, row_format.labels, "one of the labels", row_format, number)
        return text

    def prompt(self, row: Row, number: int) -> tuple[EncodedText, tuple[int, ...]]:
        """A row's prompt and the type of each of its tokens.

        Raises:
            DataInvalid: a column is missing, or the prompt has no tokens.
        """
        filled = self._filled(row, number)
        encoded = self._encode_prompt(filled.text)
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
        return self._encode(self._format.target_separator + text, add_special_tokens=False)

    def target_ids(self, text: str) -> tuple[int, ...]:
        """The ids of separator, target and end of sequence; the last alone if the text has no tokens."""
        if text not in self._targets:
            self._targets[text] = (*self.target(text).ids, *self._end)
        return self._targets[text]

    def label_ids(self) -> list[tuple[int, ...]] | None:
        """Token ids of every label as a target, see `Examples.label_ids`.

        Raises:
            JobInvalid: a label has no tokens, or two labels have the same tokens.
        """
        if self._format.labels is None:
            return None
        found: dict[tuple[int, ...], str] = {}
        for label in self._format.labels:
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
        """Concatenates examples into a context. Returns ids and CPT types, (n,) each.

        Example k adds 4k to its types. The end of sequence, the separators and the tokens added by the
        tokenizer have type 0; the latter appear before the first example only.
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
        target = self.target_text(row, number)
        return self._filled(row, number).text + self._format.target_separator + target

    def text_ids(self, text: str, *, rendered: bool = False) -> tuple[int, ...]:
        """The ids of a text, without added special tokens.

        Args:
            text: any text.
            rendered: the text consists of results of `text`.
        """
        plain = not rendered or self._format.prompts == "template"
        return self._encode(text, add_special_tokens=False, plain=plain).ids

    def token_text(self, token_id: int, covered: str) -> str | None:
        r"""A token as text; None for one without characters.

        A token that begins or ends inside a character shows that character's bytes, such as `\xe6`.

        Args:
            token_id: the token.
            covered: the characters that it covers, wholly or in part.
        """
        if not covered or covered.isascii():
            return covered or None
        data = self._encoder.token_bytes(token_id)
        return data.decode("utf-8", "backslashreplace") if not _is_text(data) else covered

    def _refuse_empty_targets(self, rows: Sequence[Row]) -> None:
        """Refuse all rows without an answer at once: who cleans a file wants to know each of them."""
        target = self._format.target
        if "" in (self._format.label_names or ()):
            return
        empty = [number for number, row in enumerate(rows, start=1) if row.get(target) == ""]
        if empty:
            raise DataInvalid(
                f"column {target[:_SHOWN]!r}, the target, is empty in {len(empty)} of {len(rows)} rows "
                f"({listed_rows(empty)}); write an answer there, or remove these rows",
                row=empty[0],
                field=target,
                expected="an answer in every row",
                came=f"{len(empty)} empty",
            )

    def _filled(self, row: Row, number: int) -> Filled:
        try:
            return self._template.fill(row)
        except TemplateInvalid:
            missing = next(name for name in self._template.required if name not in row)
            raise _no_column(missing, "a column of the template", row, number) from None

    def _encode_prompt(self, text: str) -> EncodedText:
        # A chat template writes all special tokens itself, including the first.
        is_chat = self._format.prompts == "chat"
        return self._encode(text, add_special_tokens=not is_chat, plain=not is_chat)

    def _encode(self, text: str, *, add_special_tokens: bool, plain: bool = True) -> EncodedText:
        ids, spans = self._encoder.encode_with_offsets(
            text, add_special_tokens=add_special_tokens, plain=plain
        )
        return EncodedText(text, tuple(ids), tuple(spans))

    def _example(self, row: Row, target: str, number: int) -> Example:
        prompt, types = self.prompt(row, number)
        target_ids = self.target_ids(target)
        if len(target_ids) == len(self._end):
            raise DataInvalid(
                f"row {number}: the target in column {self._format.target[:_SHOWN]!r} has no tokens; "
                "remove rows without an answer",
                row=number,
                field=self._format.target,
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


def listed_rows(numbers: Sequence[int]) -> str:
    """The first of some row numbers, for a message: "rows 1, 2, 3, 4, 5, …"."""
    listed = ", ".join(map(str, numbers[:_ROWS_NAMED]))
    more = ", …" if len(numbers) > _ROWS_NAMED else ""
    return f"{'row' if len(numbers) == 1 else 'rows'} {listed}{more}"


def parse_template(row_format: RowFormat) -> Template:
    """Parse the template; "as_written" keeps its trailing white space.

    Raises:
        TemplateInvalid: the template does not parse.
        JobInvalid: it has no column, or it contains the target column.
    """
    as_written = row_format.tokenization == "as_written"
    template = Template.parse(row_format.template, keep_trailing_space=as_written)
    if not template.columns:
        hint = "; {{ and }} are the braces themselves: write {column} in single braces"
        raise JobInvalid(
            "template: it names no column, so every prompt would be the same"
            f"{hint if '{{' in row_format.template else ''}",
            field="template",
            expected="at least one {column}",
            came=repr(row_format.template[:_SHOWN]),
        )
    if row_format.target in template.columns:
        raise JobInvalid(
            f"template: it holds the target column {row_format.target[:_SHOWN]!r}, which would give the "
            "answer away",
            field="template",
            expected="columns other than the target",
            came=repr(row_format.target[:_SHOWN]),
        )
    return template


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _spellings(text: str) -> tuple[str, ...]:
    """How a value may be written in `label_names`.

    pandas writes 1 as 1.0 where the column has a cell without a value, and true as True.
    """
    whole = text.removesuffix(".0")
    others = (whole,) if whole.lstrip("-").isdigit() else ()
    return (text, *others, text.capitalize()) if text in ("true", "false") else (text, *others)


def _types(prompt: EncodedText, ranges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The type of every token of a prompt, determined by its last character.

    A token that starts with the white space before a word therefore has the word's type.
    """
    kinds = bytearray([TEMPLATE_BEFORE]) * len(prompt.text)
    for start, stop in ranges:
        kinds[start:stop] = bytearray([INPUT]) * (stop - start)
    last = ranges[-1][1] if ranges else 0
    kinds[last:] = bytearray([TEMPLATE_AFTER]) * (len(kinds) - last)
    return tuple(kinds[stop - 1] if start < stop else ADDED for start, stop in prompt.spans)


def _end_ids(row_format: RowFormat, encoder: Encoder) -> tuple[int, ...]:
    if not row_format.append_eos:
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
    text: str, known: Iterable[str], what: str, row_format: RowFormat, number: int
) -> DataInvalid:
    names = list(known)
    near = difflib.get_close_matches(text[:_COMPARED], names, n=3, cutoff=0.5)
    listed = ", ".join(repr(name[:_SHOWN]) for name in (near or names[:10]))
    return DataInvalid(
        f"row {number}: column {row_format.target[:_SHOWN]!r} holds {text[:_SHOWN]!r}, expected {what}: "
        f"{'near ones are ' if near else ''}{listed}",
        row=number,
        field=row_format.target,
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
