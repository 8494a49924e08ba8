"""The engine on a CUDA device: the CPU's tokens in float32, and a run in bfloat16.

Skipped without a GPU. The CPU engine is the oracle: that it gives PEFT's tokens is the conformance
grid's affair.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.engine.engine import Engine
from server.engine.request import AdapterRef, GenerationRequest, TokenEvent
from tests.conformance.peft_oracle import make_adapter, prompt_ids
from tests.engine_tools import adapter_ref, request, run, tiny_engine, tokens
from tests.tiny_models import tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ARCHITECTURES = ("llama", "mistral", "gemma2", "gpt2", "bloom")
VARIANTS = ("prefix", "prompt-tuning", "cpt", "ia3")
PROMPT_LENGTHS = (9, 37)
MARGIN = 1e-3


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(architecture, tmp_path_factory) -> dict[str, Path]:
    """Variant -> checkpoint by PEFT; the variant is the digest as well."""
    out = {}
    for variant in VARIANTS:
        out[variant] = tmp_path_factory.mktemp(f"{architecture}-{variant}")
        make_adapter(tiny_model(architecture), architecture, variant, out[variant])
    return out


def mixed(folders: dict[str, Path], engine: Engine) -> list[GenerationRequest]:
    """Prompts of two lengths with every adapter and the base, greedy, with two top tokens."""
    refs: dict[str, AdapterRef | None] = {"base": None}
    for variant, folder in folders.items():
        refs[variant] = adapter_ref(variant, folder, engine)
    return [
        request(f"{variant}-{length}", prompt_ids(length), ref, num_logprobs=2)
        for length in PROMPT_LENGTHS
        for variant, ref in refs.items()
    ]


def run_on(
    device: str, architecture: str, folders: dict[str, Path], dtype: torch.dtype = torch.float32
) -> dict[str, list[TokenEvent]]:
    """All of `mixed` in one batch."""
    engine = tiny_engine(tiny_model(architecture, dtype=dtype).to(device), folders)
    try:
        assert engine.runner.device.type == torch.device(device).type
        return run(engine, mixed(folders, engine))
    finally:
        engine.close()


def same_until_a_tie(got: list[TokenEvent], oracle: list[TokenEvent]) -> bool:
    """Equal tokens, or equal up to a step at which the oracle's two best were nearly equal."""
    for ours, theirs in zip(got, oracle, strict=True):
        if ours.token_id != theirs.token_id:
            assert theirs.logprob is not None
            (_, first), (_, second) = theirs.logprob.top
            return first - second < MARGIN
    return True


def test_float32_gives_the_cpus_tokens(architecture, folders):
    oracle = run_on("cpu", architecture, folders)
    got = run_on("cuda", architecture, folders)
    assert set(got) == set(oracle)
    for request_id, events in got.items():
        assert same_until_a_tie(events, oracle[request_id]), request_id
        # The first token is drawn after equal prompts, so its log-probability must be equal too.
        ours, theirs = events[0].logprob, oracle[request_id][0].logprob
        assert ours is not None
        assert theirs is not None
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_bfloat16_runs_and_repeats_itself(architecture, folders):
    first = run_on("cuda", architecture, folders, torch.bfloat16)
    again = run_on("cuda", architecture, folders, torch.bfloat16)
    assert {key: tokens(events) for key, events in first.items()} == {
        key: tokens(events) for key, events in again.items()
    }
    assert all(len(events) == 32 for events in first.values())
    base = [tokens(first[f"base-{length}"]) for length in PROMPT_LENGTHS]
    for variant in VARIANTS:
        adapted = [tokens(first[f"{variant}-{length}"]) for length in PROMPT_LENGTHS]
        assert adapted != base
