"""C3: what was trained here PEFT loads without a warning and gives our logits; and the other way."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import peft
import pytest
import torch

from adapters.checkpoint.folder import load_serving_form
from adapters.checkpoint.limits import CheckpointLimits
from adapters.methods import METHODS
from adapters.methods.ia3 import attach_ia3, load_ia3
from adapters.parts import ActivationScales
from adapters.training.loop import train
from adapters.training.packed import PackedBase
from adapters.training.ranking import mean_loss, rank
from tests.adapters.methods import oracle as files
from tests.adapters.training.tiny_jobs import CONFIGS, LABEL_IDS, tiny_examples, tiny_job
from tests.conformance.peft_oracle import VARIANTS, ask, make_adapter, prompt_ids
from tests.conformance.test_grid import same_until_a_tie
from tests.engine_tools import adapter_ref, request, run, teacher_forced, tiny_engine, tokens
from tests.tiny_models import ARCHITECTURES, tiny_model, tiny_spec

# Every variant on two bases that differ in everything, every base with three methods.
CASES = [(a, variant) for a in ("llama", "gpt2") for variant in CONFIGS]
CASES += [
    (a, variant)
    for a in ARCHITECTURES
    if a not in ("llama", "gpt2")
    for variant in ("prefix", "p-tuning-mlp", "ia3")
]
CASES += [(a, "ia3-all-linear") for a in ("bloom", "opt")]
# Far from the start, so that a base without the adapter says something else.
RATES = {"cpt": 1.0, "cpt-decay": 1.0}


def trained(architecture, variant, directory):
    """A run of some steps, written to `directory`."""
    model = tiny_model(architecture)
    spec = tiny_spec(model)
    job = tiny_job(
        variant,
        spec,
        epochs=2,
        learning_rate=RATES.get(variant, 0.1),
        lr_scheduler_type="constant",
    )
    result = train(job, tiny_examples(), model, spec, on_event=lambda _: None)
    result.write(directory)
    return result


@contextmanager
def strict():
    """Any warning fails, but for transformers' own about a property that PEFT reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=files.PEFT_NOISE, category=FutureWarning)
        yield


def loaded_by_peft(architecture, directory):
    with strict():
        return peft.PeftModel.from_pretrained(tiny_model(architecture), str(directory)).eval()


@pytest.mark.parametrize(("architecture", "variant"), CASES)
def test_what_was_trained_here_runs_in_peft(architecture, variant, tmp_path):
    folder = tmp_path / "adapter"
    trained(architecture, variant, folder)
    prompts = [prompt_ids(length) for length in (9, 37)]
    theirs = loaded_by_peft(architecture, folder)
    oracles = [ask(theirs, prompt) for prompt in prompts]
    plain = ask(tiny_model(architecture), prompts[0])
    assert (oracles[0].logits[0] - plain.logits[0]).abs().max() > 0.05
    engine = tiny_engine(tiny_model(architecture), {"a": folder})
    try:
        ref = adapter_ref("a", folder, engine)
        asked = [request(str(index), prompt, ref) for index, prompt in enumerate(prompts)]
        got = run(engine, asked)
        for index, (prompt, oracle) in enumerate(zip(prompts, oracles, strict=True)):
            assert same_until_a_tie(tokens(got[str(index)]), oracle)
            forced = teacher_forced(engine, prompt, oracle.token_ids, ref)
            assert (forced - torch.log_softmax(oracle.logits, -1)).abs().max() < 1e-4
    finally:
        engine.close()


@pytest.mark.parametrize("variant", CONFIGS)
def test_peft_saves_again_what_was_trained_here(variant, tmp_path):
    result = trained("llama", variant, tmp_path / "ours")
    with strict():
        loaded_by_peft("llama", tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    raw, _, tensors = files.read(tmp_path / "theirs")
    assert tensors.keys() == result.tensors.keys()
    for name, tensor in result.tensors.items():
        assert torch.equal(tensors[name], tensor), name
    # PEFT notes where the base came from, which it knows better, and writes names in any order.
    theirs, ours = ({**one} for one in (raw, result.config))
    for config in (theirs, ours):
        for noted in ("base_model_name_or_path", "peft_version"):
            config.pop(noted)
        for names in ("target_modules", "feedforward_modules"):
            if names in config:
                config[names] = sorted(config[names])
    assert theirs == ours


def serving(architecture, directory):
    """Our evaluation's base with the checkpoint's serving form on it: (base, virtual)."""
    model = tiny_model(architecture)
    spec = tiny_spec(model)
    form = load_serving_form(directory, spec, CheckpointLimits())
    if isinstance(form, ActivationScales):
        raw, _, tensors = files.read(directory)
        attach_ia3(model, files.parse(raw), spec)
        load_ia3(model, tensors)
        return PackedBase(model, spec), None
    return PackedBase(model, spec), form


def pefts_log_likelihood(model, prompt, target):
    ids = torch.tensor([[*prompt, *target]])
    # PEFT's CPT wants labels in training only.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
    scores = torch.log_softmax(logits, dim=-1)[-len(target) - 1 : -1]
    return float(scores.gather(1, torch.tensor(target)[:, None]).sum())


RANKED = [("llama", variant) for variant in VARIANTS]
RANKED += [(a, v) for a in ("gpt2", "bloom", "gemma3", "opt") for v in ("prefix", "ia3", "cpt")]


@pytest.mark.parametrize(("architecture", "variant"), RANKED)
def test_labels_are_as_likely_here_as_in_peft(architecture, variant, tmp_path):
    theirs = make_adapter(tiny_model(architecture), architecture, variant, tmp_path)
    base, virtual = serving(architecture, tmp_path)
    rows = tiny_examples().train
    got = rank(base, virtual, [row.prompt_ids for row in rows], LABEL_IDS)
    want = torch.tensor(
        [[pefts_log_likelihood(theirs, row.prompt_ids, ids) for ids in LABEL_IDS] for row in rows]
    )
    assert (got - want).abs().max() < 2e-4
    own = torch.stack([want[number, row.label] for number, row in enumerate(rows)])
    per_token = -float(own.sum()) / sum(len(row.target_ids) for row in rows)
    assert mean_loss(base, virtual, rows) == pytest.approx(per_token, rel=1e-5)


def test_every_method_is_here():
    assert {CONFIGS[variant]["peft_type"] for variant in CONFIGS} == set(METHODS)
