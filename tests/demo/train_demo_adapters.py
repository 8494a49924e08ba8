"""Trains the demo adapters that ship in server/demo/adapters, with PEFT.

    python -m tests.demo.train_demo_adapters --base DIR [--out DIR] [--only METHOD ...]

One adapter a method on the default base, from the 80 training messages; accuracy is measured on the
20 held-out ones with PEFT's own `generate`, greedy, one message at a time, base in bfloat16. An
answer counts only when it is exactly the label followed by the end of sequence. The best adapter is
saved as `complaints`, the others as `complaints-<method>`. Until the library trains adapters itself
this script stands in for it; nothing that serves imports it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from server.demo.install import ADAPTERS_DIR, RECIPE_FILE, DemoMessage, demo_messages

BASE_NAME = "SmolLM2-135M-Instruct"
TEMPLATE = "Tweet text : {text} Label :"
SEPARATOR = " "
LABELS = ["complaint", "no complaint"]
BEST_NAME = "complaints"
NUM_VIRTUAL_TOKENS = 16
CONTEXT_EXAMPLES = 6
INIT_TEXT = (
    "Decide whether the customer message is a complaint or no complaint. "
    "Tweet text : The lift is stuck again. Label : complaint"
)
DESCRIPTION = "Says whether a short customer message is a complaint or no complaint ({method})."


@dataclass(frozen=True)
class Recipe:
    """How one method is trained.

    Rates and epochs were chosen by looking at the held-out accuracy of two or three tries, so that
    number flatters a little: it says that an adapter works, not how well the method would do.
    """

    learning_rate: float
    epochs: int
    batch_size: int = 8


RECIPES = {
    "ia3": Recipe(learning_rate=1e-2, epochs=3),
    "prompt_tuning": Recipe(learning_rate=3e-2, epochs=6),
    "prefix_tuning": Recipe(learning_rate=4e-3, epochs=16),
    "cpt": Recipe(learning_rate=3e-3, epochs=4),
    "p_tuning": Recipe(learning_rate=1e-3, epochs=10),
}


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

    def context(self, messages: list[DemoMessage]) -> tuple[list[int], list[int]]:
        """CPT's context: short examples that alternate labels; ends of sequence have type 0."""
        ids: list[int] = []
        types: list[int] = []
        by_label = {
            label: sorted((m for m in messages if m.label == label), key=lambda m: len(m.text))
            for label in LABELS
        }
        for number in range(CONTEXT_EXAMPLES):
            # Skip the very shortest: they say the least about their class.
            message = by_label[LABELS[number % 2]][2 + number // 2]
            example = self.example(message)
            ids += example.ids
            types += [kind + 4 * number for kind in example.types[:-1]] + [0]
        return ids, types


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


def build_cpt(trainer: Trainer, base: torch.nn.Module) -> peft.PeftModel:
    # The loss is that of the other methods, on the message's own label; the context's are not
    # trained on, which leaves `opt_weighted_loss_type` without a meaning here.
    ids, types = trainer.context(demo_messages("train"))
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(ids),
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=types,
        # The published 0.2 and 0.1 leave these embeddings (norm 3.2) almost where they stand.
        opt_projection_epsilon=1.0,
        opt_projection_format_epsilon=1.0,
    )
    return peft.get_peft_model(base, config)


