"""Unpacks an upload into a staging folder with exactly the two files of a checkpoint.

Accepts loose files, or one .zip, .tar or .tar.gz of them. Uploads are usually the folder that PEFT wrote,
so README.md, `__MACOSX`, dot files and other trainer output are skipped and listed, a tokenizer's files
are read for the tokens that they add, and the two files may be one folder deep. The input is untrusted:
names never become paths (the two outputs have fixed names), sizes are counted during extraction, never
taken from headers, and links, devices, encryption and repeated names are refused.

The inverse is `zip_blocks`. Handles file names and bytes only; `adapters.checkpoint.folder` validates the
content of the two files.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, Self, cast

from adapters import synced_files
from adapters.checkpoint import added_tokens
from adapters.checkpoint.folder import (
    CONFIG_FILE,
    FILES,
    PICKLE_SUFFIXES,
    TENSORS_FILE,
    shorten,
    wrong_files,
)
from adapters.checkpoint.limits import DEFAULT_LIMITS, KIB, MIB, CheckpointLimits
from adapters.errors import ArchiveInvalid, CheckpointTooLarge, FileSetInvalid, UnsupportedFile

_BLOCK = 64 * KIB
# No legitimate archive of two files needs more for one extended header or one table of contents.
_MAX_TAR_EXTENSION = 64 * KIB
_MAX_ZIP_READ = 1 * MIB
_TAR_EXTENSIONS = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,  # zipfile: an unknown compression method
    RecursionError,  # tarfile: a chain of extended headers
    UnicodeError,
    ValueError,
    IndexError,  # zipfile: a member without a name
)


@dataclass(frozen=True)
class Staged:
    """What an upload held beside the two files of a checkpoint.

    Attributes:
        ignored: the other names, sorted.
        tokens: the added and special tokens that tokenizer files among them list.
    """

    ignored: tuple[str, ...]
    tokens: added_tokens.Tokens

    def warnings(
        self, vocab_size: int, knows: Callable[[str], bool] | None = None
    ) -> tuple[str, ...]:
        """A warning of tokens that the base does not have, see `added_tokens.warning_of`."""
        found = added_tokens.warning_of(self.tokens, vocab_size, knows)
        return () if found is None else (found,)


class Readable(Protocol):
    """A readable byte stream."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        ...


def stage_upload(
    parts: Sequence[tuple[str, Path]],
    directory: Path,
    limits: CheckpointLimits = DEFAULT_LIMITS,
) -> Staged:
    """Fill an empty folder with `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        parts: (client's file name, path of its bytes) of loose files or one archive.
        directory: an empty folder; contains the two files on return, arbitrary content on an error.
        limits: size limits, counted during extraction.

    Returns:
        What was found beside the two files.

    Raises:
        UnsupportedFile: only a pickle, or an unsupported kind of archive.
        FileSetInvalid: not exactly one adapter's two files.
        ArchiveInvalid: broken, encrypted, or with links, devices, repeated or escaping names.
        CheckpointTooLarge: more bytes or members than `limits` allow.
        StorageFull: the disk is full.
    """
    picker = _Picker(directory, limits)
    with synced_files.full_disk_is_storage_full("the upload"):
        if len(parts) == 1 and (unpack := _unpacker(*parts[0])) is not None:
            try:
                unpack(parts[0][1], picker)
            except _BROKEN as error:
                raise ArchiveInvalid(
                    f"the archive cannot be read: {shorten(error)}", field="files"
                ) from error
        else:
            for name, path in parts:
                picker.take(name, partial(_opened, path))
    return picker.finish()


