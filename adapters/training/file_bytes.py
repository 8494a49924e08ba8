"""What a file of rows is by its bytes: text in UTF-8 or UTF-16, other text, or no text at all.

UTF-16 is read. Other encodings are only named, with the command that converts them: several of them fit
the same bytes, and a wrong guess would train on other words without an error. Knows no rows.
"""

from __future__ import annotations

import codecs
import io
import itertools
from collections.abc import Callable, Sequence
from typing import BinaryIO, Protocol

from adapters.errors import UnsupportedFile

UTF8_BOM = codecs.BOM_UTF8
# Bytes that are looked at to name a file's kind or its encoding.
HEAD_BYTES = 1 << 16

_FIRST_BYTES: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "a Parquet file", "pandas.read_parquet(FILE)"),
    (b"ARROW1", "an Arrow file", "pandas.read_feather(FILE)"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "datasets.Dataset.from_file(FILE)"),
    (b"ORC", "an ORC file", "pandas.read_orc(FILE)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "pandas.read_excel(FILE)"),
    (b"\x89HDF", "an HDF5 file", "pandas.read_hdf(FILE)"),
    (b"\x93NUMPY", "a NumPy array", ""),
    (b"SQLite format 3", "an SQLite database", ""),
    (b"%PDF", "a PDF document", ""),
    (b"\x1f\x8b", "a gzip archive", "gunzip FILE"),
    (b"BZh", "a bzip2 archive", "bunzip2 FILE"),
    (b"\xfd7zXZ", "an xz archive", "unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unzstd FILE"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "7z x FILE"),
    (b"Rar!", "a RAR archive", "unrar x FILE"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"<!DOCTYPE", "a web page, perhaps a download that failed", ""),
    (b"<!doctype", "a web page, perhaps a download that failed", ""),
    (b"<html", "a web page, perhaps a download that failed", ""),
    (b"<?xml", "an XML document", ""),
    (b"\x7fELF", "a program", ""),
)
_PICKLE_PROTOCOLS = (2, 3, 4, 5)
_TAR_MAGIC_AT = 257
_AS_LINES = ".to_json('rows.jsonl', orient='records', lines=True, force_ascii=False)"


def refuse_binary(head: bytes) -> None:
    """Refuse a file that is no text, by name and with what makes rows of it.

    Args:
        head: its first bytes.

    Raises:
        UnsupportedFile: an archive, a pickle, a spreadsheet, a column store, or a page of markup.
    """
    kind, command = _binary(head)
    if kind is None:
        return
    if command.startswith("pandas."):
        hint = f"; make rows of it with {command}{_AS_LINES}"
    elif command.startswith("datasets."):
        hint = f"; make rows of it with {command}.to_json('rows.jsonl', force_ascii=False)"
    else:
        hint = f"; run {command}, and send what comes of it" if command else ""
    raise UnsupportedFile(
        f"data: it is {kind}, expected text: JSON lines, a JSON array, or CSV with a header{hint}",
        field="data",
        expected="JSON lines, a JSON array or CSV",
        came=kind,
    )


def _binary(head: bytes) -> tuple[str | None, str]:
    if head.startswith(b"PK\x03\x04"):
        if b"xl/" in head or b"[Content_Types].xml" in head[:200]:
            return "an Excel workbook", "pandas.read_excel(FILE)"
        return "a zip archive", "unzip FILE"
    if len(head) > 1 and head[0] == 0x80 and head[1] in _PICKLE_PROTOCOLS:
        return "a Python pickle, which is never loaded", ""
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return "a tar archive", "tar -xf FILE"
    for magic, kind, command in _FIRST_BYTES:
        if head.startswith(magic):
            return kind, command
    return None, ""


# --- encodings -------------------------------------------------------------------------------


class LineSource(Protocol):
    """What lines are read from."""

    def readline(self, size: int, /) -> bytes:
        """The next line in UTF-8 with its line feed, at most `size` bytes of it; empty at the end."""
        ...


class _Utf16Lines:
    """The lines of a file in UTF-16, as UTF-8.

    Args:
        file: at its start, with a byte order mark.
    """

    def __init__(self, file: BinaryIO) -> None:
        # Only the line feed ends a line, as in a binary file.
        self._text = io.TextIOWrapper(file, encoding="utf-16", newline="\n")

    def readline(self, size: int, /) -> bytes:
        """See `LineSource`; `size` counts characters.

        Raises:
            UnicodeDecodeError: it is no UTF-16.
        """
        return self._text.readline(size).encode("utf-8", "surrogatepass")


def line_source(file: BinaryIO, head: bytes) -> tuple[LineSource, str]:
    """Where the lines of a file are read from, and the name of its encoding.

    Args:
        file: at its start.
        head: its first bytes.
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _Utf16Lines(file), "UTF-16"
    with_mark = head.startswith(UTF8_BOM)
    return file, "UTF-8 with a byte order mark" if with_mark else "UTF-8"


def head_text(head: bytes) -> str:
    """The first bytes of a file as text; what is not text in them becomes U+FFFD."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return head.decode("utf-16", "replace")
    return head.removeprefix(UTF8_BOM).decode("utf-8", "replace")


