"""The last new token takes no position: at the edge the engine makes as many tokens as PEFT makes."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from peft import CPTConfig, PrefixTuningConfig, PromptTuningConfig

from server.engine.kv_cache import KVBlocks
from server.engine.request import FailedEvent
from tests.adapters.methods.oracle import gpt2, peft_save, spec_of
from tests.engine_tools import TINY, adapter_ref, request, run, tiny_engine, tokens

POSITIONS = 64  # of `gpt2`, which are learned: PEFT fails where one more is needed


def _cpt(count: int) -> CPTConfig:
    return CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=list(range(count)))


def _prefix(count: int) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count)


def _prompt(count: int) -> PromptTuningConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count)


@pytest.mark.parametrize(
    ("make", "virtual", "prompt", "new"),
    [
        (_prefix, 30, 34, 1),
        (_prefix, 30, 30, 5),
        (_prefix, 63, 1, 1),
        (_prompt, 63, 1, 1),
        (_cpt, 20, 40, 5),
    ],
)
def test_virtual_prompt_and_new_tokens_but_the_last_fill_the_positions(
    make, virtual, prompt, new, tmp_path
):
    ids = [(7 * i + 3) % 60 for i in range(prompt)]
    model = peft_save(gpt2(), make(virtual), tmp_path)
    (tmp_path / "README.md").unlink()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a position that PEFT ignores
        out = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, prompt, dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    expected = out[0, prompt:].tolist()
    assert len(expected) == new

    engine = tiny_engine(gpt2(), {"one": tmp_path})
    try:
        ref = adapter_ref("one", tmp_path, engine)
        made = run(engine, [request("r", ids, ref, new, ignore_eos=True)])["r"]
        assert tokens(made) == expected
        (refused,) = engine.submit(request("more", ids, ref, new + 1))
    finally:
        engine.close()
    assert isinstance(refused, FailedEvent)
    assert refused.code == "too_long"
    assert f"the base has {POSITIONS} positions" in refused.message
    assert f"expected at most {POSITIONS + 1}" in refused.message


def test_a_sequence_may_fill_every_block():
    """Of five blocks of eight, 36 prompt and 5 new tokens take 40 positions."""
    bytes_per_block = KVBlocks.bytes_per_block(spec_of(gpt2()), TINY.block_size, torch.float32)
    config = dataclasses.replace(TINY, kv_bytes=5 * bytes_per_block)
    engine = tiny_engine(gpt2(), config=config)
    try:
        ids = list(range(36))
        made = run(engine, [request("r", ids, None, 5, ignore_eos=True)])["r"]
        assert len(made) == 5
        (refused,) = engine.submit(request("more", ids, None, 6))
    finally:
        engine.close()
    assert isinstance(refused, FailedEvent)
    assert "41 positions and 0 virtual tokens need 6 KV blocks, the engine has 5" in refused.message
