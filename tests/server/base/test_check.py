"""What is no base is said in one sentence from the names of its files, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.errors import BaseUnsupported
from server.base.check import check_base
from server.config.settings import Settings
from tests.server.cli.runner import refusal

LLAMA = {"model_type": "llama"}
# The folder's files: objects are JSON, None is an empty file.
FOLDERS = {
    "an encoder": ({"config.json": {"model_type": "bert"}}, "bert is an encoder: it reads whole"),
    "an encoder-decoder": (
        {"config.json": {"model_type": "t5", "is_encoder_decoder": True}},
        "t5 is an encoder-decoder, which is not served",
    ),
    "no tokenizer": ({"config.json": LLAMA}, "holds no tokenizer (tokenizer.json or"),
    "no config": ({"tokenizer.json": {}}, "no config.json; it holds weights alone"),
    "config is no object": ({"config.json": [1]}, "expected an object with a model_type"),
    "a folder above": ({"inner/config.json": LLAMA}, "there is one in "),
    "the hub's cache": ({"snapshots/abc/config.json": LLAMA}, "there is one in "),
    "an adapter": ({"adapter_config.json": {}}, "add it with graftwork adapters add "),
    "adapters": ({"one/adapter_config.json": {}}, "add them with graftwork adapters add"),
    "a base and an adapter": (
        {"config.json": LLAMA, "adapter_config.json": {}},
        "holds an adapter beside the base",
    ),
}


def folder(home: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("" if value is None else json.dumps(value))
    return home


def refused(base: object, revision: str | None = None) -> str:
    with pytest.raises(BaseUnsupported) as caught:
        check_base(str(base), revision)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(("files", "said"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_no_base(tmp_path, files, said):
    weights = {} if "inner" in str(files) or "adapters add" in said else {"model.safetensors": None}
    assert said in refused(folder(tmp_path, {**weights, **files}))


def test_other_weights_and_files(tmp_path):
    pickled = folder(tmp_path / "pickled", {"config.json": LLAMA, "pytorch_model.bin": None})
    assert "only pickles (pytorch_model.bin)" in refused(pickled)
    (tmp_path / "model.gguf").touch()
    assert "GGUF is not served" in refused(tmp_path / "model.gguf")
    assert f"name its directory: {pickled}" in refused(pickled / "config.json")


def test_a_base_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-tiny").mkdir()
    assert "did you mean llama-tiny?" in refused("./llama-tiyn")
    assert "did you mean llama-tiny?" in refused("llama-tinny")
    assert "as a hub id it needs a pinned revision" in refused("someone/llama")
    assert check_base("someone/llama", "0" * 40) is None
    assert "a revision belongs to a hub id" in refused("llama-tiny", "0" * 40)


def test_a_good_base_passes(tiny_base):
    assert check_base(tiny_base, None) == tiny_base


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--port", "0"],
        ["worker"],
        ["adapters", "add", "FOLDER"],
        ["generate", "--prompt", "x"],
    ],
)
def test_commands_refuse_before_anything_starts(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "bert", {"config.json": {"model_type": "bert"}, "model.safetensors": None})
    folder(tmp_path / "FOLDER", {"adapter_config.json": {}, "adapter_model.safetensors": None})
    said = refusal(*words, "--base", "bert", "--data-dir", tmp_path / "data")
    assert said.startswith("--base: bert: bert is an encoder")
    assert not (tmp_path / "data").exists()


def test_arguments_are_checked_before_the_default_base_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_CACHE_DIR", str(tmp_path / "cache"))
    data, gone = ["--data-dir", tmp_path / "data"], tmp_path / "gone"
    for words in (
        ["adapters", "add", gone],
        ["adapters", "combine", "a:1", "--name", "b"],
        ["train", "--method", "ia3", "--data", gone, "--out", tmp_path / "out"],
        ["eval", "--data", gone],
        ["generate", "--adapter", "nobody", "--prompt", "x"],
    ):
        refusal(*words, *data)
    assert list(tmp_path.iterdir()) == []


def test_the_default_base_lies_in_the_user_s_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("GRAFTWORK_BASE", "GRAFTWORK_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    settings = Settings()
    assert settings.base == str(tmp_path / "cache" / "graftwork" / "base")
    assert settings.is_default_base
    assert not Settings(base=str(tmp_path)).is_default_base
    monkeypatch.setenv("GRAFTWORK_CACHE_DIR", str(tmp_path / "own"))
    assert Settings().base == str(tmp_path / "own" / "base")
    # One that was made in the working directory goes on being used.
    monkeypatch.delenv("GRAFTWORK_CACHE_DIR")
    folder(tmp_path / ".graftwork" / "base", {"graftwork_base.json": {}})
    assert Path(Settings().base) == Path(".graftwork/base")
