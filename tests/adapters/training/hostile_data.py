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
    "list_of_lists": (b'[["a", "b"]]', 1, "an object of columns, came a list"),
    "list_of_numbers": (b"[1, 2]", 1, "an object of columns"),
    "empty_list": (b"[]", None, "no rows"),
    "list_with_a_comma_too_many": (b'[{"a": 1},\n]', 2, "a comma after the last row"),
    "list_without_a_comma": (b'[{"a": 1} {"a": 2}]', 2, "no comma between"),
    "list_cut_short": (b'[{"a": 1},\n{"a": 2', 2, "row 2 (line 2): it is not JSON"),
    "list_with_a_broken_row": (b'[{"a": 1},\n{"a":\n oops}]', 2, "(line 3, column 2)"),
    "two_lists": (b'[{"a": 1}]\n[{"a": 2}]', None, "the list that ends in line 1"),
    "deep_list": (b"[" * 100_000, 1, "an object of columns, came a list"),
    "deep_row_of_a_list": (b'[{"a": ' + b"[" * 100_000, 1, "64 levels"),
    "long_row_of_a_list": (b'[{"a": "' + b"x" * 2**20 + b'"}]', 1, "at most 1048576 bytes"),
    "two_lists_in_an_object": (
        b'{"train": [{"a": 1}], "test": [{"a": 2}]}',
        None,
        "jq '.[\"train\"]'",
    ),
    "columns_of_pandas": (b'{"a": {"0": "x"}, "b": {"0": "y"}}', None, "orient='records'"),
    "lists_of_columns": (b'{"a": ["x"], "b": ["y"]}', None, "orient='records'"),
    "commas_at_the_ends": (b'{"a": 1},\n{"a": 2},\n', 1, "no comma at their ends"),
    "python_lines": (b"{'a': 1}\n{'a': 2}", 1, "json.dumps"),
    "string": (_jsonl(b'"text"'), 2, "a string came"),
    "null": (_jsonl(b"null"), 2, "null came"),
    "after_blank_lines": (GOOD + b"\n\n" + b"oops", 2, "row 2 (line 4)"),
    "two_on_a_line": (_jsonl(GOOD.strip() + GOOD), 2, "not JSON"),
    "cut_short": (_jsonl(b'{"text": "a", "la'), 2, "not JSON"),
    "python": (_jsonl(b"{'text': 'a'}"), 2, "not JSON"),
    "duplicate": (_jsonl(b'{"text": "a", "text": "b"}'), 2, "given twice"),
    "duplicate_by_escape": (_jsonl(b'{"text": "a", "\\u0074ext": "b"}'), 2, "given twice"),
    "infinity": (_jsonl(b'{"text": -Infinity}'), 2, "infinity"),
    "float_overflow": (_jsonl(b'{"text": 1e999}'), 2, "too large"),
    "integer_of_100000_digits": (_jsonl(b'{"text": ' + b"9" * 100_000 + b"}"), 2, "64 bits"),
    "deep_lists": (_jsonl(b'{"text": ' + b"[" * 100_000), 2, "nested"),
    "deep_objects": (_jsonl(b'{"a":' * 100_000), 2, "nested"),
    "value_list": (_jsonl(b'{"text": ["a"], "label": "x"}'), 2, "column 'text': expected"),
    "value_object": (_jsonl(b'{"text": {}, "label": "x"}'), 2, "an object"),
    "half_surrogate": (_jsonl(b'{"text": "\\ud800"}'), 2, "surrogate"),
    "latin_1": (_jsonl('{"text": "é"}'.encode("latin-1")), 2, "UTF-8"),
    "utf_16_without_a_mark": (GOOD.decode().encode("utf-16-be"), 1, "iconv -f utf-16be"),
    "utf_16_that_is_none": (b"\xff\xfe{\x00\x00\xd8", 1, "UTF-16"),
    "bom_in_the_middle": (_jsonl(b"\xef\xbb\xbf" + GOOD), 2, "byte order mark"),
    "overlong_utf_8": (_jsonl(b'{"text": "\xc0\xaf"}'), 2, "UTF-8"),
    "nul": (_jsonl(b'{"text": "\x00"}'), 2, "not JSON"),
    "column_without_a_name": (_jsonl(b'{"": "a"}'), 2, "column name"),
    "mixed_types": (_jsonl(b'{"text": 1, "label": "x"}'), 2, "mixed types in column 'text'"),
    "mixed_boolean": (b'{"a": 1}\n{"a": true}', 2, "row 1 (line 1) has a number"),
    "quotes_that_make_scanners_quadratic": (b'{"' + b'\\"' * 400_000, 1, "not JSON"),
}

