"""Sums of adapters against PEFT's own, to the last bit, and what cannot be added."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch

from adapters import errors
from adapters.checkpoint.folder import check_checkpoint, write_checkpoint
from adapters.combine import combine, stored
from tests.adapters.methods.oracle import logits, peft_load, peft_save, read
from tests.tiny_models import tiny_model, tiny_spec

WEIGHTS = {1: [0.3], 2: [0.3, -1.7], 3: [0.25, 1 / 3, 1e-3]}
LLAMA_TARGETS = [["k_proj", "down_proj"], ["v_proj", "down_proj"], ["q_proj"]]


def ia3(targets: list[str] | None, feedforward: list[str] | None = None, **options):
    return peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=feedforward,
        **options,
    )


def save_ia3(folder: Path, config, seed: int, architecture: str = "llama") -> Path:
    peft_save(tiny_model(architecture), config, folder, seed)
    (folder / "README.md").unlink()
    return folder


def write(folder: Path, config: dict, tensors: dict) -> Path:
    write_checkpoint(folder, config, tensors)
    return folder


def peft_sum(
    folders: list[Path], weights: list[float], out: Path, dtype=torch.float32, name="llama"
) -> dict[str, torch.Tensor]:
    """What `add_weighted_adapter` makes of saved adapters, in PEFT's own names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(
            tiny_model(name, dtype=dtype), str(folders[0]), adapter_name="a0"
        )
        for number, folder in enumerate(folders[1:], 1):
            model.load_adapter(str(folder), adapter_name=f"a{number}")
        names = [f"a{number}" for number in range(len(folders))]
        model.add_weighted_adapter(names, weights, "sum")
        model.save_pretrained(str(out), selected_adapters=["sum"])
    return read(out / "sum")[2]


def assert_same_bits(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_linear_is_pefts_sum_to_the_last_bit(tmp_path, count, dtype):
    folders = [
        save_ia3(
            tmp_path / str(number), ia3(targets, [n for n in targets if n == "down_proj"]), number
        )
        for number, targets in enumerate(LLAMA_TARGETS[:count])
    ]
    weights = WEIGHTS[count]
    theirs = peft_sum(folders, weights, tmp_path / "peft", dtype)
    _, ours = combine([stored(folder) for folder in folders], weights, dtype=dtype)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "opt", "gpt_neox", "gemma2"])
def test_every_architecture_adds_as_peft_does(tmp_path, architecture):
    # The second targets one of the default modules alone, so modules are missing from it.
    spec = tiny_spec(tiny_model(architecture))
    folders = [save_ia3(tmp_path / "0", ia3(None), 0, architecture)]
    last = read(folders[0])[0]["feedforward_modules"]
    second = ia3(list(last), list(last), fan_in_fan_out=architecture == "gpt2")
    folders.append(save_ia3(tmp_path / "1", second, 1, architecture))
    theirs = peft_sum(folders, [0.7, 0.6], tmp_path / "peft", name=architecture)
    config, ours = combine([stored(folder) for folder in folders], [0.7, 0.6])
    assert_same_bits(ours, theirs)
    written = write(tmp_path / "ours", config, ours)
    assert check_checkpoint(written, spec).warnings == ()
    # PEFT loads it without a warning and computes the same with its own.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = logits(
            peft.PeftModel.from_pretrained(
                tiny_model(architecture), str(tmp_path / "peft" / "sum")
            ).eval()
        )
    assert torch.equal(logits(peft_load(tiny_model(architecture), written)), want)


def test_the_same_adapter_twice_and_stored_in_half_precision(tmp_path):
    folder = save_ia3(tmp_path / "0", ia3(["k_proj"], []), 0)
    raw, _, tensors = read(folder)
    half = write(tmp_path / "half", raw, {k: v.to(torch.bfloat16) for k, v in tensors.items()})
    theirs = peft_sum([folder, half, folder], [0.1, 0.2, 0.3], tmp_path / "peft")
    _, ours = combine([stored(folder), stored(half), stored(folder)], [0.1, 0.2, 0.3])
    assert_same_bits(ours, theirs)


