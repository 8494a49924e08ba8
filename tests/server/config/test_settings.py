"""Every setting is documented, and only the settings read the environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.config.settings import Settings

SERVER = Path(__file__).parents[3] / "server"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_says_what_it_does(name):
    description = Settings.model_fields[name].description
    assert description
    assert description.endswith(".")


def test_the_environment_and_arguments(monkeypatch):
    monkeypatch.setenv("GRAFTWORK_PORT", "9000")
    monkeypatch.setenv("GRAFTWORK_HOST", "::1")
    settings = Settings(port=9001)
    assert (settings.port, settings.host) == (9001, "::1")


@pytest.mark.parametrize("change", [{"port": 70_000}, {"threads": 0}, {"dtype": "int8"}])
def test_values_out_of_range_are_refused(change):
    with pytest.raises(ValidationError):
        Settings(**change)


def test_nothing_else_reads_the_environment():
    readers = [
        path.name
        for path in SERVER.rglob("*.py")
        if re.search(r"os\.environ\[|os\.environ\.get|os\.getenv", path.read_text(encoding="utf-8"))
    ]
    assert readers == []


def test_the_engine_gets_bytes_and_paths(tmp_path):
    config = Settings(data_dir=tmp_path, kv_mib=3, threads=2).engine_config()
    assert config.kv_bytes == 3 * 1024 * 1024
    assert config.blobs_dir == str(tmp_path / "blobs")
    assert config.threads == 2


def test_the_engine_gets_the_batching(tmp_path, monkeypatch):
    assert Settings(data_dir=tmp_path).engine_config().batching == "mixed"
    monkeypatch.setenv("GRAFTWORK_BATCHING", "per-adapter")
    assert Settings(data_dir=tmp_path).engine_config().batching == "per-adapter"


def test_a_base_is_named_after_its_place(tmp_path):
    directory = tmp_path / "Tiny base ä"
    directory.mkdir()
    assert Settings(base=str(directory)).base_id == "Tiny-base--"
    assert Settings(base="org/model").base_id == "org/model"
    assert Settings(base="org/model", base_name="mine").base_id == "mine"
