"""What a plain transformers model says of one row: the oracle of packed rows.

No attention of ours, no packing, no padding: one row, its virtual tokens before it, eager attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from adapters.base_model import BaseModelSpec
from adapters.parts import KVPrefix, SoftPrompt

Virtual = KVPrefix | SoftPrompt | None


def row_logits(model: PreTrainedModel, virtual: Virtual, ids: Sequence[int]) -> torch.Tensor:
    """Logits (n + T, V) of a soft prompt and its row, (T, V) of any other row; differentiable."""
    tokens = torch.tensor([list(ids)])
    if isinstance(virtual, SoftPrompt):
        own = model.get_input_embeddings()(tokens)
        embeddings = torch.cat((virtual.embeddings[None], own), dim=1)
        return model(inputs_embeds=embeddings, use_cache=False).logits[0]
    if virtual is None:
        return model(input_ids=tokens, use_cache=False).logits[0]
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(virtual.keys, virtual.values, strict=True)):
        cache.update(keys[None], values[None], layer)
    mask = torch.ones(1, virtual.num_virtual_tokens + len(ids), dtype=torch.long)
    output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
    return output.logits[0]


def own_logits(model: PreTrainedModel, virtual: Virtual, ids: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) of the row's own tokens."""
    return row_logits(model, virtual, ids)[-len(ids) :]


def log_likelihood(
    model: PreTrainedModel, virtual: Virtual, prompt: Sequence[int], target: Sequence[int]
) -> float:
    """Log-likelihood of the target's tokens after the prompt, summed."""
    with torch.no_grad():
        logits = own_logits(model, virtual, [*prompt, *target]).float()
    scores = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return float(scores.gather(1, torch.tensor(list(target))[:, None]).sum())


def random_virtual(kind: str, spec: BaseModelSpec, num: int = 7, seed: int = 5) -> Virtual:
    """Virtual tokens of unit scale whose tensors take gradients: "prefix", "soft" or "none"."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    if kind == "prefix":
        shape = (spec.num_layers, spec.num_kv_heads, num, spec.head_dim)
        return KVPrefix(noise(*shape), noise(*shape))
    return SoftPrompt(noise(num, spec.hidden_size)) if kind == "soft" else None


def leaves(virtual: Virtual) -> list[torch.Tensor]:
    """The tensors that gradients reach."""
    if virtual is None:
        return []
    if isinstance(virtual, SoftPrompt):
        return [virtual.embeddings]
    return [virtual.keys, virtual.values]
