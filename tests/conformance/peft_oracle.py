"""The oracle: PEFT itself, on tiny random bases, with adapters of unit scale.

Makes checkpoints with PEFT, and says what PEFT's `generate` gives for them: batch of one, no padding,
DynamicCache, float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    CPTConfig,
    IA3Config,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel

from tests.tiny_models import VOCAB

NUM_NEW_TOKENS = 32

# Query, key and value projections, and what feeds back into the residual stream, by architecture.
_OUTPUT_SIDE = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "bloom": ["query_key_value", "self_attention.dense"],
    "opt": ["k_proj", "out_proj"],
    "phi": ["v_proj", "dense"],
}


def _prefix(**kwargs: Any) -> Callable[[str], Any]:
    return lambda _: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, **kwargs)


def _encoder(kind: str) -> Callable[[str], Any]:
    return lambda _: PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=6,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=16,
    )


def _cpt(_: str) -> Any:
    ids = [5, 9, 11, 3, 60, 61, 7, 8, 2]
    return CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=[1, 2, 2, 3, 4, 5, 6, 7, 8],
        opt_projection_epsilon=2.0,
        opt_projection_format_epsilon=2.0,
        num_virtual_tokens=len(ids),
    )


def _ia3_output(architecture: str) -> Any:
    targets = _OUTPUT_SIDE.get(architecture, ["k_proj", "o_proj"])
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[])


def _ia3_all(_: str) -> Any:
    return IA3Config(task_type="CAUSAL_LM", target_modules="all-linear", feedforward_modules=[])


VARIANTS: dict[str, Callable[[str], Any]] = {
    "prefix": _prefix(),
    "prefix-projection": _prefix(prefix_projection=True, encoder_hidden_size=12),
    "p-tuning-mlp": _encoder("MLP"),
    "p-tuning-lstm": _encoder("LSTM"),
    "cpt": _cpt,
    "prompt-tuning": lambda _: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "ia3": lambda _: IA3Config(task_type="CAUSAL_LM"),
    "ia3-output-side": _ia3_output,
    "ia3-all-linear": _ia3_all,
}


@dataclass(frozen=True)
class Oracle:
    """What PEFT says for one prompt.

    Attributes:
        token_ids: greedy tokens, as many as were asked for.
        logits: (len(token_ids), V), from which each was chosen.
        margins: difference of the two largest logits, a step each.
    """

    token_ids: list[int]
    logits: torch.Tensor
    margins: torch.Tensor


def make_adapter(
    base: PreTrainedModel, architecture: str, variant: str, directory: Path, seed: int = 1
) -> PeftModel:
    """A PEFT model around `base` with a random adapter of unit scale, saved to `directory`."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, VARIANTS[variant](architecture))
    _randomise(model, variant)
    model.eval()
    model.save_pretrained(directory)
    (directory / "README.md").unlink()  # the registry keeps the two files that matter
    return model


def _randomise(model: PeftModel, variant: str) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if variant.startswith("ia3"):
                parameter.copy_(1.0 + 0.5 * noise)
            elif variant.startswith("p-tuning") or variant == "prefix-projection":
                parameter.copy_(noise * (0.7 if parameter.ndim > 1 else 0.1))
            else:
                parameter.copy_(noise)
            assert "ia3" in variant or "prompt_encoder" in name, name


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    """A random prompt without special tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


def ask(model: torch.nn.Module, prompt: list[int], num_new_tokens: int = NUM_NEW_TOKENS) -> Oracle:
    """Greedy generation by `model`, a PEFT model or a plain one; end of sequence is ignored."""
    ids = torch.tensor([prompt])
    # PEFT says at every step that it ignores the position ids that transformers passes.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.cat(out.logits).float()
    top = logits.topk(2).values
    return Oracle(out.sequences[0, -num_new_tokens:].tolist(), logits, top[:, 0] - top[:, 1])
