"""The other side of the training benchmarks: PEFT in a plain torch loop.

The same rows, token ids, order of rows, recipe and seed as a job here; rows padded on the right, the
base in eval mode, loss as PEFT computes it. What PEFT draws at random (its starting weights) it draws
itself.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from adapters.training.batches import Steps, learning_rate
from adapters.training.examples import Example
from adapters.training.job import TrainingJob

CONFIGS = {
    "PREFIX_TUNING": peft.PrefixTuningConfig,
    "P_TUNING": peft.PromptEncoderConfig,
    "IA3": peft.IA3Config,
    "CPT": peft.CPTConfig,
    "PROMPT_TUNING": peft.PromptTuningConfig,
}


def wrap(base: Path, job: TrainingJob, dtype: torch.dtype, init_text: str | None) -> peft.PeftModel:
    """PEFT around a fresh base, at the start of its training."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(job.hyperparameters.seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().requires_grad_(False)
    given = {k: v for k, v in job.config.items() if k not in ("peft_type", "peft_version")}
    given["inference_mode"] = False
    if init_text is not None and job.peft_type == "PROMPT_TUNING":
        given |= {
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": init_text,
            "tokenizer_name_or_path": str(base),
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, CONFIGS[job.peft_type](**given))
        if init_text is not None and job.peft_type == "PREFIX_TUNING":
            peft.initialize_kv_prefix_from_text(
                wrapped,
                AutoTokenizer.from_pretrained(base),
                text=init_text,
                use_chat_template=False,
            )
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped.eval()


class PlainLoop:
    """A plain loop over a job's steps."""

    def __init__(self, model: peft.PeftModel, job: TrainingJob, examples: list[Example]) -> None:
        self.model = model
        self.plan = Steps.of(len(examples), job.hyperparameters)
        self._job = job
        self._examples = examples
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        options = job.hyperparameters
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=options.learning_rate,
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
        )

    def step(self, number: int) -> tuple[float, int]:
        """One optimiser step; its loss and the tokens of its rows."""
        options = self._job.hyperparameters
        rate = learning_rate(number, self.plan.max_steps, options)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        (rows,) = self.plan.batches(number)
        batch = [self._examples[row] for row in rows]
        inputs = padded(batch)
        if self._job.peft_type != "CPT":
            del inputs["input_type_mask"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = self.model(**inputs).loss
        loss.backward()
        if options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, options.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item(), sum(example.num_tokens for example in batch)

    def run(self) -> None:
        """Every step."""
        for number in range(self.plan.max_steps):
            self.step(number)


def padded(batch: list[Example]) -> dict[str, torch.Tensor]:
    """A batch as PEFT takes it, padded on the right."""
    longest = max(example.num_tokens for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(batch):
        length = example.num_tokens
        ids[row, :length] = torch.tensor(example.prompt_ids + example.target_ids)
        mask[row, :length] = 1
        types[row, :length] = torch.tensor(example.types)
        labels[row, len(example.prompt_ids) : length] = torch.tensor(example.target_ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "input_type_mask": types}
