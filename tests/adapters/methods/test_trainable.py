"""Methods at the start of a training: completed configs, counted numbers, first weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from adapters.base_model import BaseModelSpec
from adapters.errors import AdapterError, ConfigInvalid, TargetNotFound, TensorMismatch
from adapters.method import PeftConfig, TensorInfo, parse_config
from adapters.methods import METHODS
from adapters.parts import ActivationScales, KVPrefix, SoftPrompt
from adapters.training.packed import PackedBase, TokenRow, pack
from tests.adapters.training.tiny_jobs import CONFIGS, FROM_TOKENS, VARIANTS, tiny_job
from tests.tiny_models import tiny_model, tiny_spec

BASES = ("llama", "qwen3", "gpt2", "bloom")


def base_of(architecture: str) -> PackedBase:
    model = tiny_model(architecture)
    return PackedBase(model, tiny_spec(model))


def completed(variant: str, spec: BaseModelSpec) -> tuple[Any, Any, list[int] | None]:
    """(method, config, init_token_ids) of a variant."""
    job = tiny_job(variant, spec)
    method = METHODS[job.peft_type]
    return method, parse_config(method.config_class, job.config), job.init_token_ids


def started(variant: str, base: PackedBase, seed: int = 0) -> Any:
    method, config, init = completed(variant, base.spec)
    torch.manual_seed(seed)
    return method.trainable(config, base, init)


@pytest.mark.parametrize("architecture", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_trained_is_what_was_counted(variant: str, architecture: str) -> None:
    base = base_of(architecture)
    method, config, _ = completed(variant, base.spec)
    before = base.model.state_dict()
    trainable = started(variant, base)
    parameters = trainable.parameters()
    assert method.num_trainable(config, base.spec) == sum(p.numel() for p in parameters.values())
    for name, parameter in parameters.items():
        assert parameter.requires_grad, name
        assert parameter.dtype == torch.float32, name
        assert parameter.is_leaf, name
    # The order is part of a checkpoint of a run: the optimiser's moments are numbered by it.
    assert list(parameters) == list(trainable.parameters())
    trainable.detach()
    assert base.model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("architecture", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_start_is_a_checkpoint_that_serving_takes(variant: str, architecture: str) -> None:
    base = base_of(architecture)
    method, config, _ = completed(variant, base.spec)
    trainable = started(variant, base)
    trainable.set_training(False)
    tensors = trainable.tensors()
    with torch.no_grad():  # torch's LSTM rounds differently where gradients are kept
        virtual = trainable.virtual()
    trainable.detach()
    infos = {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    facts = method.check(config, infos, base.spec)
    assert facts.warnings == ()
    form = method.serving_form(config, tensors, base.spec)
    form.check(base.spec)
    if isinstance(form, KVPrefix):
        assert torch.equal(form.keys, virtual.keys)
        assert torch.equal(form.values, virtual.values)
    elif isinstance(form, SoftPrompt):
        assert torch.equal(form.embeddings, virtual.embeddings)
    else:
        assert isinstance(form, ActivationScales)
        assert virtual is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant: str) -> None:
    base = base_of("llama")
    trainable = started(variant, base)
    virtual = trainable.virtual()
    if virtual is not None:
        tensors = [virtual.embeddings] if isinstance(virtual, SoftPrompt) else None
        tensors = tensors or [virtual.keys, virtual.values]
        sum(tensor.square().sum() + tensor.sum() for tensor in tensors).backward()
        for name, parameter in trainable.parameters().items():
            assert parameter.grad is not None, name
            assert bool((parameter.grad != 0).any()) or variant == "prefix-zero", name
    else:
        packed = pack([TokenRow((5, 6, 7))])
        base.logits(packed, None, torch.arange(3)).square().sum().backward()
        for name, parameter in trainable.parameters().items():
            assert bool((parameter.grad != 0).any()), name
    trainable.detach()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_seed_makes_the_start(variant: str) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        base = base_of("llama")
        trainable = started(variant, base, seed)
        return {name: p.detach().clone() for name, p in trainable.parameters().items()}

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    fixed = {"prefix-zero", "ia3", "ia3-all-linear", "cpt", "cpt-decay", *FROM_TOKENS}
    differs = any(not torch.equal(tensor, other[name]) for name, tensor in first.items())
    assert differs == (variant not in fixed)


@pytest.mark.parametrize("architecture", BASES)
def test_a_prefix_from_a_text_is_the_texts_keys_and_values(architecture: str) -> None:
    base = base_of(architecture)
    method, config, init = completed("prefix-text", base.spec)
    assert init is not None
    virtual = method.trainable(config, base, init).virtual()
    own = base.keys_values(init)
    assert torch.equal(virtual.keys, own.keys)
    assert torch.equal(virtual.values, own.values)


@pytest.mark.parametrize("architecture", BASES)
def test_a_prompt_from_a_text_is_its_embeddings(architecture: str) -> None:
    base = base_of(architecture)
    method, config, init = completed("prompt-tuning-text", base.spec)
    assert init is not None
    trainable = method.trainable(config, base, init)
    assert torch.equal(trainable.tensors()["prompt_embeddings"], base.embed(init))
    # Rows of its own: training them leaves the base's embedding alone.
    with torch.no_grad():
        next(iter(trainable.parameters().values())).add_(1.0)
    fresh = tiny_model(architecture).get_input_embeddings()
    ids = torch.tensor(init)
    assert torch.equal(base.model.get_input_embeddings()(ids), fresh(ids))


def test_cpt_starts_as_its_context() -> None:
    base = base_of("llama")
    method, config, _ = completed("cpt", base.spec)
    trainable = method.trainable(config, base)
    assert torch.equal(trainable.tensors()["prompt_embeddings"], base.embed(config.token_ids()))
    targets = trainable.targets
    assert targets.token_ids.tolist() == config.token_ids()
    # Where `tiny_jobs` has types 4 and 8; each weighs 1 without decay.
    assert targets.counts.nonzero()[:, 0].tolist() == [4, 9, 10]
    assert targets.weights.tolist() == [float(count) for count in targets.counts]


def test_cpts_older_labels_weigh_less_with_decay() -> None:
    """The row itself is the newest group and weighs 1; the context's two follow."""
    base = base_of("llama")
    method, config, _ = completed("cpt-decay", base.spec)
    weights = method.trainable(config, base).targets.weights
    assert weights[[9, 10]].tolist() == pytest.approx([0.7, 0.7])
    assert float(weights[4]) == pytest.approx(0.7**2)
    assert int((weights > 0).sum()) == 3


