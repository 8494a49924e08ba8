"""Whatever the bytes, a reader gives a value or one of our own errors, and takes little memory."""

from __future__ import annotations

import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.checkpoint.archive import stage_upload
from adapters.checkpoint.folder import read_config, read_header
from adapters.errors import (
    ArchiveInvalid,
    CheckpointError,
    DataInvalid,
    TemplateInvalid,
    UnsupportedFile,
)
from adapters.strict_json import StrictJsonError, parse_object
from adapters.template import Template
from adapters.training.rows import read_rows
from tests.fuzz.mutation import mutated
from tests.hostile.make_files import corpus, gzip_of, pair, tar_of, zip_of

CORPUS = corpus()
GOOD = pair()
CONFIG, TENSORS = GOOD["adapter_config.json"], GOOD["adapter_model.safetensors"]
ARCHIVES = (zip_of(GOOD), zip_of(GOOD, method=8), tar_of(GOOD), gzip_of(tar_of(GOOD)))
ROWS = b'{"text": "a", "label": "x"}\n' * 3
CSV = b'text,label\n"a, b",x\n\xc3\xa4,y\n'
TEXTS = ("{a} {{b}} : ", "{Tweet text}", "{{", "}")
# Above what any of these small inputs needs, far below what would hurt.
MOST_BYTES = 16 << 20


def seeds(folder: str) -> list[bytes]:
    return [data for name, data in CORPUS.items() if name.startswith(folder)]


def read(data: bytes, reader: Callable[[Path], object], *refusals: type[Exception]) -> None:
    """Give a reader a file; only `refusals` may come out, and memory is bounded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        tracemalloc.start()
        try:
            reader(path)
        except refusals:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak < MOST_BYTES


@settings(max_examples=100)
@given(mutated(TENSORS, *seeds("tensors/")))
def test_headers(data):
    read(data, read_header, CheckpointError)


@settings(max_examples=100)
@given(mutated(CONFIG, *seeds("configs/")))
def test_configs(data):
    read(data, read_config, CheckpointError)


@settings(max_examples=100)
@given(
    mutated(*ARCHIVES, *seeds("archives/")), st.sampled_from(["a.zip", "a.tar", "a.tar.gz", "a"])
)
def test_archives(data, name):
    def unpack(path: Path) -> None:
        out = path.parent / "out"
        out.mkdir()
        try:
            stage_upload([(name, path)], out)
        finally:
            assert {one.name for one in path.parent.iterdir()} == {"file", "out"}
            assert {one.name for one in out.iterdir()} <= GOOD.keys()

    read(data, unpack, CheckpointError)


@pytest.mark.parametrize("offset", [1, 2**31])
def test_a_zip_whose_table_of_contents_claims_to_begin_elsewhere(offset, tmp_path):
    good = ARCHIVES[0]
    # zipfile takes what is missing off every member's place.
    path = tmp_path / "a.zip"
    path.write_bytes(good[:-6] + struct.pack("<I", len(good) + offset) + good[-2:])
    (tmp_path / "out").mkdir()
    with pytest.raises(ArchiveInvalid, match="cannot be read"):
        stage_upload([("a.zip", path)], tmp_path / "out")


def test_a_zip_with_a_member_that_has_no_name(tmp_path):
    # Found by tests.fuzz.with_atheris: zipfile looks at a name's last character.
    path = tmp_path / "a.zip"
    path.write_bytes(zip_of({"": b"x"}))
    (tmp_path / "out").mkdir()
    with pytest.raises(ArchiveInvalid, match="cannot be read"):
        stage_upload([("a.zip", path)], tmp_path / "out")


@settings(max_examples=100)
@given(mutated(CONFIG, *seeds("bodies/")), st.integers(1, 16))
def test_strict_json(data, depth):
    try:
        found = parse_object(data, depth)
    except StrictJsonError:
        return
    assert isinstance(found, dict)


@settings(max_examples=100)
@given(mutated(ROWS, *seeds("rows/")))
def test_json_lines(data):
    read(data, read_rows, DataInvalid, UnsupportedFile)


@settings(max_examples=100)
@given(mutated(b'{"data": [' + ROWS.replace(b"}\n{", b"},\n{") + b"]}", *seeds("rows/")))
def test_json_documents(data):
    read(data, read_rows, DataInvalid, UnsupportedFile)


@settings(max_examples=100)
@given(mutated(CSV, *seeds("rows/")))
def test_csv(data):
    read(data, read_rows, DataInvalid, UnsupportedFile)


@settings(max_examples=100)
@given(st.lists(st.sampled_from([*TEXTS, "{", "}", " "]) | st.text(max_size=5)).map("".join))
def test_templates(text):
    try:
        template = Template.parse(text)
    except TemplateInvalid:
        return
    # What is put in is never read again as a template.
    assert template.render(dict.fromkeys(template.columns, "{x}")).count("{x}") >= sum(
        not isinstance(part, str) for part in template.parts
    )
