"""Rows are read as they are, or refused with the row; no line costs more than the limit."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import DataInvalid, UnsupportedFile
from adapters.training.file_bytes import HEAD_BYTES
from adapters.training.rows import DataLimits, Used, check_rows, open_rows, read_rows
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
    error = refusal(lambda: read_rows(written(data)))
    assert words in error.message
    assert error.row == row


@pytest.mark.parametrize("name", hostile_data.CSV)
def test_hostile_csv(name, written):
    data, row, words = hostile_data.CSV[name]
    error = refusal(lambda: read_rows(written(data)))
    assert words in error.message
    assert error.row == row


@pytest.mark.parametrize("name", hostile_data.INLINE)
def test_hostile_inline_rows(name):
    rows, row, words = hostile_data.INLINE[name]
    error = refusal(lambda: check_rows(rows))
    assert words in error.message
    assert error.row == row


@pytest.mark.parametrize("data", hostile_data.BINARY)
def test_files_that_are_no_text_are_named(data, written):
    with pytest.raises(UnsupportedFile, match=hostile_data.BINARY[data]) as caught:
        read_rows(written(data))
    assert caught.value.field == "data"


TWO = [{"text": "甲", "label": "x"}, {"text": "a, b; c", "label": "y"}]
LIST = '[\n {"text": "甲", "label": "x"},\n {"text": "a, b; c", "label": "y"}\n]\n'
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO)
TEXT_LABEL = Used(("text", "label"))
# name -> (the file, its layout, its separator)
FORMS = {
    "lines": (LINES, "JSON lines", None),
    "lines_with_blanks": (LINES.replace("\n", "\r\n\r\n"), "JSON lines", None),
    "list": (LIST, "JSON array", None),
    "list_on_a_line": (LIST.replace("\n", ""), "JSON array", None),
    "list_in_an_object": ('{"version": "1", "data": ' + LIST + "}", "JSON array", None),
    "list_in_an_object_on_a_line": ('{"a": ' + LIST.replace("\n", "") + "}", "JSON array", None),
    "objects_over_lines": (LINES.replace('", "', '",\n  "'), "JSON objects", None),
    "comma": ('text,label\n甲,x\n"a, b; c",y\n', "CSV", "comma"),
    "semicolon": ('text;label\r\n甲;x\r\n"a, b; c";y\r\n', "CSV", "semicolon"),
    "semicolon_of_excel": ('sep=;\r\ntext;label\r\n甲;x\r\n"a, b; c";y\r\n', "CSV", "semicolon"),
    "tab": ("text\tlabel\n甲\tx\na, b; c\ty\n", "CSV", "tab"),
    "bar": ("text|label\n甲|x\na, b; c|y\n", "CSV", "vertical bar"),
    "unused_columns": ('id,label,text\n1,x,甲\n2,y,"a, b; c"\n', "CSV", "comma"),
    "index_of_pandas": (',text,label\n0,甲,x\n1,"a, b; c",y\n', "CSV", "comma"),
    "commas_at_the_ends": ('text,label,\n甲,x,\n"a, b; c",y,\n', "CSV", "comma"),
    "blanks_in_the_header": (' text ,label \n甲,x\n"a, b; c",y\n', "CSV", "comma"),
    "unused_column_twice": ('id,text,label,id\n1,甲,x,1\n2,"a, b; c",y,2\n', "CSV", "comma"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_what_its_content_is(name, encoding, written):
    text, layout, separator = FORMS[name]
    path = written(text.encode(encoding))
    assert read_rows(path, used=TEXT_LABEL) == TWO
    with open_rows(path, used=TEXT_LABEL) as file:
        facts = file.facts
    assert (facts.layout, facts.separator) == (layout, separator)
    assert {"text", "label"} <= {name.strip() for name in facts.columns}
    assert facts.encoding.startswith("UTF-16" if encoding == "utf-16" else "UTF-8")


def test_a_document_on_one_long_line(written):
    row = '{"text": "' + "x" * 1000 + '", "label": "y"}'
    path = written(('{"data": [' + ", ".join([row] * 1500) + "]}").encode())
    assert path.stat().st_size > 2**20
    assert len(read_rows(path, used=TEXT_LABEL)) == 1500


def test_columns_that_nothing_names_may_hold_anything(written):
    data = (
        b'{"text": "a", "label": 1, "ids": [1, 2], "target": {"span": [0, 1]}, "x": null}\n'
        b'{"text": "b", "label": 2, "ids": NaN, "target": "mixed"}\n'
    )
    assert read_rows(written(data), used=TEXT_LABEL) == [
        {"text": "a", "label": 1},
        {"text": "b", "label": 2},
    ]
    assert check_rows([{"text": "a", "label": 1, "h": [[]]}], used=TEXT_LABEL) == [
        {"text": "a", "label": 1}
    ]
    nested = b'{"text": "a", "label": ["x"]}'
    error = refusal(lambda: read_rows(written(nested), used=TEXT_LABEL))
    assert (error.row, error.field, error.came) == (1, "label", "a list")


def test_a_cell_without_a_value_is_the_empty_text(written):
    data = b'{"text": null, "label": 1}\n{"text": NaN, "label": 2}\n{"text": "a", "label": null}'
    assert [tuple(row.values()) for row in read_rows(written(data))] == [
        ("", 1),
        ("", 2),
        ("a", ""),
    ]
    assert check_rows([{"a": None}, {"a": float("nan")}, {"a": 1}]) == [
        {"a": ""},
        {"a": ""},
        {"a": 1},
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("房间干净\t1\n早餐差,服务慢\t0\n", "It looks like data: put a line"),
        ("nice room\tgood\nbad\tpoor\n", "If it is data, put a line with the names"),
        ("txt,label\na,x\n", "did you mean 'txt'?"),
        ("Text;Label\na;x\n", "did you mean 'Text' and 'Label'?"),
        ("id,TEXT,label \n1,a,x\n", "did you mean 'TEXT'?"),
        ("text,id\na,x\n", "there is no column 'label'"),
    ],
)
def test_a_header_without_the_columns_that_are_used(data, words, written):
    error = refusal(lambda: read_rows(written(data.encode()), used=TEXT_LABEL))
    assert words in error.message
    assert error.field == "data"


def test_a_header_of_numbers_is_suspected_aloud(written):
    with open_rows(written(b"1,2\na,x\n"), used=Used(("1", "2"))) as file:
        assert "if it is data, put a line" in " ".join(file.facts.notes)


def test_quotation_marks_of_a_tab_separated_file(written):
    enclosing = b'text\tlabel\n"a ""b"""\tx\n"two\nlines"\ty\n'
    assert [row["text"] for row in read_rows(written(enclosing))] == ['a "b"', "two\nlines"]
    plain = b'text\tlabel\n"Good\tx\nBad"\ty\n5" screen\ty\n'
    with open_rows(written(plain)) as file:
        assert "quotation marks are read as text" in file.facts.notes[0]
        assert [source.row["text"] for source in file.sources] == ['"Good', 'Bad"', '5" screen']