def test_delta_counts_a_missing_module_as_one(tmp_path):
    first = save_ia3(tmp_path / "0", ia3(["k_proj", "down_proj"], ["down_proj"]), 0)
    second = save_ia3(tmp_path / "1", ia3(["v_proj", "down_proj"], ["down_proj"]), 1)
    _, ours = combine([stored(first), stored(second)], [0.4, -0.3], "delta")
    a, b = read(first)[2], read(second)[2]
    for name, tensor in ours.items():
        one = torch.ones_like(tensor, dtype=torch.float64)
        want = one + 0.4 * (a.get(name, one) - one) - 0.3 * (b.get(name, one) - one)
        assert torch.allclose(tensor.double(), want, rtol=0, atol=1e-6), name
    assert ours.keys() == a.keys() | b.keys()
    # Adapters of ones change nothing, whatever they weigh; linear would scale by the weight.
    ones = {name: torch.ones_like(tensor) for name, tensor in a.items()}
    neutral = write(tmp_path / "ones", read(first)[0], ones)
    _, none = combine([stored(neutral)] * 2, [3.0, 5.0], "delta")
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in none.values())


def test_names_unite_as_in_peft_and_paths_stand_where_names_do_not_say_it(tmp_path):
    spec = tiny_spec(tiny_model("llama"))
    plain = save_ia3(tmp_path / "plain", ia3(["k_proj", "down_proj"], ["down_proj"]), 0)
    values = save_ia3(tmp_path / "values", ia3(["v_proj"], []), 1)
    config, _ = combine([stored(plain), stored(values)], [1, 1])
    assert config["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert config["feedforward_modules"] == ["down_proj"]
    excluding = save_ia3(
        tmp_path / "excluding",
        ia3(["v_proj"], [], exclude_modules=["layers.1.self_attn.v_proj"]),
        2,
    )
    regex = save_ia3(tmp_path / "regex", ia3(r".*\.[01]\..*v_proj", []), 3)
    for other in (excluding, regex):
        config, tensors = combine([stored(plain), stored(other)], [0.5, 0.5])
        paths = [n.removeprefix("base_model.model.").removesuffix(".ia3_l") for n in tensors]
        assert config["target_modules"] == sorted(paths)
        assert config["exclude_modules"] is None
        written = write(tmp_path / f"with-{other.name}", config, tensors)
        check_checkpoint(written, spec)
        loaded = peft_load(tiny_model("llama"), written)
        assert sum("ia3_l" in name for name, _ in loaded.named_parameters()) == len(tensors)


def soft(tmp_path: Path, name: str, config, seed: int) -> Path:
    peft_save(tiny_model("llama"), config, tmp_path / name, seed)
    (tmp_path / name / "README.md").unlink()
    return tmp_path / name


SOFT = {
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "projection": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        prefix_projection=True,
        encoder_hidden_size=12,
    ),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16
    ),
    "lstm": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=16,
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[5, 9, 11, 3, 8],
        cpt_mask=[1] * 5,
        cpt_tokens_type_mask=[1, 2, 2, 3, 4],
        num_virtual_tokens=5,
    ),
}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("prefix", "prefix"),
        ("projection", "prefix"),
        ("p-tuning", "lstm"),
        ("prompt", "prompt"),
        ("cpt", "cpt"),
    ],
)
def test_rows_add_linearly_and_peft_loads_them(tmp_path, first, second):
    folders = [soft(tmp_path, "a", SOFT[first](), 1), soft(tmp_path, "b", SOFT[second](), 2)]
    config, ours = combine([stored(folder) for folder in folders], [0.6, 0.5])
    rows = [read(folder)[2]["prompt_embeddings"] for folder in folders]
    want = torch.zeros_like(rows[0])
    want += rows[0] * 0.6
    want += rows[1] * 0.5
    assert torch.equal(ours["prompt_embeddings"], want)
    written = write(tmp_path / "sum", config, ours)
    check_checkpoint(written, tiny_spec(tiny_model("llama")))
    loaded = peft_load(tiny_model("llama"), written)
    encoder = loaded.prompt_encoder["default"]
    assert torch.equal(encoder.embedding.weight, want)
    if "prefix" in (first, second):
        assert config["prefix_projection"] is False


