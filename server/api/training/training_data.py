"""Rows of any kind as rows to train on: which shape they have, and what makes prompts of them.

    template and target are given    the columns that they name are read
    a known shape of columns         its template and target, see `adapters.training.shapes`
    conversations                    one row for every message of the assistant; the base's chat template
                                     makes the prompt of what stands before it

Shared by `POST /train`, `/v1/fine_tuning/jobs` and the command line. Knows no method.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapters.errors import DataInvalid, JobInvalid
from adapters.template import Row, Template
from adapters.training.job import JobRequest, Prompts, TrainingOptions, TrainingRequest
from adapters.training.row_source import FileFacts, Source, Used
from adapters.training.rows import DataLimits, check_sources, inline_sources, open_rows
from adapters.training.shapes import (
    CHATS,
    MESSAGES,
    Format,
    conversation_of,
    find_format,
    known_shapes,
    shape_of,
)
from server.api.error_replies import quoted
from server.api.training.openai.conversations import turns
from server.errors import Contradiction, RequestInvalid
from server.text.tokenizer import TextTokenizer

PROMPT, COMPLETION = "prompt", "completion"
# What only a template has a use for.
_NOT_WITH_CHAT = ("template", "target", "target_separator", "tokenization")
_MAX_LISTED = 50


@dataclass(frozen=True)
class Wish:
    """What a request says about the shape of its rows.

    Attributes:
        format: the shape, if it is given.
        template: makes prompts, if it is given.
        target: the column to answer, if it is given.
        given: names of the request's fields that were given.
        place: where those fields stand, such as "method.ia3."; for messages.
        source: the parameter that brought the rows; for messages.
    """

    format: Format | None
    template: str | None
    target: str | None
    given: frozenset[str] = frozenset()
    place: str = ""
    source: str = "data"

    @classmethod
    def of(cls, request: JobRequest) -> Wish:
        """What a request of `/train` or of the command line says."""
        given = given_fields(request)
        return cls(request.format, request.template, request.target, given)

    def used(self) -> Used | None:
        """The columns that the request itself names, if it names them.

        Raises:
            TemplateInvalid: the template does not parse.
        """
        if self.template is None or self.target is None:
            return None
        return used_of(self.template, self.target)


def given_fields(options: TrainingOptions) -> frozenset[str]:
    """Names of the fields whose values are not the defaults."""
    fields = type(options).model_fields
    return frozenset(
        name for name in options.model_fields_set if getattr(options, name) != fields[name].default
    )


def used_of(template: str, target: str) -> Used:
    """The columns that a template and a target name."""
    parsed = Template.parse(template)
    return Used(tuple(dict.fromkeys((*parsed.required, target))), parsed.optional)


@dataclass(frozen=True)
class DataFacts:
    """What was understood of the data, for a dry run.

    Attributes:
        format: the shape of the rows.
        layout: such as "JSON lines"; "rows" for rows in the request itself.
        encoding: such as "UTF-8"; None for rows in the request.
        separator: of CSV, by its name.
        columns_used: columns that make prompts and targets.
        columns_unused: columns of the header or of the first row that are not read.
    """

    format: Format
    layout: str
    encoding: str | None
    separator: str | None
    columns_used: tuple[str, ...]
    columns_unused: tuple[str, ...]


@dataclass(frozen=True)
class TrainingData:
    """Rows, and how a prompt is made of each.

    Attributes:
        rows: the rows.
        template: makes prompts.
        target: the column to answer.
        separator: stands between prompt and target; None leaves it to the request and the template.
        prompts: see `adapters.training.job.TrainingJob`.
        places: of conversations, where each row comes from; else empty.
        facts: what was understood.
        warnings: what a reader might not expect, a sentence each.
    """

    rows: list[Row]
    template: str
    target: str
    separator: str | None
    prompts: Prompts
    places: list[str]
    facts: DataFacts
    warnings: list[str] = field(default_factory=list)

    def resolve(self, request: JobRequest) -> TrainingRequest:
        """The request with what the data decides."""
        known = request.model_dump()
        if known["target_separator"] is None:
            known["target_separator"] = self.separator
        known |= {"template": self.template, "target": self.target, "format": self.facts.format}
        return TrainingRequest.model_validate(known)

    @contextmanager
    def naming_places(self) -> Iterator[None]:
        """Refusals of a row that a conversation became name the conversation."""
        try:
            yield
        except DataInvalid as error:
            if self.places:
                tell_place(error, self.places)
            raise


def tell_place(error: DataInvalid, places: Sequence[str]) -> str | None:
    """Put the places of rows into a refusal that counts rows; the place of the first, if it has one."""
    if error.row is None or error.row > len(places):
        return None
    place = places[error.row - 1]
    message = re.sub(rf"\brow {error.row}\b(?! \()", lambda _: place, error.message, count=1)

    def placed(match: re.Match[str]) -> str:
        numbers = [int(number) for number in match[1].split(", ")]
        known = [places[number - 1] for number in numbers if 0 < number <= len(places)]
        return f"({'; '.join(known)}" if len(known) == len(numbers) else match[0]

    message = re.sub(r"\(rows (\d{1,9}(?:, \d{1,9})*)", placed, message, count=1)
    error.message = message
    error.args = (message,)
    return place


def read_file(
    path: Path, wish: Wish, tokenizer: TextTokenizer | None, limits: DataLimits
) -> TrainingData:
    """The rows of a file.

    Raises:
        UnsupportedFile: the file is no text.
        DataInvalid: a row that cannot be read, see `adapters.training.rows.read_rows`.
        JobInvalid, RequestInvalid, Contradiction: see `understand`.
    """
    with open_rows(path, limits, _expected(wish)) as file:
        return understand(file.sources, file.facts, wish, tokenizer, limits)


def read_inline(
    rows: Iterable[Any], wish: Wish, tokenizer: TextTokenizer | None, limits: DataLimits
) -> TrainingData:
    """The rows of a request, see `read_file`."""
    facts = FileFacts("rows", "")
    return understand(inline_sources(rows), facts, wish, tokenizer, limits)


def understand(
    sources: Iterable[Source],
    facts: FileFacts,
    wish: Wish,
    tokenizer: TextTokenizer | None,
    limits: DataLimits,
) -> TrainingData:
    """Find the shape of rows, and read them.

    Args:
        sources: the rows.
        facts: what was understood of their file.
        wish: what the request says.
        tokenizer: the base's, with its chat template; None for rows that are no conversations.
        limits: on rows, bytes and values.

    Raises:
        DataInvalid: a row that cannot be read, or a conversation with nothing to learn.
        JobInvalid: the rows are not of the format that is given.
        RequestInvalid: no template and no known shape, or conversations and no chat template.
        Contradiction: a template, and a shape that has none.
    """
    iterator = iter(sources)
    first = list(itertools.islice(iterator, 1))
    if not first or not isinstance(first[0].row, dict):
        check_sources(first, limits)  # raises
    row = first[0].row
    columns = facts.columns or tuple(name for name in row if isinstance(name, str))
    chosen = _format(wish, columns, row, facts.header_hint)
    known = replace(facts, columns=columns, notes=facts.notes)
    everything = itertools.chain(first, iterator)
    if chosen in CHATS:
        return _Chats(chosen, wish, tokenizer, limits).read(everything, known)
    template, target, separator = _wording(chosen, wish, columns)
    used = used_of(template, target)
    rows = check_sources(everything, limits, used)
    found = _facts(chosen, known, used.names)
    return TrainingData(rows, template, target, separator, "template", [], found, list(known.notes))


# --- the shape ---------------------------------------------------------------------------------


def is_chat(facts: FileFacts, row: Any, wish: Wish) -> bool:
    """Whether rows are conversations, by what the request says and by the first row."""
    if wish.format is not None or wish.template is not None or not isinstance(row, dict):
        return wish.format in CHATS
    return find_format(facts.columns, row) in CHATS


def _expected(wish: Wish) -> Used | None:
    return None if wish.format in CHATS else wish.used()


def _format(wish: Wish, columns: tuple[str, ...], row: dict[str, Any], hint: str) -> Format:
    """The shape that was asked for, or that the columns plainly have."""
    if wish.format is not None and wish.format != "columns":
        return wish.format
    if (wish.template is None) != (wish.target is None):
        missing = "template" if wish.template is None else "target"
        raise RequestInvalid(
            f"{wish.place}{missing}: template and target are given together, or neither; the columns "
            f"of the data are {_listed(columns)}",
            field=f"{wish.place}{missing}",
            expected="a text",
            came="nothing",
        )
    if wish.template is not None:
        return "columns"
    found = None if wish.format == "columns" else find_format(columns, row)
    if found is None:
        raise RequestInvalid(
            f"{'' if wish.source == 'data' else f'{wish.source}: '}{wish.place}template and "
            f"{wish.place}target are missing; give both for the columns of the data, {_listed(columns)}, "
            f"or rows of a known shape ({known_shapes()}){hint}",
            field="template" if wish.source == "data" else wish.source,
            expected="template and target, or rows of a known shape",
            came=_listed(columns),
        )
    return found


def _wording(chosen: Format, wish: Wish, columns: tuple[str, ...]) -> tuple[str, str, str | None]:
    """Template, target and separator; what the request gives takes the place of the shape's."""
    if chosen == "columns":
        return wish.template or "", wish.target or "", None
    try:
        shape = shape_of(chosen, columns)
    except JobInvalid:
        if wish.template is None or wish.target is None:
            raise
        return wish.template, wish.target, None
    separator = shape.separator if wish.template is None else None
    return wish.template or shape.template, wish.target or shape.target, separator


