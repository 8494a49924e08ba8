"""The digest names what a base computes: its tensors and config, not its files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from adapters.base_files import weight_files
from adapters.errors import BaseUnsupported
from server.base.digest import DIGEST_CACHE_FILE, base_digest, compute_digest
from tests.server.base.tiny import edit_config, save_tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


def test_same_weights_in_another_place_and_layout_have_the_same_digest(base, tmp_path):
    sharded = save_tiny(tmp_path / "sharded", shard="20KB")
    assert len(weight_files(sharded)) > 1
    assert compute_digest(sharded) == compute_digest(base)


def test_origin_keys_of_the_config_do_not_enter(base):
    before = compute_digest(base)
    edit_config(base, _name_or_path="/somebody/else", transformers_version="9.9.9")
    assert compute_digest(base) == before


def test_config_weights_and_dtype_enter(base, tmp_path):
    digests = {
        compute_digest(base),
        compute_digest(save_tiny(tmp_path / "seed", seed=1)),
        compute_digest(save_tiny(tmp_path / "dtype", dtype="bfloat16")),
        compute_digest(edit_config(save_tiny(tmp_path / "config"), rms_norm_eps=1e-3)),
    }
    assert len(digests) == 4


def test_digest_is_remembered_until_a_file_changes(base, tmp_path):
    first = base_digest(base)
    cache = base / DIGEST_CACHE_FILE
    known = json.loads(cache.read_text())
    # A marked cache shows that the second call reads it instead of hashing again.
    cache.write_text(json.dumps({**known, "digest": "marked"}))
    assert base_digest(base) == "marked"
    shutil.copy(save_tiny(tmp_path / "other", seed=1) / "model.safetensors", base)
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert base_digest(base) not in {"marked", first}


@pytest.mark.parametrize("content", [b"not json", b"[]", b'{"state": 1}'])
def test_a_damaged_cache_is_hashed_over(base, content):
    want = compute_digest(base)
    (base / DIGEST_CACHE_FILE).write_bytes(content)
    assert base_digest(base) == want


def test_read_only_base_is_remembered_elsewhere(base, tmp_path):
    # A directory in the cache file's place stands for a base that cannot be written (tests may
    # run as root, whom permissions do not stop).
    (base / DIGEST_CACHE_FILE).mkdir()
    elsewhere = tmp_path / "cache"
    digest = base_digest(base, elsewhere)
    assert [file.name.endswith(DIGEST_CACHE_FILE) for file in elsewhere.iterdir()] == [True]
    assert base_digest(base, elsewhere) == digest == compute_digest(base)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"\x10" + b"\0" * 7 + b"{" * 16])
def test_not_a_safetensors_file(base, content):
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(
        BaseUnsupported, match=f"^{base}.model.safetensors is not a safetensors file"
    ):
        compute_digest(base)
