"""Files of rows that must be refused: each entry is the bytes of one, the row, and words to be said."""

from __future__ import annotations

from typing import Any

GOOD = b'{"text": "a", "label": "x"}\n'


def _jsonl(second: bytes) -> bytes:
    return GOOD + second


# name -> (bytes, row that is at fault, words that the refusal must hold)
JSONL: dict[str, tuple[bytes, int | None, str]] = {
    "empty": (b"", None, "no rows"),
    "blank": (b"\n \n\r\n", None, "no rows"),
    "bom_only": (b"\xef\xbb\xbf", None, "no rows"),
    "list_of_rows": (b'[{"text": "a"}]', 1, "a list came"),
    "pretty_printed": (b'{\n"text": "a"\n}', 1, "row 1 (line 1): it is not JSON"),
    "string": (_jsonl(b'"text"'), 2, "a string came"),
    "null": (_jsonl(b"null"), 2, "null came"),
    "after_blank_lines": (GOOD + b"\n\n" + b"oops", 2, "row 2 (line 4)"),
    "two_on_a_line": (_jsonl(GOOD.strip() + GOOD), 2, "not JSON"),
    "cut_short": (_jsonl(b'{"text": "a", "la'), 2, "not JSON"),
    "python": (_jsonl(b"{'text': 'a'}"), 2, "not JSON"),
    "duplicate": (_jsonl(b'{"text": "a", "text": "b"}'), 2, "given twice"),
    "duplicate_by_escape": (_jsonl(b'{"text": "a", "\\u0074ext": "b"}'), 2, "given twice"),
    "nan": (_jsonl(b'{"text": NaN}'), 2, "NaN"),
    "infinity": (_jsonl(b'{"text": -Infinity}'), 2, "Infinity"),
    "float_overflow": (_jsonl(b'{"text": 1e999}'), 2, "too large"),
    "integer_of_100000_digits": (_jsonl(b'{"text": ' + b"9" * 100_000 + b"}"), 2, "64 bits"),
    "deep_lists": (_jsonl(b'{"text": ' + b"[" * 100_000), 2, "nested"),
    "deep_objects": (_jsonl(b'{"a":' * 100_000), 2, "nested"),
    "value_list": (_jsonl(b'{"text": ["a"], "label": "x"}'), 2, "column 'text': expected"),
    "value_object": (_jsonl(b'{"text": {}, "label": "x"}'), 2, "an object"),
    "value_null": (_jsonl(b'{"text": null, "label": "x"}'), 2, "null"),
    "half_surrogate": (_jsonl(b'{"text": "\\ud800"}'), 2, "surrogate"),
    "latin_1": (_jsonl('{"text": "é"}'.encode("latin-1")), 2, "UTF-8"),
    "utf_16": (GOOD.decode().encode("utf-16"), 1, "UTF-8"),
    "bom_in_the_middle": (_jsonl(b"\xef\xbb\xbf" + GOOD), 2, "byte order mark"),
    "overlong_utf_8": (_jsonl(b'{"text": "\xc0\xaf"}'), 2, "UTF-8"),
    "nul": (_jsonl(b'{"text": "\x00"}'), 2, "not JSON"),
    "column_without_a_name": (_jsonl(b'{"": "a"}'), 2, "column name"),
    "mixed_types": (_jsonl(b'{"text": 1, "label": "x"}'), 2, "mixed types in column 'text'"),
    "mixed_boolean": (b'{"a": 1}\n{"a": true}', 2, "row 1 (line 1) has a number"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", 1, "UTF-8"),
    "quotes_that_make_scanners_quadratic": (b'{"' + b'\\"' * 400_000, 1, "not JSON"),
}

CSV: dict[str, tuple[bytes, int | None, str]] = {
    "empty": (b"", None, "no rows"),
    "header_only": (b"text,label\n", None, "no rows"),
    "blank_lines_only": (b"\n\n\n", None, "no rows"),
    "column_without_a_name": (b",text,label\n0,a,x\n", None, "index=False"),
    "blank_name": (b"text, \na,x\n", None, "column 2 has no name"),
    "duplicate_column": (b"text,label,text\na,x,b\n", None, "'text' twice"),
    "too_few_cells": (b"text,label\na,x\nb\n", 2, "row 2 (line 3): expected 2 cells"),
    "too_many_cells": (b"text,label\na,x\nb, c,y\n", 2, "came 3"),
    "quotation_mark_left_open": (b'text,label\na,x\n"b,y\nc,x\n', 2, "never closed"),
    "text_after_a_quotation": (b'text,label\n"a"b,x\n', 1, "expected CSV"),
    "nul": (b"text,label\na\x00,x\n", 1, "NUL"),
    "utf_16": ("text,label\na,x\n".encode("utf-16"), 1, "UTF-8"),
    "utf_16_without_a_mark": ("text,label\na,x\n".encode("utf-16-le"), 1, "NUL"),
    "latin_1": ("text,label\né,x\n".encode("latin-1"), 1, "byte 1 of the line"),
    "carriage_returns": (b"text,label\ra,x\rb,y\r", 1, "carriage return"),
    "cell_over_the_parsers_limit": (b"text,label\n" + b"a" * 200_000 + b",x\n", 1, "131072"),
}

# name -> (rows, row at fault, words)
INLINE: dict[str, tuple[list[Any], int | None, str]] = {
    "empty": ([], None, "no rows"),
    "list": ([["a"]], 1, "came a list"),
    "text": ([{"a": "b"}, "a"], 2, "came a text"),
    "null": ([{"a": None}], 1, "row 1, column 'a'"),
    "nested": ([{"a": {"b": 1}}], 1, "an object"),
    "nan": ([{"a": float("nan")}], 1, "NaN or infinity"),
    "infinity": ([{"a": 1.0}, {"a": float("-inf")}], 2, "NaN or infinity"),
    "integer_of_5000_digits": ([{"a": 10**5000}], 1, "beyond 64 bits"),
    "half_surrogate": ([{"a": "\ud800"}], 1, "surrogate"),
    "half_surrogate_in_a_name": ([{"\ud800": "a"}], 1, "surrogate"),
    "bytes": ([{"a": b"x"}], 1, "a bytes"),
    "number_as_a_name": ([{1: "a"}], 1, "column name"),
    "mixed_types": ([{"a": "1"}, {"a": "2"}, {"a": 3}], 3, "row 1 has a text"),
    "mixed_boolean": ([{"a": True}, {"a": 0}], 2, "mixed types"),
}
