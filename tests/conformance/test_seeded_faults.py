"""The grid is itself tested: each fault below must make it fail.

A fault is put into a checkpoint's serving form or into the engine's step, as a mistake in the code would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.checkpoint.folder import load_serving_form
from adapters.checkpoint.limits import CheckpointLimits
from adapters.parts import ActivationScales, KVPrefix, ServingForm, SoftPrompt
from server.engine import model_runner
from server.engine.attention import AttentionPath
from tests.conformance.peft_oracle import ask, make_adapter, prompt_ids
from tests.conformance.test_grid import PROMPT_LENGTHS, compare
from tests.engine_tools import TINY, adapter_ref, tiny_engine
from tests.tiny_models import tiny_model, tiny_spec


def swap_keys_and_values(form: ServingForm) -> ServingForm:
    assert isinstance(form, KVPrefix)
    return KVPrefix(form.values, form.keys)


def shift_layers(form: ServingForm) -> ServingForm:
    assert isinstance(form, KVPrefix)
    return KVPrefix(form.keys.roll(1, 0), form.values.roll(1, 0))


def shift_prefix_by_one(form: ServingForm) -> ServingForm:
    assert isinstance(form, KVPrefix)
    return KVPrefix(form.keys.roll(1, 2), form.values)


def reverse_soft_rows(form: ServingForm) -> ServingForm:
    assert isinstance(form, SoftPrompt)
    return SoftPrompt(form.embeddings.flip(0))


def scale_the_wrong_side(form: ServingForm) -> ServingForm:
    """Square modules alone: elsewhere the widths would tell."""
    assert isinstance(form, ActivationScales)
    moved = {path: v for path, v in form.outputs.items() if path.endswith(("o_proj", "out_proj"))}
    assert moved
    kept = {path: v for path, v in form.outputs.items() if path not in moved}
    return ActivationScales({**form.inputs, **moved}, kept)


def drop_one_scale(form: ServingForm) -> ServingForm:
    assert isinstance(form, ActivationScales)
    outputs = dict(form.outputs)
    outputs.pop(next(iter(outputs)))
    return ActivationScales(form.inputs, outputs)


CHECKPOINT_FAULTS: list[tuple[str, str, Callable[[ServingForm], ServingForm]]] = [
    ("llama", "prefix", swap_keys_and_values),
    ("llama", "prefix", shift_layers),
    ("llama", "prefix", shift_prefix_by_one),
    ("llama", "p-tuning-mlp", reverse_soft_rows),
    ("opt", "ia3-output-side", scale_the_wrong_side),
    ("llama", "ia3", drop_one_scale),
]


def grid_passes(architecture: str, variant: str, directory: Path, fault=None) -> bool:
    """Run one cell of the grid, with a fault in the serving form if one is given."""
    peft_model = make_adapter(tiny_model(architecture), architecture, variant, directory)
    prompts = [prompt_ids(length) for length in PROMPT_LENGTHS]
    oracles = [ask(peft_model, prompt) for prompt in prompts]
    plain = tiny_model(architecture)
    bases = [ask(plain, prompt) for prompt in prompts]
    model = tiny_model(architecture)
    form = load_serving_form(directory, tiny_spec(model), CheckpointLimits())
    engine = tiny_engine(model, read_form=lambda _: fault(form) if fault else form)
    try:
        compare(engine, adapter_ref("a", directory, engine), prompts, oracles, bases)
    except AssertionError:
        return False
    finally:
        engine.close()
    return True


@pytest.mark.parametrize(
    ("architecture", "variant", "fault"),
    CHECKPOINT_FAULTS,
    ids=[f"{variant}-{fault.__name__}" for _, variant, fault in CHECKPOINT_FAULTS],
)
def test_a_fault_in_the_mapping_fails_the_grid(architecture, variant, fault, tmp_path):
    assert not grid_passes(architecture, variant, tmp_path, fault)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom"])
def test_positions_one_off_fail_the_grid(architecture, tmp_path, monkeypatch):
    """Input tokens start at position n; here they start at n - 1, attention's own count untouched
    (but for ALiBi, where attention's count is the position)."""
    real = model_runner.ModelRunner._embed

    def embed(self, rows):
        embeddings = real(self, rows)
        shift["now"] = [bool(row.chunk.sequence.prefix_tokens) for row in rows]
        shift["sizes"] = [row.chunk.num_tokens for row in rows]
        return embeddings

    shift: dict[str, list] = {}
    monkeypatch.setattr(model_runner.ModelRunner, "_embed", embed)

    def off_by_one(self, embeddings, positions, keep):
        off = torch.repeat_interleave(
            torch.tensor(shift["now"], dtype=torch.long), torch.tensor(shift["sizes"])
        )
        return real_logits(self, embeddings, positions - off, keep)

    real_logits = model_runner.ModelRunner._logits
    if architecture == "bloom":
        real_positions = model_runner._positions
        monkeypatch.setattr(
            model_runner,
            "_positions",
            lambda row: real_positions(row) - bool(row.chunk.sequence.prefix_tokens),
        )
        assert not grid_passes(architecture, "prefix", tmp_path)
        return
    peft_model = make_adapter(tiny_model(architecture), architecture, "prefix", tmp_path)
    prompts = [prompt_ids(length) for length in PROMPT_LENGTHS]
    oracles = [ask(peft_model, prompt) for prompt in prompts]
    bases = [ask(tiny_model(architecture), prompt) for prompt in prompts]
    engine = tiny_engine(tiny_model(architecture), {"a": tmp_path})
    monkeypatch.setattr(model_runner.ModelRunner, "_logits", off_by_one)
    try:
        with pytest.raises(AssertionError):
            compare(engine, adapter_ref("a", tmp_path, engine), prompts, oracles, bases)
    finally:
        engine.close()


@pytest.mark.parametrize("fast_kernels", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize(
    ("architecture", "argument"),
    [("gemma2", "softcap"), ("mistral", "window"), ("bloom", "alibi_slopes")],
)
def test_attention_without_an_argument_fails_the_grid(
    architecture, argument, fast_kernels, tmp_path, monkeypatch
):
    real = AttentionPath.attend

    def attend(self, layer, query, **kwargs):
        return real(self, layer, query, **{**kwargs, argument: None})

    peft_model = make_adapter(tiny_model(architecture), architecture, "prefix", tmp_path)
    prompts = [prompt_ids(length) for length in PROMPT_LENGTHS]
    oracles = [ask(peft_model, prompt) for prompt in prompts]
    bases = [ask(tiny_model(architecture), prompt) for prompt in prompts]
    config = dataclasses.replace(TINY, fast_kernels=fast_kernels)
    engine = tiny_engine(tiny_model(architecture), {"a": tmp_path}, config)
    monkeypatch.setattr(AttentionPath, "attend", attend)
    try:
        with pytest.raises(AssertionError):
            compare(engine, adapter_ref("a", tmp_path, engine), prompts, oracles, bases)
    finally:
        engine.close()