class _Picker:
    """Processes members one by one: extracts the two checkpoint files and records the other names."""

    def __init__(self, directory: Path, limits: CheckpointLimits) -> None:
        self._directory = directory
        self._limits = limits
        self._seen: set[str] = set()
        self._picked: dict[str, str] = {}  # file name -> member it came from
        self._ignored: list[str] = []
        self._tokens: added_tokens.Tokens = {}
        self._members = 0

    @property
    def limits(self) -> CheckpointLimits:
        """The limits in force."""
        return self._limits

    def folder(self, name: str) -> None:
        """Count a folder; `./` counts too."""
        self._count()
        if name.replace("\\", "/").strip("./") or ".." in name:
            _safe_parts(name)

    def take(self, name: str, open_file: Callable[[], AbstractContextManager[Readable]]) -> None:
        """Count a file, and read it if it is one of the two files or lists a tokenizer's tokens."""
        if (chosen := self._choose(name)) is not None:
            with open_file() as file:
                self._keep(chosen, file)
            return
        last = _safe_parts(name)[-1]
        if last in added_tokens.FILES:
            with suppress(*_BROKEN), open_file() as file:
                found = added_tokens.tokens_of(last, _start_of(file))
                added_tokens.merge(self._tokens, found)

    def _choose(self, name: str) -> str | None:
        """Count a file. Returns the output name if it is one of the two files, else None."""
        self._count()
        parts = _safe_parts(name)
        path = "/".join(parts)
        if path in self._seen:
            raise _refused(f"{shorten(path)} is there twice", name)
        self._seen.add(path)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if hidden or parts[-1] not in FILES:
            self._ignored.append(path)
            return None
        if len(parts) > 2:
            raise _refused(f"{shorten(path)} lies more than one folder down", name)
        first = self._picked.setdefault(parts[-1], path)
        if first != path:
            raise FileSetInvalid(
                f"two adapters came, {shorten(first)} and {shorten(path)}; send one at a time",
                field="files",
                expected="one adapter",
                came=f"{shorten(first)}, {shorten(path)}",
            )
        return parts[-1]

    def _keep(self, file_name: str, file: Readable) -> None:
        """Copy the bytes of a file selected by `_choose`, up to its limit."""
        limit = self._limits.config_bytes if file_name == CONFIG_FILE else self._limits.file_bytes
        total = 0
        with (self._directory / file_name).open("xb") as writer:
            while block := file.read(_BLOCK):
                if file_name == CONFIG_FILE and not total:
                    # PEFT cannot read a byte order mark: the download must not have one.
                    block = block.removeprefix(codecs.BOM_UTF8)
                total += len(block)
                if total > limit:
                    raise CheckpointTooLarge(
                        f"{file_name} has more than {limit} bytes",
                        field=file_name,
                        expected=f"at most {limit} bytes",
                        came=f"more than {limit} bytes",
                    )
                writer.write(block)

    def _count(self) -> None:
        self._members += 1
        if self._members > self._limits.archive_members:
            raise CheckpointTooLarge(
                f"more than {self._limits.archive_members} files came",
                field="files",
                expected=f"at most {self._limits.archive_members} files",
            )

    def finish(self) -> Staged:
        """Check that both files were found in one folder. Returns what else was found."""
        if self._picked.keys() != FILES:
            raise wrong_files([*self._picked, *self._ignored])
        config, tensors = self._picked[CONFIG_FILE], self._picked[TENSORS_FILE]
        if config.rpartition("/")[0] != tensors.rpartition("/")[0]:
            raise FileSetInvalid(
                f"{shorten(config)} and {shorten(tensors)} lie in different folders",
                field="files",
                expected="both files in one folder",
                came=f"{shorten(config)}, {shorten(tensors)}",
            )
        ignored = tuple(sorted(shorten(name, 200) for name in self._ignored))
        return Staged(ignored, self._tokens)


def _opened(path: Path) -> BinaryIO:
    return path.open("rb")


def _start_of(file: Readable) -> bytes:
    """The first bytes of a file, however many each read gives."""
    blocks: list[bytes] = []
    left = added_tokens.MAX_BYTES
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        blocks.append(block)
        left -= len(block)
    return b"".join(blocks)


def _refused(why: str, name: str) -> ArchiveInvalid:
    return ArchiveInvalid(f"the upload is refused: {why}", field="files", came=shorten(name))


def _safe_parts(name: str) -> tuple[str, ...]:
    """The parts of a member's path; refused if absolute or escaping."""
    path = name.replace("\\", "/")  # zips made on Windows
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    if path.startswith("/") or (parts and len(parts[0]) > 1 and parts[0][1] == ":"):
        raise _refused(f"{shorten(name)} is an absolute path", name)
    if ".." in parts or "\0" in path:
        raise _refused(f"{shorten(name)} leads out of its folder", name)
    if not parts:
        raise _refused("a file has no name", name)
    return parts


class _Meter:
    """Counts inflated bytes against the absolute limit and the ratio to compressed ones."""

    def __init__(self, compressed_bytes: int, limits: CheckpointLimits) -> None:
        most = limits.config_bytes + limits.file_bytes + limits.archive_extra_bytes
        by_ratio = max(limits.archive_ratio_from, limits.archive_ratio * compressed_bytes)
        self._limit = min(most, by_ratio)
        self._total = 0

    def add(self, num_bytes: int) -> None:
        self._total += num_bytes
        if self._total > self._limit:
            raise CheckpointTooLarge(
                f"the archive inflates to more than {self._limit} bytes",
                field="files",
                expected=f"at most {self._limit} bytes inflated",
                came=f"more than {self._limit} bytes",
            )


class _Metered(io.RawIOBase):
    """A stream with a byte meter."""

    def __init__(self, file: Readable, meter: _Meter) -> None:
        super().__init__()
        self._file = file
        self._meter = meter

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        block = self._file.read(size if size >= 0 else _BLOCK)
        self._meter.add(len(block))
        return block


# --- kinds of archive ---------------------------------------------------------------------


class _Unpacker(Protocol):
    def __call__(self, path: Path, picker: _Picker, /) -> None: ...


