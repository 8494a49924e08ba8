"""Rows are read as they are, or refused with the row; no line costs more than the limit."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import DataInvalid
from adapters.training.rows import DataLimits, check_rows, kind_of, read_rows
from tests.adapters.training import hostile_data

SMALL = DataLimits(max_rows=3, max_bytes=1_000, max_line_bytes=100, max_columns=4, max_values=6)


@pytest.fixture
def written(tmp_path):
    def write(data):
        path = tmp_path / "data"
        path.write_bytes(data)
        return path

    return write


def refusal(read):
    with pytest.raises(DataInvalid) as caught:
        read()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
    return caught.value


@pytest.mark.parametrize("name", hostile_data.JSONL)
def test_hostile_json_lines(name, written):
    data, row, words = hostile_data.JSONL[name]
    error = refusal(lambda: read_rows(written(data), "jsonl"))
    assert words in error.message
    assert error.row == row


@pytest.mark.parametrize("name", hostile_data.CSV)
def test_hostile_csv(name, written):
    data, row, words = hostile_data.CSV[name]
    error = refusal(lambda: read_rows(written(data), "csv"))
    assert words in error.message
    assert error.row == row


@pytest.mark.parametrize("name", hostile_data.INLINE)
def test_hostile_inline_rows(name):
    rows, row, words = hostile_data.INLINE[name]
    error = refusal(lambda: check_rows(rows))
    assert words in error.message
    assert error.row == row


def test_json_lines(written):
    data = (
        b'\xef\xbb\xbf{"t": "a", "n": 1}\r\n\n{"t": "\xe6\xbc\xa2\\n", "n": 2.5}\n{"n": 3, "t": ""}'
    )
    assert read_rows(written(data), "jsonl") == [
        {"t": "a", "n": 1},
        {"t": "漢\n", "n": 2.5},
        {"n": 3, "t": ""},
    ]


def test_csv_cells_are_text_whatever_they_look_like(written):
    data = (
        b"\xef\xbb\xbftext,label\r\n"
        b"=1+1,1\r\n"
        b'"=HYPERLINK(""http://x"",""y"")",2\r\n'
        b"\r\n"
        b'"@SUM(A1), +1",NaN\r\n'
        b'"two\r\nlines",-1\r\n'
        b'in"side,\r\n'
    )
    assert read_rows(written(data), "csv") == [
        {"text": "=1+1", "label": "1"},
        {"text": '=HYPERLINK("http://x","y")', "label": "2"},
        {"text": "@SUM(A1), +1", "label": "NaN"},
        {"text": "two\r\nlines", "label": "-1"},
        {"text": 'in"side', "label": ""},
    ]


def test_the_line_is_named_beside_the_row(written):
    error = refusal(lambda: read_rows(written(b'a,b\n"1\n1",2\n\n3\n'), "csv"))
    assert "row 2 (line 5)" in error.message


class Counted(io.FileIO):
    """A file that counts what is read of it."""

    num_read = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        Counted.num_read += count
        return count


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_of_a_gigabyte_is_refused_and_not_read(kind, written):
    path = written(b"")
    with path.open("r+b") as file:
        file.truncate(2**30)  # sparse: a gigabyte of NUL without a line feed

    class CountedPath(type(path)):
        def open(self, mode):
            return io.BufferedReader(Counted(self, mode))

    Counted.num_read = 0
    error = refusal(lambda: read_rows(CountedPath(path), kind))
    assert error.row == 1
    assert "a line of more than 1048576 bytes" in error.message
    assert 2**20 < Counted.num_read <= 2**20 + 2 * io.DEFAULT_BUFFER_SIZE


def test_a_quotation_mark_left_open_is_read_up_to_the_limit(written):
    data = b'a,b\n1,2\n"' + b"x,y\n" * 100_000
    error = refusal(lambda: read_rows(written(data), "csv", replace(SMALL, max_bytes=10**9)))
    assert error.row == 2
    assert "is a quotation mark left open?" in error.message


@pytest.mark.parametrize(
    ("rows", "row", "words"),
    [
        ([{"a": "1"}] * 4, 4, "more than 3 rows"),
        ([{"a": "x" * 998}], 1, None),
        ([{"a": "x" * 999}], 1, None),
        ([{"a": "x" * 500}, {"a": "y" * 500}], 2, "at most 1000 bytes"),
        ([{"a": 1, "b": 1}, {"c": 1, "d": 1, "e": 1}], 2, "at most 4 columns"),
        ([dict.fromkeys("abc", 1)] * 3, 3, "at most 6 values"),
    ],
)
def test_limits_of_inline_rows(rows, row, words):
    if words is None:
        assert check_rows(rows, SMALL) == rows
        return
    error = refusal(lambda: check_rows(rows, SMALL))
    assert (error.row, words in error.message) == (row, True)


@pytest.mark.parametrize(
    ("data", "row", "words"),
    [
        (b'{"a": 1}\n' * 4, 4, "more than 3 rows"),
        (b'{"a": "' + b"x" * 93 + b'"}\n', 1, "a line of more than 100 bytes"),
        ((b'{"a": "' + b"x" * 85 + b'"}\n') * 11, 4, "more than 3 rows"),
        (b"\n" * 1001, 1, "at most 1000 bytes"),
    ],
)
def test_limits_of_files(data, row, words, written):
    error = refusal(lambda: read_rows(written(data), "jsonl", SMALL))
    assert (error.row, words in error.message) == (row, True)


def test_a_line_of_exactly_the_limit_passes(written):
    data = b'{"a": "' + b"x" * 90 + b'"}\n'
    assert len(data) == 100
    assert read_rows(written(data), "jsonl", SMALL) == [{"a": "x" * 90}]


def test_whole_numbers_and_others_may_mix():
    assert check_rows([{"a": 1}, {"a": 0.5}, {"b": True}]) == [{"a": 1}, {"a": 0.5}, {"b": True}]


def test_kinds_by_name():
    assert [kind_of(name) for name in ("a.jsonl", "B.CSV", "a.json", "csv", "x.csv.exe")] == [
        "jsonl",
        "csv",
        None,
        None,
        None,
    ]


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)
names = texts.filter(str.strip)
numbers = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def tables(draw, *kinds):
    columns = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    of = {column: draw(st.sampled_from(kinds)) for column in columns}
    row = st.fixed_dictionaries({column: of[column] for column in columns})
    return draw(st.lists(row, min_size=1, max_size=5))


@settings(deadline=None)
@given(tables(texts, numbers, st.booleans()), st.booleans())
def test_json_lines_come_back_as_they_were_written(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    assert read_rows(path, "jsonl") == rows == check_rows(rows)


@settings(deadline=None)
@given(tables(texts.filter(lambda text: "\0" not in text)))
def test_csv_comes_back_as_it_was_written(tmp_path_factory, rows):
    columns = list(rows[0])
    if any("\0" in column for column in columns):
        return
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(columns)
        writer.writerows([row[column] for column in columns] for row in rows)
    assert read_rows(path, "csv") == rows


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["jsonl", "csv"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data, kind):
    path = tmp_path_factory.getbasetemp() / "data"
    path.write_bytes(data)
    try:
        rows = read_rows(path, kind)
    except DataInvalid:
        return
    assert check_rows(rows) == rows