@pytest.mark.parametrize("variant", ["prefix-projection", "p-tuning-mlp", "p-tuning-lstm"])
def test_what_a_network_computes_cannot_start_from_a_text(variant: str) -> None:
    base = base_of("llama")
    method, config, _ = completed(variant, base.spec)
    with pytest.raises(ValueError, match="a network computes them"):
        method.trainable(config, base, list(range(10, 10 + config.num_virtual_tokens)))


@pytest.mark.parametrize(
    ("variant", "message"), [("cpt", "starts from its context"), ("ia3", "no virtual tokens")]
)
def test_what_has_no_free_rows_cannot_start_from_a_text(variant: str, message: str) -> None:
    base = base_of("llama")
    method, config, _ = completed(variant, base.spec)
    with pytest.raises(ValueError, match=message):
        method.trainable(config, base, [1, 2, 3])


@pytest.mark.parametrize("variant", FROM_TOKENS)
@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_text_of_another_length_is_refused(variant: str, count: int) -> None:
    base = base_of("llama")
    method, config, _ = completed(variant, base.spec)
    with pytest.raises(ValueError, match="shape"):
        method.trainable(config, base, list(range(10, 10 + count)))


# --- complete_config ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", BASES)
@pytest.mark.parametrize("variant", CONFIGS)
def test_completing_twice_changes_nothing(variant: str, architecture: str) -> None:
    spec = tiny_spec(tiny_model(architecture))
    raw = {"task_type": "CAUSAL_LM", **CONFIGS[variant]}
    method = METHODS[raw["peft_type"]]
    given = parse_config(method.config_class, raw)
    kept = copy.deepcopy(given)
    once = method.complete_config(given, spec)
    assert method.complete_config(once, spec) == once
    assert given == kept, "the config that was given is left as it was"
    # What is stored is JSON; what is read back from it is the same config.
    stored = once.model_dump(mode="json")
    assert parse_config(method.config_class, stored) == once


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"peft_type": "PREFIX_TUNING"}, ConfigInvalid, "num_virtual_tokens"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 0}, ConfigInvalid, "num_virtual_tokens"),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 512},
            ConfigInvalid,
            "num_virtual_tokens",
        ),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20_000_000},
            ConfigInvalid,
            "num_virtual_tokens",
        ),
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "num_layers": 12},
            TensorMismatch,
            "num_layers",
        ),
        (
            {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "token_dim": 16},
            TensorMismatch,
            "token_dim",
        ),
        (
            {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "num_transformer_submodules": 2},
            TensorMismatch,
            "num_transformer_submodules",
        ),
        ({"peft_type": "CPT", "cpt_token_ids": [3, 97]}, ConfigInvalid, "cpt_token_ids"),
        ({"peft_type": "IA3", "target_modules": ["q_pro"]}, TargetNotFound, "target_modules"),
        ({"peft_type": "IA3", "target_modules": ["lm_head"]}, TargetNotFound, "target_modules"),
        ({"peft_type": "IA3", "target_modules": ".*proj"}, ConfigInvalid, "target_modules"),
        (
            {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": ["fc1"]},
            ConfigInvalid,
            "feedforward_modules",
        ),
    ],
)
def test_a_config_that_does_not_fit_the_base(
    fields: dict[str, Any], error: type[AdapterError], field: str
) -> None:
    spec = tiny_spec(tiny_model("llama"))
    method = METHODS[fields["peft_type"]]
    config: PeftConfig = parse_config(method.config_class, fields)
    with pytest.raises(error) as caught:
        method.complete_config(config, spec)
    assert caught.value.field == field


def test_counting_takes_no_memory() -> None:
    """A network of a terabyte is counted, not built."""
    spec = tiny_spec(tiny_model("llama"))
    method = METHODS["PREFIX_TUNING"]
    raw = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": 4,
        "prefix_projection": True,
        "encoder_hidden_size": 2_000_000_000,
    }
    config = method.complete_config(parse_config(method.config_class, raw), spec)
    hidden, width = 2_000_000_000, 3 * 2 * 16
    want = 4 * 16 + (16 + 1) * hidden + (hidden + 1) * width
    assert method.num_trainable(config, spec) == want
