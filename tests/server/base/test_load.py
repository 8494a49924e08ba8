"""Loading: what comes out frozen and mapped, and what is refused with which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    Gemma4TextConfig,
    GPT2Config,
    JambaConfig,
    MambaConfig,
    MusicgenDecoderConfig,
    Qwen3NextConfig,
    T5Config,
)

from adapters.errors import BaseUnsupported
from server.base.convert import MANIFEST_FILE
from server.base.dtypes import default_dtype
from server.base.load import check_config, describe_base, load_base
from server.base.tokenizer import load_tokenizer
from tests.server.base.tiny import edit_config, save_tiny, tiny_config
from tests.tiny_models import ARCHITECTURES, tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _gemma4(**changes) -> Gemma4TextConfig:
    """Two layers, of which the second has full attention and, unless told otherwise, wider heads."""
    return Gemma4TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=300,
        num_kv_shared_layers=0,
        **changes,
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


def test_spec_and_frozen_model(base):
    loaded = load_base(base, dtype="float32", device="cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.name == "base"
    assert loaded.eos_token_ids == (2,)
    assert (loaded.spec.num_layers, loaded.spec.num_kv_heads, loaded.spec.dtype) == (
        2,
        2,
        "float32",
    )
    assert loaded.spec.linear_modules["model.layers.1.mlp.down_proj"].in_features == 48
    assert not any(buffer.is_meta for buffer in loaded.model.buffers())


def test_weights_are_the_files(base):
    loaded = load_base(base, dtype="float32", device="cpu")
    state = loaded.model.state_dict()
    for name, tensor in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_one_asked_for(base, dtype):
    loaded = load_base(base, dtype=dtype, device="cpu")
    assert {str(p.dtype) for p in loaded.model.parameters()} == {f"torch.{dtype}"}
    assert loaded.spec.dtype == dtype


def test_digest_does_not_depend_on_the_served_dtype(base):
    digests = {load_base(base, dtype=d).spec.digest for d in ("float32", "bfloat16")}
    assert len(digests) == 1


def test_default_dtype_follows_the_processor(base):
    capabilities = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
    want = "bfloat16" if any(capabilities.get(name) for name in names) else "float32"
    assert default_dtype("cpu") == want
    assert load_base(base, device="cpu").spec.dtype == want


def test_unknown_dtype(base):
    with pytest.raises(BaseUnsupported) as refused:
        load_base(base, dtype="int8")
    assert refused.value.came == "int8"


def test_manifest_gives_name_and_note(base):
    (base / MANIFEST_FILE).write_text(json.dumps({"name": "Some-Base", "note": "was quantized"}))
    loaded = load_base(base)
    assert (loaded.name, loaded.notes) == ("Some-Base", ("was quantized",))


MAPPED_SCRIPT = """
import sys, torch
from server.base.load import load_base

def anonymous_kib():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

load_base(sys.argv[1], dtype="bfloat16", device="cpu")  # imports and arenas settle
before = anonymous_kib()
loaded = load_base(sys.argv[2], dtype="bfloat16", device="cpu")
with torch.inference_mode():
    loaded.model(torch.arange(4)[None])
files = {line.split()[-1] for line in open("/proc/self/maps") if "model.safetensors" in line}
print(anonymous_kib() - before, len(files))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_weights_stay_memory_mapped(tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    small = save_tiny(tmp_path / "small", dtype="bfloat16")
    large = save_tiny(tmp_path / "large", dtype="bfloat16", **wide)
    weights_kib = (large / "model.safetensors").stat().st_size // 1024
    assert weights_kib > 40_000
    command = [sys.executable, "-c", MAPPED_SCRIPT, str(small), str(large)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    grown_kib, mapped_files = map(int, ran.stdout.split())
    assert mapped_files >= 1
    assert grown_kib < weights_kib // 4


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        (tiny_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized"),
    ],
)
def test_configs_that_are_refused(config, reason):
    with pytest.raises(BaseUnsupported, match=reason):
        check_config(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            _gemma4(head_dim=8),
            r"gemma4_text has layers with different head sizes \(8, 512\), which",
        ),
        (Qwen3NextConfig(), "qwen3_next has layers of the kind linear_attention, which are not"),
        (MambaConfig(), "mamba has layers of the kind linear_attention, which are not served"),
        (JambaConfig(), "jamba has layers of the kind linear_attention"),
        (MusicgenDecoderConfig(), "has no causal language-modelling class"),
    ],
)
def test_layers_that_are_not_served(config, reason):
    with pytest.raises(BaseUnsupported, match=reason):
        check_config(config)