def _unpacker(name: str, path: Path) -> _Unpacker | None:
    """How to unpack a lone part, by its first bytes; None if it is a loose file."""
    suffix = Path(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES or Path(name).name in FILES:
        return None  # torch.save writes zips; the checkpoint reader has its own error for those
    with path.open("rb") as file:
        start = file.read(265)
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _unpack_zip
    if start.startswith(b"\x1f\x8b"):
        return _unpack_tar_gz
    if start[257:262] == b"ustar":
        return _unpack_tar
    if suffix in {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"}:
        raise UnsupportedFile(
            f"{shorten(name)} is not a .zip, .tar or .tar.gz",
            field="files",
            expected="a .zip, .tar or .tar.gz",
            came=shorten(name),
        )
    return None


class _BoundedReads(io.FileIO):
    """A file that returns at most `_MAX_ZIP_READ` bytes per read.

    zipfile reads the whole table of contents in one call, at the size that the file declares, and
    creates an object for each entry. The bound limits this to a few megabytes.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        asked = -1 if size is None else size
        if asked <= _MAX_ZIP_READ:
            block = super().read(asked if asked >= 0 else _MAX_ZIP_READ + 1) or b""
            if len(block) <= _MAX_ZIP_READ:
                return block
        raise CheckpointTooLarge(
            f"the zip's table of contents is over {_MAX_ZIP_READ} bytes",
            field="files",
            expected=f"at most {_MAX_ZIP_READ} bytes",
        )

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        # Offsets come from the file; an OSError for a bad one would look like a disk failure.
        if whence == os.SEEK_SET and not 0 <= offset < 2**63:
            raise zipfile.BadZipFile("a member lies outside the file")
        return super().seek(offset, whence)


def _unpack_zip(path: Path, picker: _Picker) -> None:
    meter = _Meter(path.stat().st_size, picker.limits)
    with ExitStack() as stack:
        file = stack.enter_context(_BoundedReads(path, "rb"))
        archive = stack.enter_context(zipfile.ZipFile(cast("IO[bytes]", file)))
        for member in archive.infolist():
            _check_zip_member(member)
            if member.is_dir():
                picker.folder(member.filename)
            else:
                picker.take(member.filename, partial(_metered_member, archive, member, meter))


@contextmanager
def _metered_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, meter: _Meter
) -> Iterator[Readable]:
    with archive.open(member) as reader:
        yield _Metered(reader, meter)


def _check_zip_member(member: zipfile.ZipInfo) -> None:
    name = member.filename
    if member.flag_bits & 0x1:
        raise _refused(f"{shorten(name)} is encrypted", name)
    if member.orig_filename != name and "\0" in member.orig_filename:
        raise _refused(f"{shorten(name)} has a zero byte in its name", name)
    # Zips made on Unix store the file's mode in the upper half; 0 means unknown.
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refused(f"{shorten(name)} is a link or a device", name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _refused(f"{shorten(name)} is neither stored nor deflated", name)


class _StrictTarInfo(tarfile.TarInfo):
    """A tar header that refuses members that tarfile would read into memory completely."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse one 512-byte block, then check its type and size."""
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _TAR_EXTENSIONS and info.size > _MAX_TAR_EXTENSION):
            raise _refused(f"an extended tar header of {info.size} bytes", info.name)
        return info


def _unpack_tar_gz(path: Path, picker: _Picker) -> None:
    with path.open("rb") as file, gzip.GzipFile(fileobj=file) as inflated:
        _unpack_tar_stream(inflated, path.stat().st_size, picker)


def _unpack_tar(path: Path, picker: _Picker) -> None:
    with path.open("rb") as file:
        _unpack_tar_stream(file, path.stat().st_size, picker)


def _unpack_tar_stream(file: Readable, compressed_bytes: int, picker: _Picker) -> None:
    metered = cast("BinaryIO", _Metered(file, _Meter(compressed_bytes, picker.limits)))
    # "r|" reads forward only: no member is visited twice, none by an offset from a header.
    with tarfile.open(fileobj=metered, mode="r|", tarinfo=_StrictTarInfo) as archive:
        for member in archive:
            if not (member.isreg() or member.isdir()) or member.issparse():
                raise _refused(f"{shorten(member.name)} is a link or a device", member.name)
            if member.isdir():
                picker.folder(member.name)
            else:
                picker.take(member.name, partial(_tar_member, archive, member))


def _tar_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    reader = archive.extractfile(member)
    if reader is None:  # only links and devices have no bytes, and they were refused
        raise _refused(f"{shorten(member.name)} has no content", member.name)
    return reader


# --- the way back -------------------------------------------------------------------------


class _Outbox(io.RawIOBase):
    """Buffers the output of zipfile."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._blocks.append(bytes(data))
        return len(self._blocks[-1])

    def take(self) -> bytes:
        taken, self._blocks = b"".join(self._blocks), []
        return taken


def zip_blocks(directory: Path) -> Iterator[bytes]:
    """A checkpoint folder as a zip, block by block; deterministic for the same files.

    Members are stored, not deflated: weights hardly compress.
    """
    outbox = _Outbox()
    with zipfile.ZipFile(outbox, "w", zipfile.ZIP_STORED) as archive:
        for name in (CONFIG_FILE, TENSORS_FILE):
            member = zipfile.ZipInfo(name)  # dated 1980, so that downloads are identical
            member.external_attr = (stat.S_IFREG | 0o644) << 16
            with (directory / name).open("rb") as file, archive.open(member, "w") as writer:
                while block := file.read(_BLOCK):
                    writer.write(block)
                    yield outbox.take()
    yield outbox.take()