def test_json_lines(written):
    data = (
        b'\xef\xbb\xbf{"t": "a", "n": 1}\r\n\n{"t": "\xe6\xbc\xa2\\n", "n": 2.5}\n{"n": 3, "t": ""}'
    )
    assert read_rows(written(data)) == [
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
    assert read_rows(written(data)) == [
        {"text": "=1+1", "label": "1"},
        {"text": '=HYPERLINK("http://x","y")', "label": "2"},
        {"text": "@SUM(A1), +1", "label": "NaN"},
        {"text": "two\r\nlines", "label": "-1"},
        {"text": 'in"side', "label": ""},
    ]


def test_the_line_is_named_beside_the_row(written):
    error = refusal(lambda: read_rows(written(b'a,b\n"1\n1",2\n\n3\n')))
    assert "row 2 (line 5)" in error.message


class Counted(io.FileIO):
    """A file that counts what is read of it."""

    num_read = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        Counted.num_read += count
        return count


@pytest.mark.parametrize("start", [b"a,b", b'{"a": '])
def test_a_line_of_a_gigabyte_is_refused_and_not_read(start, written):
    path = written(start)
    with path.open("r+b") as file:
        file.truncate(2**30)  # sparse: a gigabyte of NUL without a line feed

    class CountedPath(type(path)):
        def open(self, mode):
            return io.BufferedReader(Counted(self, mode))

    Counted.num_read = 0
    error = refusal(lambda: read_rows(CountedPath(path)))
    assert error.row == 1
    assert "a line of more than 1048576 bytes" in error.message
    most = 2**20 + 2 * io.DEFAULT_BUFFER_SIZE + HEAD_BYTES
    assert 2**20 < Counted.num_read <= most


def test_a_quotation_mark_left_open_is_read_up_to_the_limit(written):
    data = b'a,b\n1,2\n"' + b"x,y\n" * 100_000
    error = refusal(lambda: read_rows(written(data), replace(SMALL, max_bytes=10**9)))
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
        (b'{"a": 1}\n' + (b" " * 90 + b"\n") * 11, 2, "at most 1000 bytes"),
        (b"\n" * 201, 1, "at most 200 lines"),
    ],
)
def test_limits_of_files(data, row, words, written):
    error = refusal(lambda: read_rows(written(data), SMALL))
    assert (error.row, words in error.message) == (row, True)


def test_a_line_of_exactly_the_limit_passes(written):
    data = b'{"a": "' + b"x" * 90 + b'"}\n'
    assert len(data) == 100
    assert read_rows(written(data), SMALL) == [{"a": "x" * 90}]


def test_whole_numbers_and_others_may_mix():
    assert check_rows([{"a": 1}, {"a": 0.5}, {"b": True}]) == [{"a": 1}, {"a": 0.5}, {"b": True}]


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
    assert read_rows(path) == rows == check_rows(rows)


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
    assert read_rows(path) == rows


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text('{}[]",:;\t|ab1 \n', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "data"
    path.write_bytes(data)
    try:
        rows = read_rows(path)
    except (DataInvalid, UnsupportedFile):
        return
    assert check_rows(rows) == rows