def _facts(chosen: Format, facts: FileFacts, used: tuple[str, ...]) -> DataFacts:
    return DataFacts(
        format=chosen,
        layout=facts.layout,
        encoding=facts.encoding or None,
        separator=facts.separator,
        columns_used=tuple(name for name in facts.columns if name in used)[:_MAX_LISTED],
        columns_unused=tuple(name for name in facts.columns if name not in used)[:_MAX_LISTED],
    )


class _Chats:
    """Reads conversations."""

    def __init__(
        self, chosen: Format, wish: Wish, tokenizer: TextTokenizer | None, limits: DataLimits
    ) -> None:
        self._format = chosen
        self._limits = limits
        self._places: list[str] = []
        self._num_dropped = 0
        for name in _NOT_WITH_CHAT:
            if name in wish.given:
                raise Contradiction(
                    f"{wish.place}{name}: the base's chat template decides it for conversations "
                    f"(format {chosen})",
                    field=f"{wish.place}{name}",
                    expected="the field left out",
                    came="a value",
                )
        if tokenizer is None or tokenizer.chat_template is None:
            raise RequestInvalid(
                f"{wish.source}: it has messages, and the base has no chat template; send prompt and "
                "completion, or a template and a target",
                field=wish.source,
                expected="a base with a chat template",
                came="a base without one",
            )
        self._tokenizer = tokenizer

    def read(self, sources: Iterable[Source], facts: FileFacts) -> TrainingData:
        # One at a time: a long conversation makes many prompts, and the limits count them.
        rows = check_sources(self._rows(sources), self._limits)
        warnings = list(facts.notes)
        if self._num_dropped:
            warnings.append(
                f"{self._num_dropped} messages are left out: an answer before any question, or a "
                "question after the last answer"
            )
        names = (MESSAGES, "conversations", "conversation", "system")
        used = tuple(name for name in facts.columns if name in names)
        return TrainingData(
            rows,
            f"{{{PROMPT}}}",
            COMPLETION,
            "",
            "chat",
            self._places,
            _facts(self._format, facts, used),
            warnings,
        )

    def _rows(self, sources: Iterable[Source]) -> Iterator[Source]:
        for number, source in enumerate(sources, start=1):
            line = source.row
            if not isinstance(line, dict):
                yield source  # refused with the usual words
                return
            place = source.place
            if self._format == "sharegpt":
                conversation = conversation_of(line, place, number)
                self._num_dropped += conversation.num_dropped
                line = {MESSAGES: conversation.messages}
            for turn in turns(line, place, len(self._places) + 1, self._tokenizer):
                self._places.append(place)
                yield Source({PROMPT: turn.prompt, COMPLETION: turn.answer}, place)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(quoted(name) for name in names[:20]) or "none"
