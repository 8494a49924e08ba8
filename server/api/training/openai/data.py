"""Uploaded files as rows to train on: OpenAI's two forms, or plain rows for a template.

    {"messages": [...]}           one row for every assistant message; the base's chat template makes
                                  the prompt of what stands before it
    {"prompt": , "completion": }  the two as they are, one after the other
    any columns                   where the method's block has template and target

The first line decides. A refusal names the file, and the line or the row in it. Knows no method.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.errors import DataInvalid
from adapters.template import Row
from adapters.training.job import Prompts
from adapters.training.rows import DataLimits, Kind, check_rows, kind_of, read_objects, read_rows
from server.api.error_replies import quoted
from server.api.training.openai.body import Asked
from server.api.training.openai.conversations import MESSAGES, turns
from server.errors import Contradiction, RequestInvalid, UploadNotFound
from server.store.files import FileStore
from server.text.tokenizer import TextTokenizer

PROMPT, COMPLETION = "prompt", "completion"
FileField = Literal["training_file", "validation_file"]

# A line of messages with parts; what else a line may hold is not looked at.
_DEPTH = 64
# What only plain rows, or rows with a prompt, have a use for.
_NOT_WITH_CHAT = ("target_separator", "tokenization")


@dataclass(frozen=True)
class TuningData:
    """Rows, and how a prompt is made of each.

    Attributes:
        rows: those of the training file, then those of the validation file.
        num_validation_rows: how many the latter are.
        template: makes prompts.
        target: the column to answer.
        separator: stands between prompt and target; None leaves it to the template.
        prompts: see `adapters.training.job.TrainingJob`.
        places: where each row stands, for messages.
    """

    rows: list[Row]
    num_validation_rows: int
    template: str
    target: str
    separator: str | None
    prompts: Prompts
    places: list[str]

    @contextmanager
    def told_by_place(self) -> Iterator[None]:
        """Refusals of a row name its file and line, and the file as the parameter at fault."""
        try:
            yield
        except DataInvalid as error:
            _tell_place(error, self.places, "training_file")
            raise


@dataclass(frozen=True)
class _TuningFile:
    """One file as rows; `places` has as many."""

    form: Literal["chat", "completion", "plain"]
    rows: list[Row]
    places: list[str]


def read_data(
    files: FileStore, asked: Asked, tokenizer: TextTokenizer, limits: DataLimits
) -> TuningData:
    """Read the files that a body names.

    Args:
        files: where they are.
        asked: the body.
        tokenizer: the base's, with its chat template.
        limits: of each file.

    Raises:
        UploadNotFound: no such file.
        DataInvalid: a line that is not what its file's form wants.
        RequestInvalid: a form that is not known, or that differs between the two files.
        Contradiction: the block says what the form decides.
    """
    reader = _Reader(files, asked, tokenizer, limits)
    training = reader.read("training_file", asked.body.training_file)
    rows, places, num_validation_rows = training.rows, training.places, 0
    if asked.body.validation_file is not None:
        held_out = reader.read("validation_file", asked.body.validation_file)
        if held_out.form != training.form:
            raise RequestInvalid(
                f"validation_file: its lines are of the form {held_out.form!r}, those of "
                f"training_file {training.form!r}",
                field="validation_file",
                expected=training.form,
                came=held_out.form,
            )
        rows, places = rows + held_out.rows, places + held_out.places
        num_validation_rows = len(held_out.rows)
    block = asked.block
    if training.form == "plain":
        template, target = block.template or "", block.target or ""
        return TuningData(rows, num_validation_rows, template, target, None, "template", places)
    prompts: Prompts = "chat" if training.form == "chat" else "template"
    return TuningData(rows, num_validation_rows, f"{{{PROMPT}}}", COMPLETION, "", prompts, places)


class _Reader:
    """Reads one file after another by what one body says."""

    def __init__(
        self, files: FileStore, asked: Asked, tokenizer: TextTokenizer, limits: DataLimits
    ) -> None:
        self._files = files
        self._asked = asked
        self._tokenizer = tokenizer
        self._limits = limits

    def read(self, field: FileField, file_id: str) -> _TuningFile:
        with _told_by_field(field):
            path = self._files.path(file_id)
            kind = kind_of(self._files.get(file_id).filename) or "jsonl"
            if self._is_plain():
                return self._plain(field, path, kind)
            columns = self._columns(field, path, kind)
            if MESSAGES in columns:
                return self._chat(field, path)
            if PROMPT in columns and COMPLETION in columns:
                return self._completions(field, path, kind)
        raise RequestInvalid(
            f"{field}: its first line has {_listed(columns)}; expected messages, prompt with "
            f"completion, or {self._asked.place}.template and .target for other columns",
            field=field,
            expected="messages, or prompt and completion",
            came=_listed(columns),
        )

    def _is_plain(self) -> bool:
        """Whether the block says how prompts are made; template and target go together."""
        block, place = self._asked.block, self._asked.place
        if (block.template is None) == (block.target is None):
            return block.template is not None
        missing = "template" if block.template is None else "target"
        raise RequestInvalid(
            f"{place}.{missing}: template and target are given together, or neither",
            field=f"{place}.{missing}",
            expected="a text",
            came="nothing",
        )

    def _columns(self, field: FileField, path: Path, kind: Kind) -> list[str]:
        """Those of the first line."""
        if kind == "csv":
            return list(read_rows(path, kind, self._limits)[0])
        for _, line in read_objects(path, _DEPTH, self._limits):
            return list(line)
        raise DataInvalid(
            f"{field}: it has no rows: expected at least one",
            expected="at least one row",
            came="none",
        )

    def _plain(self, field: FileField, path: Path, kind: Kind) -> _TuningFile:
        rows = read_rows(path, kind, self._limits)
        return _TuningFile("plain", rows, [f"{field}, row {n}" for n in range(1, len(rows) + 1)])

    def _completions(self, field: FileField, path: Path, kind: Kind) -> _TuningFile:
        plain = self._plain(field, path, kind)
        return _TuningFile("completion", plain.rows, plain.places)

    def _chat(self, field: FileField, path: Path) -> _TuningFile:
        for name in _NOT_WITH_CHAT:
            if name in self._asked.block.model_fields_set:
                raise Contradiction(
                    f"{self._asked.place}.{name}: the base's chat template decides it for messages",
                    field=f"{self._asked.place}.{name}",
                    expected="the field left out",
                    came=quoted(getattr(self._asked.block, name)),
                )
        if self._tokenizer.chat_template is None:
            raise RequestInvalid(
                f"{field}: it has messages, and the base has no chat template; send prompt and "
                "completion, or a template and a target",
                field=field,
                expected="a base with a chat template",
                came="a base without one",
            )
        places: list[str] = []

        def rows() -> Iterator[Row]:
            for number, line in read_objects(path, _DEPTH, self._limits):
                place = f"{field}, line {number}"
                for turn in turns(line, place, len(places) + 1, self._tokenizer):
                    places.append(place)
                    yield {PROMPT: turn.prompt, COMPLETION: turn.answer}

        try:
            # One at a time: a long conversation makes many prompts, and the limits count them.
            return _TuningFile("chat", check_rows(rows(), self._limits), places)
        except DataInvalid as error:
            _tell_place(error, places, field)
            raise


@contextmanager
def _told_by_field(field: FileField) -> Iterator[None]:
    """Refusals name the parameter that named the file."""
    try:
        yield
    except (DataInvalid, UploadNotFound) as error:
        error.field = field
        if not error.message.startswith(field):
            _say(error, f"{field}: {error.message}")
        raise
    except FileNotFoundError as error:  # deleted while it was read
        raise UploadNotFound(f"{field}: the file was deleted a moment ago", field=field) from error


def _tell_place(error: DataInvalid, places: Sequence[str], otherwise: str) -> None:
    """Put the place of a row into a refusal that counts rows."""
    place = otherwise
    if error.row is not None and error.row <= len(places):
        place = places[error.row - 1]
        _say(error, re.sub(rf"\brow {error.row}\b", lambda _: place, error.message, count=1))
    elif not error.message.startswith(otherwise):
        _say(error, f"{otherwise}: {error.message}")
    error.field = place.partition(",")[0]


def _say(error: DataInvalid | UploadNotFound, message: str) -> None:
    error.message = message
    error.args = (message,)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(quoted(name) for name in names[:10]) or "no column"
