"""C1 and O5 over the grid: every architecture, every method, the options that change numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from server.engine.engine import Engine
from server.engine.request import AdapterRef
from tests.conformance.peft_oracle import VARIANTS, Oracle, ask, make_adapter, prompt_ids
from tests.engine_tools import (
    TINY,
    adapter_ref,
    request,
    run,
    teacher_forced,
    tiny_engine,
    tokens,
)
from tests.tiny_models import ARCHITECTURES, tiny_model

PROMPT_LENGTHS = (9, 37)
PATHS = {"fast": True, "plain": False}


def same_until_a_tie(got: list[int], oracle: Oracle) -> bool:
    """Equal tokens, or equal up to a step at which the oracle itself was nearly undecided."""
    for step, (ours, theirs) in enumerate(zip(got, oracle.token_ids, strict=True)):
        if ours != theirs:
            return bool(oracle.margins[step] < 1e-3)
    return True


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_checkpoint_gives_what_peft_gives(architecture, variant, tmp_path):
    peft_model = make_adapter(tiny_model(architecture), architecture, variant, tmp_path)
    plain = tiny_model(architecture)
    prompts = [prompt_ids(length) for length in PROMPT_LENGTHS]
    oracles = [ask(peft_model, prompt) for prompt in prompts]
    bases = [ask(plain, prompt) for prompt in prompts]
    # The adapter must matter, or the grid proves nothing. (A sliding window hides a prefix from a
    # prompt that is long enough, so the shortest prompt is asked.)
    assert (oracles[0].logits[0] - bases[0].logits[0]).abs().max() > 0.05
    for path, fast_kernels in PATHS.items():
        config = dataclasses.replace(TINY, fast_kernels=fast_kernels)
        engine = tiny_engine(tiny_model(architecture), {"a": tmp_path}, config)
        try:
            compare(engine, adapter_ref("a", tmp_path, engine), prompts, oracles, bases)
        except AssertionError as error:
            raise AssertionError(f"{path} path: {error}") from error
        finally:
            engine.close()


def compare(
    engine: Engine,
    ref: AdapterRef,
    prompts: list[list[int]],
    oracles: list[Oracle],
    bases: list[Oracle],
) -> None:
    """Tokens of a mixed batch, and teacher-forced logits, against the oracles."""
    requests = [request(f"adapter-{i}", prompt, ref) for i, prompt in enumerate(prompts)]
    requests += [request(f"base-{i}", prompt) for i, prompt in enumerate(prompts)]
    got = run(engine, requests)
    for index, prompt in enumerate(prompts):
        assert same_until_a_tie(tokens(got[f"adapter-{index}"]), oracles[index])
        assert same_until_a_tie(tokens(got[f"base-{index}"]), bases[index])
        forced = teacher_forced(engine, prompt, oracles[index].token_ids, ref)
        error = (forced - torch.log_softmax(oracles[index].logits, -1)).abs().max()
        assert error < 1e-4, f"logits differ by {error}"