def test_layers_with_one_size_are_served_whatever_their_model_type():
    check_config(_gemma4(head_dim=8, global_head_dim=8))


def test_a_base_with_different_head_sizes_is_refused_before_its_weights_are_read(tmp_path):
    _gemma4(head_dim=8).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    for read in (load_base, describe_base):
        with pytest.raises(BaseUnsupported, match="different head sizes"):
            read(tmp_path)


@pytest.mark.parametrize("changes", [{"num_attention_heads": None}, {"hidden_act": "none such"}])
def test_a_config_that_builds_no_model_is_refused_in_words(base, changes):
    edit_config(base, **changes)
    for read in (load_base, describe_base):
        with pytest.raises(BaseUnsupported, match=r"config\.json") as refused:
            read(base)
        assert "\n" not in refused.value.message


def test_longrope_is_refused():
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }
    with pytest.raises(BaseUnsupported, match="longest sequence"):
        check_config(tiny_config(rope_parameters=rope))


def test_per_layer_rope_is_looked_into(base):
    config = tiny_config()
    config.rope_parameters = {
        "full_attention": {"rope_type": "dynamic", "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    with pytest.raises(BaseUnsupported, match="dynamic"):
        check_config(config)


@pytest.mark.parametrize("config", [tiny_config(), GPT2Config(), BertConfig(is_decoder=True)])
def test_plain_decoders_pass(config):
    check_config(config)


def test_model_type_that_needs_code_of_its_own(base):
    edit_config(base, model_type="homemade", auto_map={"AutoConfig": "code.Config"})
    (base / "code.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(BaseUnsupported, match="never run"):
        load_base(base)


def test_a_config_that_names_no_model(base):
    edit_config(base, model_type=None)
    with pytest.raises(BaseUnsupported, match=r"config\.json names no model_type"):
        load_base(base)


def test_pickles_are_not_read(base):
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(BaseUnsupported, match=r"pickles \(pytorch_model.bin\)"):
        load_base(base)


def test_no_weights_at_all(base):
    (base / "model.safetensors").unlink()
    with pytest.raises(BaseUnsupported, match="came none"):
        load_base(base)


def test_missing_shard(tmp_path):
    sharded = save_tiny(tmp_path / "sharded", shard="20KB")
    sorted(sharded.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(BaseUnsupported, match="shards are missing"):
        load_base(sharded)


def test_missing_tensor_is_not_made_up(base):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseUnsupported, match=r"model\.norm\.weight"):
        load_base(base)


def test_tensor_of_another_shape(base):
    edit_config(base, intermediate_size=40)
    with pytest.raises(BaseUnsupported, match="weights do not load"):
        load_base(base)


def test_unused_tensors_are_noted(base):
    tensors = load_file(base / "model.safetensors")
    tensors["stray.weight"] = torch.zeros(2)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert load_base(base).notes == ("1 tensors of the checkpoint belong to no part of the model",)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:12]])
def test_hub_id_without_a_pinned_revision(revision):
    with pytest.raises(BaseUnsupported, match="pinned revision") as refused:
        load_base("somebody/some-model", revision=revision)
    assert refused.value.field == "revision"


def test_revision_of_a_local_directory(base):
    with pytest.raises(BaseUnsupported, match="belongs to a hub id"):
        load_base(base, revision=COMMIT)


@pytest.mark.parametrize("place", ["/no/such/place", "./nowhere", "a/b/c", ""])
def test_no_such_directory(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseUnsupported):
        load_base(place)


def test_a_file_is_not_a_base(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseUnsupported, match="expected a directory"):
        load_base(tmp_path / "model.gguf")


def test_an_adapter_is_not_a_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseUnsupported, match="an adapter, not a base model"):
        load_base(tmp_path)


def test_an_adapter_beside_the_base(base):
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseUnsupported, match="beside the base"):
        load_base(base)


@pytest.mark.parametrize("content", ["{", "[]", '"llama"'])
def test_broken_config(base, content):
    (base / "config.json").write_text(content)
    with pytest.raises(BaseUnsupported, match=r"config\.json is invalid"):
        load_base(base)


def test_no_tokenizer(base):
    with pytest.raises(BaseUnsupported, match="tokenizer"):
        load_tokenizer(base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_base_is_described_without_its_weights(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path)
    assert describe_base(tmp_path) == load_base(tmp_path, device="cpu").spec
