"""IA3 in the weights of a base: PEFT's merge_and_unload to the last bit, files that load anywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig

from adapters import errors
from adapters.base_files import weight_files
from adapters.base_model import describe
from adapters.checkpoint.folder import digest_of, write_checkpoint
from adapters.merge import MERGE_FILE, merge_into_base
from server.engine.offline import OfflineEngine
from tests.adapters.methods.oracle import no_peft_warnings, peft_save, read
from tests.full_disk import run_on_a_small_disk
from tests.server.http_server import save_tiny_base
from tests.tiny_models import ARCHITECTURES, tiny_model, tiny_spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IA3 = {
    "default": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "all-linear": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules="all-linear", feedforward_modules=[]
    ),
}


def save_adapter(base: Path, folder: Path, kind: str = "default", dtype=torch.float32) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = IA3[kind]() if isinstance(kind, str) else kind
    if model.config.model_type == "gpt2":
        config.fan_in_fan_out = True
    peft_save(model, config, folder)
    return folder


def peft_merge(base: Path, adapter: Path, dtype: torch.dtype, safe: bool) -> dict:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    with no_peft_warnings():
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(
            safe_merge=safe
        )
    return merged.state_dict()


def spec_of(base: Path):
    return tiny_spec(AutoModelForCausalLM.from_pretrained(base))


def merge(base: Path, adapter: Path, out: Path, *, safe: bool = True, **options):
    return merge_into_base(base, adapter, out, safe_merge=safe, base=spec_of(base), **options)


def assert_same_bits(directory: Path, want: dict, dtype: torch.dtype) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    came = model.state_dict()
    assert came.keys() == want.keys()
    for name, tensor in want.items():
        assert came[name].dtype == tensor.dtype, name
        assert torch.equal(came[name], tensor), name


@pytest.mark.parametrize("kind", IA3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_pefts_to_the_last_bit(tmp_path, architecture, dtype, kind):
    base = tmp_path / "base"
    tiny_model(architecture, dtype=DTYPES[dtype]).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", kind, DTYPES[dtype])
    want = peft_merge(base, adapter, DTYPES[dtype], safe=True)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype]).state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in want.items())
    merged = merge(base, adapter, tmp_path / "merged")
    assert merged.num_modules == len(read(adapter)[2])
    assert_same_bits(tmp_path / "merged", want, DTYPES[dtype])


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_another_dtype_is_that_in_which_peft_would_have_loaded_the_base(tmp_path, stored, dtype):
    base = tmp_path / "base"
    tiny_model("opt", dtype=DTYPES[stored]).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged", dtype=dtype)
    assert_same_bits(
        tmp_path / "merged", peft_merge(base, adapter, DTYPES[dtype], safe=False), DTYPES[dtype]
    )
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    stored_dtypes = {
        tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()
    }
    assert stored_dtypes == {DTYPES[dtype]}


def test_shards_keep_their_layout_and_their_index_its_size(tmp_path):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base, max_shard_size="30KB")
    assert len(weight_files(base)) > 2
    adapter = save_adapter(base, tmp_path / "adapter")
    for name, dtype, factor in (("same", None, 1.0), ("half", "bfloat16", 0.5)):
        out = tmp_path / name
        merge(base, adapter, out, dtype=dtype)
        assert [one.name for one in weight_files(out)] == [one.name for one in weight_files(base)]
        index, was = (
            json.loads((one / "model.safetensors.index.json").read_text()) for one in (out, base)
        )
        assert index["weight_map"] == was["weight_map"]
        assert index["metadata"]["total_size"] == was["metadata"]["total_size"] * factor
        kind = torch.float32 if dtype is None else DTYPES[dtype]
        assert_same_bits(out, peft_merge(base, adapter, kind, safe=False), kind)


@pytest.mark.parametrize("change", ["transformer.", None], ids=["without prefix", "one more"])
def test_files_may_name_modules_with_another_prefix(tmp_path, change):
    base = tmp_path / "base"
    tiny_model("gpt2").save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    want = peft_merge(base, adapter, torch.float32, safe=False)
    file = base / "model.safetensors"
    names = {
        name: name.removeprefix(change) if change else f"whole.{name}" for name in load_file(file)
    }
    save_file(
        {names[name]: tensor for name, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    spec = tiny_spec(tiny_model("gpt2"))
    merge_into_base(base, adapter, tmp_path / "merged", safe_merge=True, base=spec)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(written) == set(names.values())
    for name, renamed in names.items():
        assert torch.equal(written[renamed], want[name]), name


def test_tied_embeddings_stay_tied(tmp_path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    base = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    merge(base, save_adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_projected_opt_with_biases_merges_too(tmp_path):
    """OPT-350m's shape: embeddings narrower than the rest, linear modules around them."""
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.3,
    )
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", "all-linear")
    merge(base, adapter, tmp_path / "merged")
    want = peft_merge(base, adapter, torch.float32, safe=False)
    assert_same_bits(tmp_path / "merged", want, torch.float32)


