"""PEFT's own training on the default base, as far as a test needs adapters that PEFT made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.demo.install import DemoMessage

TEMPLATE = "Tweet text : {text} Label :"
SEPARATOR = " "
NUM_VIRTUAL_TOKENS = 16
INIT_TEXT = (
    "Decide whether the customer message is a complaint or no complaint. "
    "Tweet text : The lift is stuck again. Label : complaint"
)


@dataclass(frozen=True)
class Example:
    """A rendered row: prompt ids, then target ids with the end of sequence; CPT types per id."""

    prompt_ids: list[int]
    target_ids: list[int]
    types: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.target_ids


class Trainer:
    """One base and tokenizer, and everything that is done with them."""

    def __init__(self, base_dir: Path, train_dtype: torch.dtype) -> None:
        self.base_dir = base_dir
        self.train_dtype = train_dtype
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        self.eos_id = self.tokenizer.eos_token_id

    def base(self, dtype: torch.dtype) -> torch.nn.Module:
        """A fresh base: PEFT changes the model it wraps."""
        model = AutoModelForCausalLM.from_pretrained(self.base_dir, dtype=dtype)
        return model.eval().requires_grad_(False)

    def example(self, message: DemoMessage) -> Example:
        prompt = TEMPLATE.format(text=message.text)
        encoded = self.tokenizer(prompt, return_offsets_mapping=True)
        start = TEMPLATE.index("{text}")
        end = start + len(message.text)
        types = []
        for _, stop in encoded["offset_mapping"]:
            # 1 template before the text, 2 the text, 3 template after it, 4 the label.
            types.append(1 if stop <= start else 2 if stop <= end else 3)
        target = self.tokenizer(SEPARATOR + message.label)["input_ids"] + [self.eos_id]
        return Example(encoded["input_ids"], target, types + [4] * len(target))


Build = Callable[[Trainer, torch.nn.Module], peft.PeftModel]


def build_prefix_tuning(trainer: Trainer, base: torch.nn.Module) -> peft.PeftModel:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL_TOKENS)
    model = peft.get_peft_model(base, config)
    # Random keys collapse at any useful learning rate; keys of real text do not.
    peft.initialize_kv_prefix_from_text(
        model, trainer.tokenizer, text=INIT_TEXT, use_chat_template=False
    )
    return model


def build_p_tuning(_: Trainer, base: torch.nn.Module) -> peft.PeftModel:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL_TOKENS, encoder_hidden_size=128
    )
    return peft.get_peft_model(base, config)


def build_ia3(_: Trainer, base: torch.nn.Module) -> peft.PeftModel:
    return peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM"))


def build_prompt_tuning(trainer: Trainer, base: torch.nn.Module) -> peft.PeftModel:
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=NUM_VIRTUAL_TOKENS,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=INIT_TEXT,
        tokenizer_name_or_path=str(trainer.base_dir),
    )
    return peft.get_peft_model(base, config)


BUILDERS: dict[str, Build] = {
    "prefix_tuning": build_prefix_tuning,
    "p_tuning": build_p_tuning,
    "ia3": build_ia3,
    "prompt_tuning": build_prompt_tuning,
}


def batch_loss(model: peft.PeftModel, batch: list[Example]) -> torch.Tensor:
    """Mean cross entropy over the target tokens of a right-padded batch."""
    longest = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, len(example.prompt_ids) : length] = torch.tensor(example.target_ids)
    # The head over the virtual tokens' positions would cost more than the rest of CPT's forward.
    logits = model(ids, attention_mask=mask, logits_to_keep=longest).logits
    shifted = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)
