"""Uploaded files as rows to train on: those of a training file, then those of a validation file.

`server.api.training.training_data` reads each. A refusal names the file, and the line or the row in it.
Knows no method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from adapters.errors import DataInvalid, UnsupportedFile
from adapters.template import Row
from adapters.training.job import Prompts
from adapters.training.row_source import DataLimits
from adapters.training.shapes import Format
from server.api.training.openai.body import Asked
from server.api.training.training_data import (
    TrainingData,
    Wish,
    given_fields,
    read_file,
    tell_place,
)
from server.errors import RequestInvalid, UploadNotFound
from server.store.files import FileStore
from server.text.tokenizer import TextTokenizer

FileField = Literal["training_file", "validation_file"]


@dataclass(frozen=True)
class TuningData:
    """Rows, and how a prompt is made of each.

    Attributes:
        rows: those of the training file, then those of the validation file.
        num_validation_rows: how many the latter are.
        template: makes prompts.
        target: the column to answer.
        separator: stands between the two; None leaves it to the template.
        prompts: see `adapters.training.job.TrainingJob`.
        format: the shape of the rows.
        places: where each row stands, for messages.
        warnings: what a reader might not expect.
    """

    rows: list[Row]
    num_validation_rows: int
    template: str
    target: str
    separator: str | None
    prompts: Prompts
    format: Format
    places: list[str]
    warnings: list[str]

    @contextmanager
    def naming_places(self) -> Iterator[None]:
        """Refusals of a row name its file and line, and the file as the parameter at fault."""
        try:
            yield
        except DataInvalid as error:
            place = tell_place(error, self.places)
            _name_field(error, (place or "training_file").partition(",")[0])
            raise


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
        UnsupportedFile: a file that is no text.
        DataInvalid: a line that is not what its file's form wants.
        RequestInvalid: a form that is not known, or that differs between the two files.
        Contradiction: the block says what the form decides.
    """
    reader = _Reader(files, asked, tokenizer, limits)
    training = reader.read("training_file", asked.body.training_file)
    rows, places = training.rows, _places("training_file", training)
    warnings, num_validation_rows = training.warnings, 0
    if asked.body.validation_file is not None:
        held_out = reader.read("validation_file", asked.body.validation_file)
        forms = (training.facts.format, held_out.facts.format)
        if forms[0] != forms[1] or training.template != held_out.template:
            raise RequestInvalid(
                f"validation_file: its lines are of the form {forms[1]!r} ({held_out.template!r}), those "
                f"of training_file {forms[0]!r} ({training.template!r})",
                field="validation_file",
                expected=forms[0],
                came=forms[1],
            )
        rows, places = rows + held_out.rows, places + _places("validation_file", held_out)
        warnings = [*warnings, *(f"validation_file: {one}" for one in held_out.warnings)]
        num_validation_rows = len(held_out.rows)
    return TuningData(
        rows,
        num_validation_rows,
        training.template,
        training.target,
        training.separator,
        training.prompts,
        training.facts.format,
        places,
        warnings,
    )


class _Reader:
    """Reads one file after another by what one body says."""

    def __init__(
        self, files: FileStore, asked: Asked, tokenizer: TextTokenizer, limits: DataLimits
    ) -> None:
        block = asked.block
        given = given_fields(block)
        self._wish = Wish(block.format, block.template, block.target, given, f"{asked.place}.")
        self._files = files
        self._tokenizer = tokenizer
        self._limits = limits

    def read(self, field: FileField, file_id: str) -> TrainingData:
        wish = replace(self._wish, source=field)
        with _naming_field(field):
            path = self._files.path(file_id)
            return read_file(path, wish, self._tokenizer, self._limits)


def _places(field: FileField, data: TrainingData) -> list[str]:
    places: Sequence[str] = data.places or [f"row {n}" for n in range(1, len(data.rows) + 1)]
    return [f"{field}, {place}" for place in places]


@contextmanager
def _naming_field(field: FileField) -> Iterator[None]:
    """Refusals name the parameter that named the file."""
    try:
        yield
    except (DataInvalid, UnsupportedFile, UploadNotFound) as error:
        _name_field(error, field)
        raise
    except FileNotFoundError as error:  # deleted while it was read
        raise UploadNotFound(f"{field}: the file was deleted a moment ago", field=field) from error


def _name_field(error: DataInvalid | UnsupportedFile | UploadNotFound, field: str) -> None:
    error.field = field
    if not error.message.startswith(field):
        separator = ", " if error.message.startswith("row ") else ": "
        error.message = f"{field}{separator}{error.message.removeprefix('data: ')}"
        error.args = (error.message,)
