"""Who serves a data directory: servers of one base are told of each other, others are kept off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.errors import StorageUnavailable
from server.store.data_dir import held_by_server

OURS, THEIRS = "a" * 64, "b" * 64


def test_a_server_of_another_base_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    with held_by_server(tmp_path, "ours", OURS) as alone:
        assert alone == []
        with held_by_server(tmp_path, "ours too", OURS) as others:
            assert [(one.base, one.pid) for one in others] == [("ours", os.getpid())]
        with (
            pytest.raises(StorageUnavailable) as caught,
            held_by_server(tmp_path, "theirs", THEIRS),
        ):
            pass
        for said in ("ours (aaaaaaaaaaaa)", "theirs (bbbbbbbbbbbb)", "--data-dir", str(tmp_path)):
            assert said in caught.value.message
    with held_by_server(tmp_path, "theirs", THEIRS) as others:
        assert others == []
    assert list((tmp_path / "serving").iterdir()) == []


def test_a_server_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from server.store.data_dir import held_by_server\n"
        f"with held_by_server(Path(sys.argv[1]), 'ours', {OURS!r}):\n"
        "    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert len(list((tmp_path / "serving").iterdir())) == 1
    with held_by_server(tmp_path, "theirs", THEIRS) as others:
        assert others == []