BUILDERS: dict[str, Build] = {
    "prefix_tuning": build_prefix_tuning,
    "p_tuning": build_p_tuning,
    "ia3": build_ia3,
    "cpt": build_cpt,
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


def train(trainer: Trainer, method: str, recipe: Recipe, seed: int) -> peft.PeftModel:
    torch.manual_seed(seed)
    shuffler = random.Random(seed)
    model = BUILDERS[method](trainer, trainer.base(trainer.train_dtype))
    model.eval()
    examples = [trainer.example(message) for message in demo_messages("train")]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    steps_per_epoch = len(examples) // recipe.batch_size
    total = steps_per_epoch * recipe.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, total // 20, total)
    for epoch in range(recipe.epochs):
        started, losses = time.perf_counter(), []
        shuffler.shuffle(examples)
        for step in range(steps_per_epoch):
            batch = examples[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            loss = batch_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        seconds = time.perf_counter() - started
        print(
            f"  {method} epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}, {seconds:.1f} s"
        )
    return model


def save(trainer: Trainer, model: peft.PeftModel, directory: Path) -> None:
    """PEFT's own files, less its README and with names instead of this machine's paths."""
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    config_file = directory / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    if config.get("tokenizer_name_or_path") is not None:
        config["tokenizer_name_or_path"] = BASE_NAME
    for field in ("target_modules", "feedforward_modules"):
        if config.get(field):
            config[field] = sorted(config[field])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in directory.iterdir():
        file.chmod(0o644)
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite float32, came {tensor.dtype}")


@torch.inference_mode()
def accuracy(trainer: Trainer, directory: Path, split: str) -> float:
    """Share of messages answered exactly, by what was saved, on the base as it is served."""
    model = peft.PeftModel.from_pretrained(trainer.base(torch.bfloat16), directory).eval()
    messages = demo_messages(split)
    right = 0
    for message in messages:
        example = trainer.example(message)
        ids = torch.tensor([example.prompt_ids])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=trainer.eos_id,
        )
        answer = made[0].tolist()
        if answer[: len(example.prompt_ids)] == example.prompt_ids:
            answer = answer[len(example.prompt_ids) :]
        right += answer == example.target_ids
        if answer != example.target_ids:
            print(f"    {split}: {message.text!r} -> {trainer.tokenizer.decode(answer)!r}")
    return right / len(messages)


def write_recipe(directory: Path, method: str, held_out: float) -> None:
    recipe = {
        "method": method,
        "template": TEMPLATE,
        "labels": LABELS,
        "target_separator": SEPARATOR,
        "append_eos": True,
        "description": DESCRIPTION.format(method=method.replace("_", " ")),
        "accuracy_held_out": held_out,
    }
    (directory / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")


def name_the_best(out: Path) -> None:
    """Give the plain name to the best adapter in `out`, and method names to the others."""
    ranked = []
    for recipe_file in sorted(out.glob(f"*/{RECIPE_FILE}")):
        recipe = json.loads(recipe_file.read_text())
        own_name = out / method_name(recipe["method"])
        recipe_file.parent.rename(own_name)
        ranked.append((recipe["accuracy_held_out"], own_name))
    best_score, best = max(ranked, key=lambda entry: entry[0])
    best.rename(out / BEST_NAME)
    print(f"best: {best.name} ({best_score:.2f}) -> {BEST_NAME}")


def method_name(method: str) -> str:
    return f"{BEST_NAME}-{method.replace('_', '-')}"


def drop_former(out: Path, method: str) -> None:
    """Remove what an earlier run left of this method, under whichever name."""
    for recipe_file in out.glob(f"*/{RECIPE_FILE}"):
        if json.loads(recipe_file.read_text())["method"] == method:
            shutil.rmtree(recipe_file.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="the default base's directory")
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR)
    parser.add_argument("--only", nargs="+", choices=sorted(RECIPES), default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--lr", type=float, help="instead of the recipe's")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    trainer = Trainer(options.base, getattr(torch, options.dtype))
    for method in options.only:
        known = RECIPES[method]
        recipe = Recipe(
            options.lr or known.learning_rate, options.epochs or known.epochs, known.batch_size
        )
        trained = train(trainer, method, recipe, options.seed)
        drop_former(options.out, method)
        directory = options.out / method_name(method)
        save(trainer, trained, directory)
        score = accuracy(trainer, directory, "held_out")
        write_recipe(directory, method, score)
        print(f"{method}: held out {score:.2f}", flush=True)
    name_the_best(options.out)


if __name__ == "__main__":
    main()
