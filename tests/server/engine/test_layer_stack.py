"""The stack of layers against the layers of transformers that it stands in for."""

from __future__ import annotations

import pytest
import torch

from server.engine.layer_stack import LayerStack
from server.engine.model_runner import ModelRunner, StepRows
from server.engine.request import GenerationRequest
from server.engine.scheduler import Chunk
from server.engine.sequence import Sequence
from tests.tiny_models import tiny_model, tiny_spec

KNOWN = ["llama", "mistral", "qwen2", "qwen3"]
OTHERS = ["gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "phi", "bloom"]


def logits_of(architecture: str, dtype: torch.dtype, *, fast: bool) -> torch.Tensor:
    """All logits of a prompt of 30 tokens, in two chunks and six single tokens."""
    model = tiny_model(architecture).to(dtype)
    runner = ModelRunner(
        model, tiny_spec(model), num_blocks=8, block_size=8, num_scale_slots=1, fast_kernels=fast
    )
    tokens = tuple((7 * i) % 50 + 3 for i in range(30))
    sequence = Sequence.of(GenerationRequest("probe", tokens), arrival=0)
    sequence.block_ids = [5, 2, 7, 0]
    out = []
    for start, size in ((0, 16), (16, 8), *((at, 1) for at in range(24, 30))):
        chunk = Chunk(sequence, start, size, samples=True)
        out += runner.run([StepRows(chunk, None, num_logits=size)])
    return torch.cat(out).float()


@pytest.mark.parametrize("architecture", [*KNOWN, *OTHERS])
def test_it_takes_the_models_that_it_knows(architecture):
    stack = LayerStack.of(tiny_model(architecture), None, None)
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


def test_another_activation_is_left_to_transformers():
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    assert LayerStack.of(model, None, None) is None