def test_a_prompt_that_began_as_a_text_forgets_it(tmp_path):
    folder = soft(tmp_path, "a", SOFT["prompt"](), 1)
    raw, _, tensors = read(folder)
    told = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "hello"}
    told["tokenizer_name_or_path"] = "somebody/base"
    config, _ = combine([({**raw, **told}, tensors)], [1.0])
    assert config["prompt_tuning_init"] == "RANDOM"
    assert (config["prompt_tuning_init_text"], config["tokenizer_name_or_path"]) == (None, None)


def refused(adapters, weights, kind="linear") -> errors.CombineInvalid:
    with pytest.raises(errors.CombineInvalid) as caught:
        combine(adapters, weights, kind)
    return caught.value


def test_what_cannot_be_added_is_told_apart(tmp_path):
    five = stored(soft(tmp_path, "five", SOFT["prompt"](), 1))
    longer = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    six = stored(soft(tmp_path, "six", longer, 1))
    p_tuning = stored(soft(tmp_path, "p", SOFT["p-tuning"](), 1))
    output = stored(save_ia3(tmp_path / "output", ia3(["down_proj"], []), 1))
    inputs = stored(save_ia3(tmp_path / "input", ia3(["down_proj"], ["down_proj"]), 1))
    error = refused([five, six], [1, 1])
    assert "as many virtual tokens" in error.message
    assert (error.expected, error.came) == ("(5, 32)", "(6, 32)")
    assert "adapter 2 is P_TUNING" in refused([five, p_tuning], [1, 1]).message
    assert "other side" in refused([output, inputs], [1, 1]).message
    assert "which only IA3" in refused([five], [1], "delta").message
    assert refused([], []).field == "adapters"
    assert refused([five] * 65, [1] * 65).field == "adapters"
    assert refused([five], [1, 2]).field == "weights"
    assert refused([five], [1], "svd").field == "combination_type"
    for weight in (float("nan"), float("inf"), -float("inf"), 1e300):
        assert refused([five], [weight]).field == "weights"


def test_one_of_another_base_is_told_by_its_shapes(tmp_path):
    small = stored(save_ia3(tmp_path / "small", ia3(["k_proj"], []), 1))
    wide = stored(save_ia3(tmp_path / "wide", ia3(["k_proj"], []), 1, "qwen3"))
    assert "another shape" in refused([small, wide], [1, 1]).message


def test_the_result_does_not_depend_on_the_order_of_names(tmp_path):
    folder = save_ia3(tmp_path / "0", ia3(["v_proj", "k_proj"], []), 0)
    config, tensors = combine([stored(folder)], [0.5])
    assert json.loads(json.dumps(config)) == config
    again, _ = combine([(dict(reversed(config.items())), tensors)], [1.0])
    assert list(again) == list(config)


def test_names_with_the_adapters_name_add_to_plain_ones(tmp_path):
    folder = save_ia3(tmp_path / "plain", ia3(["k_proj", "v_proj"], []), seed=3)
    config, _, tensors = read(folder)
    named = {f"{name}.default": tensor for name, tensor in tensors.items()}
    other = write(tmp_path / "named", config, named)
    total = combine([stored(folder), stored(other)], [0.5, 0.5])[1]
    assert total.keys() == tensors.keys()
    assert all(torch.allclose(total[name], tensors[name]) for name in tensors)