def name_encoding(sample: bytes) -> tuple[str, str] | None:
    """The likely encoding of bytes that are no UTF-8: its name, and iconv's name of it.

    None where the sample is mostly UTF-8 (a damaged file) or nothing plausible.

    Args:
        sample: at most a few times `HEAD_BYTES`.
    """
    if 0 in sample:
        return _utf16_without_mark(sample)
    high = sum(byte > 0x7F for byte in sample)
    if _share_of_utf8(sample, high) >= 0.8:
        return None
    for name, iconv, codec, expected, least in _ENCODINGS:
        text = _decoded(sample, codec)
        if text is None:
            continue
        letters = [letter for letter in text if letter > "\x7f"]
        if expected is _is_small_cyrillic and not _stands_in_words(sample, high):
            continue
        if expected is _is_hangul and not _has_korean_syllables(letters):
            continue
        if len(letters) < (1 if expected is _is_western else 2):
            continue
        if sum(map(expected, letters)) >= least * len(letters):
            return name, iconv
    return None


def _utf16_without_mark(sample: bytes) -> tuple[str, str] | None:
    odd, even = sample[1::2].count(0), sample[::2].count(0)
    if max(odd, even) < len(sample) // 8:
        return None
    little = odd > even
    return "UTF-16 without a byte order mark", "utf-16le" if little else "utf-16be"


def _share_of_utf8(sample: bytes, high: int) -> float:
    """Share of the bytes above 127 that are in well-formed UTF-8."""
    well_formed = sample.decode("utf-8", "ignore").encode()
    return sum(byte > 0x7F for byte in well_formed) / max(high, 1)


def _decoded(sample: bytes, codec: str) -> str | None:
    """Strictly decoded; a character that is cut at the end is left out."""
    for cut in range(4):
        try:
            return sample[: len(sample) - cut].decode(codec)
        except UnicodeDecodeError as error:
            if error.start < len(sample) - 4:
                return None
    return None


def _stands_in_words(sample: bytes, high: int) -> bool:
    """Whether most bytes above 127 follow another one, as in scripts other than Latin."""
    following = sum(a > 0x7F and b > 0x7F for a, b in itertools.pairwise(sample))
    return following > 0.6 * high


def _two_bytes(letter: str, codec: str) -> tuple[int, int]:
    try:
        encoded = letter.encode(codec)
    except UnicodeEncodeError:
        return 0, 0
    return (encoded[0], encoded[1]) if len(encoded) == 2 else (0, 0)


def _is_common_chinese(letter: str) -> bool:
    # GB 2312's first level (3,755 characters by pronunciation), and its punctuation.
    lead, trail = _two_bytes(letter, "gb2312")
    return trail >= 0xA1 and (0xB0 <= lead <= 0xD7 or 0xA1 <= lead <= 0xA3)


def _is_common_traditional(letter: str) -> bool:
    # Big5's first level (5,401 characters by strokes), and its punctuation.
    lead, _ = _two_bytes(letter, "big5")
    return 0xA1 <= lead <= 0xC6


def _is_hangul(letter: str) -> bool:
    return "\uac00" <= letter <= "\ud7a3" or _two_bytes(letter, "euc_kr")[0] in (0xA1, 0xA3)


def _has_korean_syllables(letters: Sequence[str]) -> bool:
    """Whether endings and particles stand among them: a third of Korean text, and rare as Chinese."""
    frequent = sum(letter in _KOREAN_ENDINGS for letter in letters)
    return frequent > 0 and frequent * 20 >= len(letters)


_KOREAN_ENDINGS = frozenset("이다는가고에을의를지은하도로한요해음사서니기어있")


def _is_kana(letter: str) -> bool:
    return "\u3041" <= letter <= "\u30ff"


def _is_small_cyrillic(letter: str) -> bool:
    return "\u0430" <= letter <= "\u044f"


def _is_western(letter: str) -> bool:
    return "\u00a1" <= letter <= "\u017f" or "\u2013" <= letter <= "\u20ac"


# Tried in this order, with the least share of the letters beyond ASCII that must be expected ones.
# Chinese text reads as Korean with half of its letters Hanja, hence the high share there; a short one may
# read as syllables alone, which `_has_korean_syllables` tells apart. In Western text read as Russian few
# letters are small Cyrillic ones beside each other; `_stands_in_words` sees to that.
_ENCODINGS: tuple[tuple[str, str, str, Callable[[str], bool], float], ...] = (
    ("EUC-KR", "euc-kr", "euc_kr", _is_hangul, 0.95),
    ("GB18030 (GBK)", "gb18030", "gb18030", _is_common_chinese, 0.8),
    ("Shift JIS", "shift_jis", "cp932", _is_kana, 0.2),
    ("EUC-JP", "euc-jp", "euc_jp", _is_kana, 0.2),
    ("Big5", "big5", "big5", _is_common_traditional, 0.8),
    ("Windows-1251", "windows-1251", "cp1251", _is_small_cyrillic, 0.8),
    ("KOI8-R", "koi8-r", "koi8_r", _is_small_cyrillic, 0.8),
    ("Latin-1 (Windows-1252)", "windows-1252", "cp1252", _is_western, 0.9),
)
