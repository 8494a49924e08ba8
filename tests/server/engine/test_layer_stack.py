"""The stack of layers against the layers of transformers that it stands in for."""

from __future__ import annotations

import itertools

import pytest
import torch

from server.engine.layer_stack import LayerStack
from server.engine.model_runner import ModelRunner, StepRows
from server.engine.request import GenerationRequest
from server.engine.sequence import Sequence
from server.engine.step_plan import Chunk
from tests.tiny_models import tiny_model, tiny_spec

KNOWN = ["llama", "mistral", "qwen2", "qwen3"]
OTHERS = ["gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "phi", "bloom"]


def logits_of(
    architecture: str, dtype: torch.dtype, *, fast: bool, chunks: tuple[int, ...] = (16, 8)
) -> torch.Tensor:
    """All logits of a prompt of 30 tokens, in chunks and single tokens."""
    model = tiny_model(architecture).to(dtype)
    runner = ModelRunner(
        model,
        tiny_spec(model),
        num_blocks=8,
        block_size=8,
        num_scale_slots=1,
        prefill_chunk=16,
        fast_kernels=fast,
    )
    tokens = tuple((7 * i) % 50 + 3 for i in range(30))
    sequence = Sequence.of(GenerationRequest("probe", tokens), arrival=0)
    sequence.block_ids = [5, 2, 7, 0]
    out = []
    sizes = [*chunks, *[1] * (30 - sum(chunks))]
    for start, size in zip([0, *itertools.accumulate(sizes)], sizes, strict=False):
        chunk = Chunk(sequence, start, size, samples=True)
        out += runner.run([StepRows(chunk, None, num_logits=size)])
    return torch.cat(out).float()


@pytest.mark.parametrize("architecture", [*KNOWN, *OTHERS])
def test_it_takes_the_models_that_it_knows(architecture):
    stack = LayerStack.of(tiny_model(architecture), None, None, None)
    assert (stack is not None) == (architecture in KNOWN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", KNOWN)
def test_logits_are_those_of_the_plain_layers(architecture, dtype):
    plain = logits_of(architecture, dtype, fast=False)
    fused = logits_of(architecture, dtype, fast=True)
    # In bf16 a last bit of attention's sums moves everything after it by a last bit or two.
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    spread = float(plain.std())
    torch.testing.assert_close(fused / spread, plain / spread, atol=tolerance, rtol=0)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_several_chunks_in_one_are_as_if_they_came_apart(architecture, fast):
    apart = logits_of(architecture, torch.float32, fast=fast)
    for chunks in ((24,), (3, 27), (30,), (16, 14)):
        together = logits_of(architecture, torch.float32, fast=fast, chunks=chunks)
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


def test_another_activation_is_left_to_transformers():
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    assert LayerStack.of(model, None, None, None) is None
