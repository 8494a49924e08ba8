"""Hostile archives, each a small function that writes one attack; nothing here is unpacked by us."""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from adapters import errors
from tests.adapters.checkpoint.hostile import headers

CONFIG = b"{}"
TENSORS = headers.good()
PAIR = {"adapter_config.json": CONFIG, "adapter_model.safetensors": TENSORS}


def zip_of(files: dict[str, bytes], **options: int) -> bytes:
    out, method = io.BytesIO(), options.get("method", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            # A ZipInfo has a fixed time: the bytes of the clock's can be those of `CONFIG`.
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return out.getvalue()


def tar_of(members: list[tuple[str, bytes | str]], kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar whose members are bytes, or links to the given text."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = kind, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _tar(*extra: tuple[str, bytes | str], kind: bytes = tarfile.SYMTYPE) -> bytes:
    return tar_of([*extra, *PAIR.items()], kind)


def zip_slip(name: str) -> bytes:
    return zip_of({name: b"x", **PAIR})


def zip_symlink() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        link = zipfile.ZipInfo("adapter_model.safetensors")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("adapter_config.json", CONFIG)
    return out.getvalue()


def zip_encrypted() -> bytes:
    """Set the encryption bit of every member, in both places it stands."""
    data = bytearray(zip_of(PAIR))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(signature, at + 4)
    return bytes(data)


def zip_twice() -> bytes:
    """Two members of one name: first a harmless one, then another."""
    data = zip_of({"adapter_config.json": CONFIG, "bdapter_config.json": b"[]"} | PAIR)
    return data.replace(b"bdapter", b"adapter")


def zip_bomb(size: int) -> bytes:
    return zip_of({"adapter_config.json": CONFIG, "adapter_model.safetensors": bytes(size)})


def zip_bomb_that_lies(size: int) -> bytes:
    """A bomb whose two headers declare 10 bytes."""
    data = zip_bomb(size)
    return data.replace(struct.pack("<I", size), struct.pack("<I", 10))


def zip_with_table_of_contents(entries: int) -> bytes:
    """No data, and as many entries in the table of contents as asked for."""
    name = b"x"
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", len(name)) + bytes(16) + name
    table = entry * entries
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, len(table), 0, 0)
    return b"PK\3\4" + table + end


def zip_many(count: int) -> bytes:
    return zip_of({f"f{i}": b"" for i in range(count)} | PAIR)


def gzip_bomb(size: int) -> bytes:
    """A tar.gz whose ignored first member is zeros."""
    return gzip.compress(tar_of([("README.md", bytes(size)), *PAIR.items()]), 9)


def gzip_of_zeros(size: int) -> bytes:
    return gzip.compress(b"\x1f\x8b" + bytes(size), 9)


def tar_extended_header(size: int) -> bytes:
    """A header that asks for `size` bytes of path to be held in memory."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT) + b"a" * min(size, 1 << 20)


def tar_header_chain(length: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    return (info.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * length


def tar_negative_size() -> bytes:
    info = tarfile.TarInfo("adapter_config.json")
    info.size = -512
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def tar_sparse() -> bytes:
    info = tarfile.TarInfo("adapter_model.safetensors")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


_ARCHIVE, _LARGE = errors.ArchiveInvalid, errors.CheckpointTooLarge
_FILES, _KIND = errors.FileSetInvalid, errors.UnsupportedFile

# name -> (bytes, the error that must come, words it must hold)
ATTACKS: dict[str, tuple[Callable[[], bytes], type[errors.CheckpointError], str]] = {
    "zip_slip": (lambda: zip_slip("../../evil"), _ARCHIVE, "leads out"),
    "zip_slip_inside": (lambda: zip_slip("a/../../evil"), _ARCHIVE, "leads out"),
    "zip_slip_backslash": (lambda: zip_slip("..\\evil"), _ARCHIVE, "leads out"),
    "zip_slip_folder": (lambda: zip_slip("../"), _ARCHIVE, "leads out"),
    "zip_absolute": (lambda: zip_slip("/etc/cron.d/evil"), _ARCHIVE, "absolute"),
    "zip_drive": (lambda: zip_slip("C:\\evil"), _ARCHIVE, "absolute"),
    "zip_symlink": (zip_symlink, _ARCHIVE, "link"),
    "zip_encrypted": (zip_encrypted, _ARCHIVE, "encrypted"),
    "zip_name_twice": (zip_twice, _ARCHIVE, "twice"),
    "zip_lzma": (lambda: zip_of(PAIR, method=zipfile.ZIP_LZMA), _ARCHIVE, "deflated"),
    "zip_bomb": (lambda: zip_bomb(48 << 20), _LARGE, "inflates"),
    "zip_bomb_that_lies": (lambda: zip_bomb_that_lies(48 << 20), _ARCHIVE, "cannot be read"),
    "zip_table_of_contents": (lambda: zip_with_table_of_contents(100_000), _LARGE, "contents"),
    "zip_many_members": (lambda: zip_many(5_000), _LARGE, "4096"),
    "zip_cut_short": (lambda: zip_of(PAIR)[:-30], _ARCHIVE, "cannot be read"),
    "zip_flipped": (
        lambda: zip_of(PAIR, method=zipfile.ZIP_STORED).replace(CONFIG, b"[]", 1),
        _ARCHIVE,
        "cannot be read",
    ),
    "zip_empty": (lambda: zip_of({}), _FILES, "came: nothing"),
    "zip_two_adapters": (
        lambda: zip_of({f"{folder}/{name}": d for folder in "ab" for name, d in PAIR.items()}),
        _FILES,
        "two adapters",
    ),
    "zip_with_checkpoint_folder": (
        lambda: zip_of(PAIR | {f"checkpoint-5/{name}": d for name, d in PAIR.items()}),
        _FILES,
        "two adapters",
    ),
    "zip_two_folders": (
        lambda: zip_of({"a/adapter_config.json": CONFIG, "b/adapter_model.safetensors": TENSORS}),
        _FILES,
        "different folders",
    ),
    "zip_too_deep": (
        lambda: zip_of({f"a/b/{name}": data for name, data in PAIR.items()}),
        _ARCHIVE,
        "one folder down",
    ),
    "zip_config_over_limit": (
        lambda: zip_of({**PAIR, "adapter_config.json": b" " * 2_000_000}),
        _LARGE,
        "1048576 bytes",
    ),
    "zip_bin_only": (
        lambda: zip_of({"adapter_config.json": CONFIG, "a/adapter_model.bin": b"\x80\x02"}),
        _KIND,
        "torch.load('adapter_model.bin'",
    ),
    "tar_slip": (lambda: _tar(("../evil", b"x")), _ARCHIVE, "leads out"),
    "tar_absolute": (lambda: _tar(("/etc/evil", b"x")), _ARCHIVE, "absolute"),
    "tar_symlink": (lambda: _tar(("a", "/etc/passwd")), _ARCHIVE, "link"),
    "tar_symlink_as_weights": (
        lambda: tar_of([("adapter_model.safetensors", "/etc/passwd")], tarfile.SYMTYPE),
        _ARCHIVE,
        "link",
    ),
    "tar_hardlink": (lambda: _tar(("a", "b"), kind=tarfile.LNKTYPE), _ARCHIVE, "link"),
    "tar_device": (lambda: _tar(("a", ""), kind=tarfile.CHRTYPE), _ARCHIVE, "device"),
    "tar_fifo": (lambda: _tar(("a", ""), kind=tarfile.FIFOTYPE), _ARCHIVE, "device"),
    "tar_sparse": (tar_sparse, _ARCHIVE, "device"),
    "tar_name_twice": (lambda: _tar(("adapter_config.json", b"[]")), _ARCHIVE, "twice"),
    "tar_name_twice_by_dot": (lambda: _tar(("./adapter_config.json", b"[]")), _ARCHIVE, "twice"),
    "tar_cut_short": (lambda: _tar()[:1600], _ARCHIVE, "cannot be read"),
    "tar_many_members": (lambda: tar_of([(f"f{i}", b"") for i in range(5000)]), _LARGE, "4096"),
    "tar_extended_header": (lambda: tar_extended_header(2**33), _ARCHIVE, "extended"),
    "tar_header_chain": (lambda: tar_header_chain(5_000), _ARCHIVE, "cannot be read"),
    "tar_negative_size": (tar_negative_size, _ARCHIVE, "header"),
    "gzip_bomb": (lambda: gzip_bomb(48 << 20), _LARGE, "inflates"),
    "gzip_of_no_tar": (lambda: gzip_of_zeros(1_000), _ARCHIVE, "cannot be read"),
    "gzip_cut_short": (lambda: gzip.compress(_tar())[:-40], _ARCHIVE, "cannot be read"),
    "gzip_broken": (lambda: b"\x1f\x8bxxxxxxxxxxxxxxx", _ARCHIVE, "cannot be read"),
}


def write(directory: Path, attack: str) -> Path:
    path = directory / "upload"
    path.write_bytes(ATTACKS[attack][0]())
    return path