def test_the_engine_serves_the_merged_base_with_the_adapters_answers(tmp_path):
    base = save_tiny_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    (base / "graftwork_base.json").write_text('{"name": "the-base", "note": "n"}')
    (base / "modeling_own.py").write_text("raise SystemExit")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "LICENSE").write_text("words")
    merged = merge(base, adapter, tmp_path / "deep" / "merged")
    assert set(merged.files) == {
        *("config.json", "generation_config.json", "model.safetensors", "LICENSE"),
        *("tokenizer.json", "tokenizer_config.json", MERGE_FILE),
    }
    origin = json.loads((merged.directory / MERGE_FILE).read_text())
    (adapter / "README.md").unlink()
    assert origin["adapter_digest"] == digest_of(adapter)
    prompts = ["the tweet is", "Label :", "no complaint at all"]
    with_adapter = OfflineEngine(base, dtype="float32", threads=1)
    with_adapter.add_adapter("a", adapter)
    alone = OfflineEngine(merged.directory, dtype="float32", threads=1)
    want = with_adapter.generate([("a", prompt) for prompt in prompts], max_new_tokens=12)
    plain = with_adapter.generate([(None, prompt) for prompt in prompts], max_new_tokens=12)
    came = alone.generate([(None, prompt) for prompt in prompts], max_new_tokens=12)
    assert came == want != plain
    assert alone.spec.digest != with_adapter.spec.digest
    for engine in (with_adapter, alone):
        engine.close()


# --- refusals --------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_only_ia3_is_merged(tmp_path, base):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft_save(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / "prompt")
    with pytest.raises(errors.MergeInvalid, match="only IA3 changes weights") as caught:
        merge(base, tmp_path / "prompt", tmp_path / "merged")
    assert caught.value.came == "PROMPT_TUNING"
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["empty", "file", "link"])
def test_a_place_that_is_taken_is_left_alone(tmp_path, base, kind):
    adapter, out = save_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    {
        "empty": out.mkdir,
        "file": out.touch,
        "link": lambda: out.symlink_to(tmp_path / "nowhere"),
    }[kind]()
    with pytest.raises(errors.MergeInvalid, match=re.escape(str(out))) as caught:
        merge(base, adapter, out)
    assert caught.value.field == "out"
    assert not (tmp_path / "nowhere").exists()


def test_an_adapter_of_another_base_and_an_unknown_dtype(tmp_path, base):
    tiny_model("qwen3").save_pretrained(tmp_path / "other")
    foreign = save_adapter(tmp_path / "other", tmp_path / "foreign")
    with pytest.raises(errors.TensorMismatch):
        merge(base, foreign, tmp_path / "merged")
    raw, _, tensors = read(foreign)
    lost = {name.replace("q_proj", "wq"): tensor for name, tensor in tensors.items()}
    write_checkpoint(tmp_path / "lost", raw, lost)
    with pytest.raises(errors.TargetNotFound):
        merge(base, tmp_path / "lost", tmp_path / "merged")
    with pytest.raises(errors.MergeInvalid, match="int8"):
        merge(base, foreign, tmp_path / "merged", dtype="int8")
    assert not list(tmp_path.glob("*merged*"))


def test_files_that_do_not_hold_the_module_are_told(tmp_path, base):
    adapter = save_adapter(base, tmp_path / "adapter")
    spec, file = spec_of(base), base / "model.safetensors"
    tensors = load_file(file)
    fused = {name.replace("k_proj", "kv_proj"): tensor for name, tensor in tensors.items()}
    save_file(fused, file, metadata={"format": "pt"})
    with pytest.raises(errors.MergeInvalid, match=r"layers\.0\.self_attn\.k_proj"):
        merge_into_base(base, adapter, tmp_path / "merged", safe_merge=True, base=spec)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name].T.contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(errors.MergeInvalid, match="shape") as caught:
        merge_into_base(base, adapter, tmp_path / "merged", safe_merge=True, base=spec)
    assert (caught.value.field, caught.value.came) == (name, "(48, 32)")
    file.write_bytes(b"not safetensors")
    with pytest.raises(errors.MergeInvalid, match=r"model\.safetensors"):
        merge_into_base(base, adapter, tmp_path / "merged", safe_merge=True, base=spec)
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_safe_merge_refuses_what_is_not_finite(tmp_path, parameter):
    base = tmp_path / "base"
    model = tiny_model("opt", dtype=torch.float16)
    model.save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", "all-linear", torch.float16)
    name = f"model.decoder.layers.1.fc1.{parameter}"
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[0] = 60_000.0  # times about -1.7: beyond what float16 holds
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    raw, _, scales = read(adapter)
    scales["base_model.model.model.decoder.layers.1.fc1.ia3_l"].fill_(-1.7)
    write_checkpoint(tmp_path / "large", raw, scales)
    spec = describe(model, digest="d", dtype="float16")
    with pytest.raises(errors.NonFinite) as caught:
        merge_into_base(base, tmp_path / "large", tmp_path / "m", safe_merge=True, base=spec)
    assert caught.value.field == name
    assert not (tmp_path / "m").exists()
    merge_into_base(base, tmp_path / "large", tmp_path / "m", safe_merge=False, base=spec)
    assert load_file(tmp_path / "m" / "model.safetensors")[name].isinf().any()
    assert not list(tmp_path.glob(".m-*"))


def test_a_full_disk_leaves_nothing(tmp_path, base):
    adapter = save_adapter(base, tmp_path / "adapter")
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_of(base).to_dict()))
    script = """
    import json, sys
    from pathlib import Path
    from adapters.base_model import BaseModelSpec
    from adapters.errors import StorageFull
    from adapters.merge import merge_into_base
    disk, base, adapter, spec = map(Path, sys.argv[1:])
    spec = BaseModelSpec.from_dict(json.loads(spec.read_text()))
    try:
        merge_into_base(base, adapter, disk / "merged", safe_merge=False, base=spec)
    except StorageFull:
        print("held" if not list(disk.iterdir()) else "left something behind")
    """
    run_on_a_small_disk(script, tmp_path, "64k", str(base), str(adapter), str(spec))
