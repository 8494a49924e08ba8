"""Folders as people send them are staged; hostile archives are refused and write nothing outside."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from adapters import errors
from adapters.checkpoint import added_tokens
from adapters.checkpoint.archive import stage_upload, zip_blocks
from adapters.checkpoint.folder import FILES, digest_of
from adapters.checkpoint.limits import CheckpointLimits
from tests.adapters import checkpoints
from tests.adapters.checkpoint.hostile import archives
from tests.adapters.checkpoint.hostile.archives import PAIR, tar_of, zip_of


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    directory = tmp_path / "staging"
    directory.mkdir()
    return directory


def _upload(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "upload"
    path.write_bytes(data)
    return path


def _assert_staged(staging: Path) -> None:
    assert {path.name: path.read_bytes() for path in staging.iterdir()} == PAIR


@pytest.mark.parametrize("attack", archives.ATTACKS)
def test_a_hostile_archive_is_refused(attack: str, tmp_path: Path, staging: Path) -> None:
    _, error, words = archives.ATTACKS[attack]
    path = archives.write(tmp_path, attack)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(error) as caught:
        stage_upload([("a.zip", path)], staging)
    assert type(caught.value) is error
    assert words in caught.value.message
    assert time.process_time() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    # Nothing outside staging, and in it no more than the two names.
    assert {entry.name for entry in tmp_path.iterdir()} == {"upload", "staging"}
    assert {entry.name for entry in staging.iterdir()} <= FILES


@pytest.mark.parametrize("prefix", ["", "./", "my-adapter/", "./my adapter/"])
@pytest.mark.parametrize("kind", ["zip", "stored", "tar", "gz"])
def test_a_folder_is_taken_with_its_extras(
    kind: str, prefix: str, tmp_path: Path, staging: Path
) -> None:
    extras = {
        "__MACOSX/._adapter_config.json": b"junk",
        "__MACOSX/adapter_config.json": b"junk",
        f"{prefix}.DS_Store": b"junk",
        f"{prefix}README.md": b"# Adapter",
        f"{prefix}training_args.bin": b"junk",
        f"{prefix}tokenizer/vocab.json": b"junk",
    }
    files = {**extras, **{f"{prefix}{name}": data for name, data in PAIR.items()}}
    if kind in ("zip", "stored"):
        method = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        data = zip_of(files, method=method)
    else:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "gz" else "w") as archive:
            folder = tarfile.TarInfo(prefix or ".")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        data = out.getvalue()
    ignored = stage_upload([("upload", _upload(tmp_path, data))], staging).ignored
    _assert_staged(staging)
    assert ignored == tuple(sorted(name.removeprefix("./") for name in extras))


TOKENIZER_FILES = {
    "added_tokens.json": {"<sep>": 50, "<old>": 3},
    "special_tokens_map.json": {"pad_token": {"content": "[PAD]"}, "eos_token": "</s>", "x": [1]},
    "tokenizer_config.json": {
        "added_tokens_decoder": {"51": {"content": "<a>"}, "2": {"content": "</s>"}, "x": 7},
        "additional_special_tokens": ["<a>", "<b>"],
    },
    "tokenizer.json": {"version": "1.0", "added_tokens": [{"id": 52, "content": "<c>"}, 3]},
}


@pytest.mark.parametrize("kind", ["zip", "loose"])
def test_tokens_beside_an_adapter_that_the_base_lacks_are_a_warning(
    kind: str, tmp_path: Path, staging: Path
) -> None:
    files = {name: json.dumps(found).encode() for name, found in TOKENIZER_FILES.items()}
    files["tokenizer.json"] = files["tokenizer.json"][:-1] + b', "model": {"vocab": ' + b"9" * 2**20
    for name, data in {**PAIR, **files}.items():
        (tmp_path / name).write_bytes(data)
    parts = [(name, tmp_path / name) for name in [*PAIR, *files]]
    if kind == "zip":
        parts = [("a.zip", _upload(tmp_path, zip_of({**PAIR, **files})))]
    found = stage_upload(parts, staging)
    _assert_staged(staging)
    assert found.ignored == tuple(sorted(files))
    assert found.warnings(99) == ()
    (by_id,) = found.warnings(50)
    assert "does not have: '<sep>', '<a>', '<c>'; prompts" in by_id
    (by_name,) = found.warnings(50, {"</s>", "<old>", "<a>", "<c>", "[PAD]"}.__contains__)
    assert "does not have: '<sep>', '<b>'; prompts" in by_name


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@pytest.mark.parametrize(
    "data", [b"", b"[" * 100_000, b'["a"]', b"7", b'{"added_tokens": [', b"\xff"]
)
def test_a_tokenizers_file_that_is_none_says_nothing(name: str, data: bytes) -> None:
    assert added_tokens.tokens_of(name, data) == {}


def test_a_zip_made_on_windows_is_taken(tmp_path: Path, staging: Path) -> None:
    data = zip_of({f"folder/{name}": content for name, content in PAIR.items()})
    data = data.replace(b"folder/", b"folder\\")
    assert stage_upload([("a.zip", _upload(tmp_path, data))], staging).ignored == ()
    _assert_staged(staging)


def test_a_real_tar_of_long_names_is_taken(tmp_path: Path, staging: Path) -> None:
    long = "x" * 180
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
            for name, content in {**PAIR, "é.txt": b"x"}.items():
                info = tarfile.TarInfo(f"{long}/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        ignored = stage_upload([("a.tar", _upload(tmp_path, out.getvalue()))], staging).ignored
        assert ignored == (f"{long}/é.txt",)
        _assert_staged(staging)
        for name in FILES:
            (staging / name).unlink()


def test_loose_files_are_taken(tmp_path: Path, staging: Path) -> None:
    parts = []
    for number, (name, data) in enumerate({**PAIR, "README.md": b"x"}.items()):
        path = tmp_path / f"part{number}"
        path.write_bytes(data)
        parts.append((name, path))
    assert stage_upload(parts, staging).ignored == ("README.md",)
    _assert_staged(staging)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["adapter_config.json"], errors.FileSetInvalid, "came: adapter_config.json"),
        (["adapter_model.bin"], errors.UnsupportedFile, "torch.load('adapter_model.bin'"),
        (
            ["adapter_config.json", "training_args.bin", "adapter_model.pt"],
            errors.UnsupportedFile,
            "torch.load('adapter_model.pt'",
        ),
        (["adapter_config.json", "adapter_config.json"], errors.ArchiveInvalid, "twice"),
        (["../adapter_config.json"], errors.ArchiveInvalid, "leads out"),
        (["a.7z"], errors.UnsupportedFile, "not a .zip"),
        (["a.tar.bz2"], errors.UnsupportedFile, "not a .zip"),
        (["a.txt"], errors.FileSetInvalid, "came: a.txt"),
        ([""], errors.ArchiveInvalid, "no name"),
        ([], errors.FileSetInvalid, "came: nothing"),
        (["it's.bin"], errors.UnsupportedFile, "torch.load('adapter_model.bin'"),
    ],
)
def test_wrong_loose_files_are_refused(
    names: list[str], error: type[Exception], words: str, tmp_path: Path, staging: Path
) -> None:
    path = _upload(tmp_path, b"{}")
    with pytest.raises(error) as caught:
        stage_upload([(name, path) for name in names], staging)
    assert words in str(caught.value)


def test_a_pickle_that_is_a_zip_is_told_apart_from_an_archive(
    tmp_path: Path, staging: Path
) -> None:
    path = _upload(tmp_path, archives.headers.torch_zip())
    with pytest.raises(errors.UnsupportedFile, match=r"torch\.load"):
        stage_upload([("adapter_model.bin", path)], staging)


def test_a_fresh_ia3_adapter_shrinks_a_thousandfold_and_still_passes(
    tmp_path: Path, staging: Path
) -> None:
    data = zip_of({**PAIR, "adapter_model.safetensors": bytes(20 << 20)})
    assert len(data) < 30_000
    stage_upload([("a.zip", _upload(tmp_path, data))], staging)


def test_the_limits_are_the_callers(tmp_path: Path, staging: Path) -> None:
    path = _upload(tmp_path, tar_of(list(PAIR.items())))
    with pytest.raises(errors.CheckpointTooLarge, match="more than 50 bytes"):
        stage_upload([("a.tar", path)], staging, CheckpointLimits(file_bytes=50))


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, staging: Path) -> None:
    # The kernel's own full disk: every write to it fails with "no space left".
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    from adapters.synced_files import full_disk_is_storage_full

    with (
        pytest.raises(errors.StorageFull, match="disk is full"),
        full_disk_is_storage_full("x"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_download_is_the_same_every_time_and_uploads_again(tmp_path: Path, staging: Path) -> None:
    directory = checkpoints.soft_prompt(tmp_path / "a")
    data = b"".join(zip_blocks(directory))
    assert data == b"".join(zip_blocks(directory))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert set(archive.namelist()) == FILES
    assert stage_upload([("a.zip", _upload(tmp_path, data))], staging).ignored == ()
    assert digest_of(staging) == digest_of(directory)