CSV: dict[str, tuple[bytes, int | None, str]] = {
    "empty": (b"", None, "no rows"),
    "header_only": (b"text,label\n", None, "no rows"),
    "blank_lines_only": (b"\n\n\n", None, "no rows"),
    "duplicate_column": (b"text,label,text\na,x,b\n", None, "'text' twice"),
    "too_few_cells": (b"text,label\na,x\nb\n", 2, "row 2 (line 3): expected 2 cells"),
    "too_many_cells": (b"text,label\na,x\nb, c,y\n", 2, "came 3"),
    "quotation_mark_left_open": (b'text,label\na,x\n"b,y\nc,x\n', 2, "never closed"),
    "text_after_a_quotation": (b'text,label\n"a"b,x\n', 1, "expected CSV"),
    "nul": (b"text,label\na\x00,x\n", 1, "NUL"),
    "utf_16_without_a_mark": ("text,label\na,x\n".encode("utf-16-le"), 1, "iconv -f utf-16le"),
    "latin_1": ("text,label\né,x\n".encode("latin-1"), 1, "iconv -f windows-1252"),
    "gb18030": (
        "问,答\n口腔,头痛怎么办\n".encode("gb18030"),
        1,
        "line 1, the header: expected UTF-8, came a byte that is not (byte 1 of the line); the file "
        "looks like GB18030 (GBK): convert it with iconv",
    ),
    "gb18030_like_korean": (
        "text,label\n房间干净,好评\n".encode("gb18030"),
        1,
        "iconv -f gb18030 -t utf-8",
    ),
    "gb18030_list": ('[{"a": "头痛怎么办"}]'.encode("gbk"), 1, "iconv -f gb18030 -t utf-8"),
    "big5": ("問,答\n這是很好的產品,我喜歡\n".encode("big5"), 1, "iconv -f big5"),
    "shift_jis": ("a,b\nこれはとても良い,はい\n".encode("cp932"), 1, "iconv -f shift_jis"),
    "euc_kr": ("a,b\n이 제품은 정말 좋습니다,네\n".encode("euc-kr"), 1, "iconv -f euc-kr"),
    "windows_1251": (b"a,b\n\xce\xf7\xe5\xed\xfc \xf5\xee\xf0\xee\xf8\xee,x\n", 1, "windows-1251"),
    "damaged_utf_8": (
        "a,b\n漢字,1\n".encode() + b"\xe6\xe6,2\n",
        2,
        "row 2 (line 3): expected UTF-8, came a byte that is not (byte 1 of",
    ),
    "damaged_utf_8_between_tabs": (b"a\tb\n1\t2\n\xe6\xe6\t2\n", 2, "row 2 (line 3): expected"),
    "carriage_returns": (b"text,label\ra,x\rb,y\r", 1, "carriage return"),
    "cell_over_the_parsers_limit": (b"text,label\n" + b"a" * 200_000 + b",x\n", 1, "131072"),
}

# name -> (rows, row at fault, words)
INLINE: dict[str, tuple[list[Any], int | None, str]] = {
    "empty": ([], None, "no rows"),
    "list": ([["a"]], 1, "came a list"),
    "text": ([{"a": "b"}, "a"], 2, "came a text"),
    "nested": ([{"a": {"b": 1}}], 1, "an object"),
    "infinity": ([{"a": 1.0}, {"a": float("-inf")}], 2, "NaN or infinity"),
    "integer_of_5000_digits": ([{"a": 10**5000}], 1, "beyond 64 bits"),
    "half_surrogate": ([{"a": "\ud800"}], 1, "surrogate"),
    "half_surrogate_in_a_name": ([{"\ud800": "a"}], 1, "surrogate"),
    "bytes": ([{"a": b"x"}], 1, "a bytes"),
    "number_as_a_name": ([{1: "a"}], 1, "column name"),
    "mixed_types": ([{"a": "1"}, {"a": "2"}, {"a": 3}], 3, "row 1 has a text"),
    "mixed_boolean": ([{"a": True}, {"a": 0}], 2, "mixed types"),
}

# bytes of a file that is no text -> the word that names it
BINARY: dict[bytes, str] = {
    b"\x1f\x8b\x08\x00\x00": "gunzip",
    b"PK\x03\x04\x14\x00xl/workbook.xml": "pandas.read_excel",
    b"PK\x03\x04\x14\x00rows.jsonl": "unzip",
    b"PAR1\x15\x04": "pandas.read_parquet",
    b"ARROW1\x00\x00": "an Arrow file",
    b"\x80\x04\x95\x00": "a Python pickle",
    b"\x00" * 257 + b"ustar\x00": "tar -xf",
    b"<!DOCTYPE html><html>": "a web page",
    b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
}
