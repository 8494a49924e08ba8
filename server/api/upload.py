"""A multipart upload, written to disk while it arrives.

Starlette's own form parser would take everything first and limit nothing: here every byte is
counted, files go straight into a staging folder, and the work runs off the event loop. A route says
which fields and files its form has; what they hold is not known here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import anyio.to_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from adapters.field_errors import unknown_name
from adapters.synced_files import disk_failure_is_storage_error
from server.api.error_replies import invalid, quoted
from server.api.middleware.headers import body_too_large
from server.config.limits import Limits
from server.errors import RequestInvalid, WrongContentType

KIB = 1024


@dataclass(frozen=True)
class Form:
    """The form that a route takes.

    Attributes:
        fields: plain fields, and how many bytes each may have.
        files: name of the file parts.
        max_bytes: of the whole body.
        max_parts: fields and files together.
        example: curl's options that fill it in, for the error on another content type.
    """

    fields: Mapping[str, int]
    files: str
    max_bytes: int
    max_parts: int
    example: str


def small_fields(names: Collection[str], limits: Limits) -> dict[str, int]:
    """Fields that hold a word or a few."""
    return dict.fromkeys(names, limits.max_field_kib * KIB)


class UploadedFile(NamedTuple):
    """A file part: its name as the client gave it, where its bytes lie now, its content type."""

    name: str
    path: Path
    content_type: str


@dataclass
class Upload:
    """What came.

    Attributes:
        fields: plain fields; a repeated one has several values.
        files: the file parts, in order.
    """

    fields: dict[str, list[str]] = field(default_factory=dict)
    files: list[UploadedFile] = field(default_factory=list)

    def one(self, name: str) -> str | None:
        """The value of a field; None if it was left out.

        Raises:
            RequestInvalid: it was given more than once.
        """
        values = self.fields.get(name, [])
        if len(values) > 1:
            raise invalid(name, "one form field", len(values))
        return values[0] if values else None


async def receive_upload(request: Request, directory: Path, form: Form) -> Upload:
    """Take the body of a request apart.

    Args:
        request: its body is unread.
        directory: an empty folder; the parts' bytes go into it under names of our own.
        form: what the route takes.

    Raises:
        WrongContentType: not multipart/form-data.
        BodyTooLarge: more bytes than the form may have, noticed while they arrive.
        RequestInvalid: a broken form, an unknown or oversized field.
        StorageFull: the disk took no more.
        StorageUnavailable: it took nothing, for another reason.
    """
    sorter = _Sorter(_boundary(request, form), directory, form)
    received = 0
    try:
        async for chunk in _chunks(request):
            received += len(chunk)
            if received > form.max_bytes:
                raise body_too_large(form.max_bytes)
            await anyio.to_thread.run_sync(sorter.write, chunk)
        return await anyio.to_thread.run_sync(sorter.finish)
    finally:
        sorter.close()


async def _chunks(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


def _boundary(request: Request, form: Form) -> bytes:
    given = request.headers.get("content-type", "")
    kind, options = parse_options_header(given)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise WrongContentType(
            f"the body's content-type is {given or 'not given'!r}; send multipart/form-data "
            f"(curl: {form.example})",
            field="content-type",
            expected="multipart/form-data",
            came=quoted(given),
        )
    return boundary


class _Sorter:
    """Feeds the parser and collects its results; every method may run in another thread."""

    def __init__(self, boundary: bytes, directory: Path, form: Form) -> None:
        self._upload = Upload()
        self._directory = directory
        self._form = form
        self._num_parts = 0
        self._complete = False
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value = bytearray()
        self._file: IO[bytes] | None = None
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._end,
                    "on_end": self._on_form_end,
                },
            )
        except FormParserError as error:
            raise _broken(str(error)) from error

    def write(self, chunk: bytes) -> None:
        """Parse one more chunk."""
        try:
            with disk_failure_is_storage_error("the upload"):
                self._parser.write(chunk)
        except FormParserError as error:
            raise _broken(str(error)) from error

    def finish(self) -> Upload:
        """What came, once the form is whole."""
        if not self._complete:
            raise _broken("the body ends inside the form")
        return self._upload

    def close(self) -> None:
        """Close the file that is open, if the form broke off inside one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > self._form.max_parts:
            raise _broken(f"more than {self._form.max_parts} parts")
        self._headers = {}
        self._value = bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = _text(options.get(b"name", b""), "a part's name")
        if self._name == self._form.files:
            file_name = _text(options.get(b"filename", b""), "a file's name")
            content_type, _ = parse_options_header(self._headers.get(b"content-type"))
            path = self._directory / f"part-{self._num_parts}"
            self._upload.files.append(
                UploadedFile(file_name, path, content_type.decode("ascii", "replace"))
            )
            self._file = path.open("xb")
        elif self._name not in self._form.fields:
            listed = ", ".join(sorted({*self._form.fields, self._form.files}))
            raise RequestInvalid(
                unknown_name(self._name, [*self._form.fields, self._form.files], "form field"),
                field=quoted(self._name),
                expected=listed,
                came=quoted(self._name),
            )

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
            return
        self._value += data[start:end]
        limit = self._form.fields[self._name]
        if len(self._value) > limit:
            raise invalid(self._name, f"at most {limit} bytes", "more")

    def _end(self) -> None:
        if self._file is not None:
            self.close()
        else:
            text = _text(bytes(self._value), self._name)
            self._upload.fields.setdefault(self._name, []).append(text)

    def _on_form_end(self) -> None:
        self._complete = True


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestInvalid(
            f"{what} is not UTF-8", field=what, expected="UTF-8", came=quoted(data)
        ) from error


def _broken(why: str) -> RequestInvalid:
    return RequestInvalid(
        f"the form cannot be read: {why}",
        field="body",
        expected="multipart/form-data",
        came=quoted(why),
    )
