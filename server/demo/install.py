"""The example that ships: customer messages and the adapters that were trained on them.

Reads packaged data only. It does not know the registry, the engine or the base model; whoever
installs the adapters takes them from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

_HERE = Path(__file__).parent
MESSAGES_FILE = _HERE / "messages.jsonl"
ADAPTERS_DIR = _HERE / "adapters"
RECIPE_FILE = "graftwork.json"


@dataclass(frozen=True)
class DemoMessage:
    """One short customer message, written for this project, with its label."""

    text: str
    label: str
    split: Split


@dataclass(frozen=True)
class DemoAdapter:
    """One packaged adapter and what must be stored with it.

    Attributes:
        name: the name to register it under, such as "complaints".
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        method: the method's name, such as "prefix_tuning".
        template: `{column}` substitution; the only column is "text".
        labels: the answers it was trained to give.
        target_separator: stands between the rendered template and the answer.
        append_eos: True where it was trained to end its answer with the end-of-sequence token.
        description: one sentence for people.
        accuracy_held_out: share of the held-out messages that the oracle answered exactly (answer
            and end of sequence, greedy, bfloat16) when the adapter was trained.
    """

    name: str
    directory: Path
    method: str
    template: str
    labels: tuple[str, ...]
    target_separator: str
    append_eos: bool
    description: str
    accuracy_held_out: float


def demo_adapters() -> list[DemoAdapter]:
    """Every packaged adapter, by name; `complaints` comes first."""
    return [
        _read_adapter(recipe.parent) for recipe in sorted(ADAPTERS_DIR.glob(f"*/{RECIPE_FILE}"))
    ]


def demo_messages(split: Split | None = None) -> list[DemoMessage]:
    """The packaged messages in file order: one split, or all 100."""
    lines = MESSAGES_FILE.read_text(encoding="utf-8").splitlines()
    messages = [DemoMessage(**json.loads(line)) for line in lines]
    return [message for message in messages if split is None or message.split == split]


def _read_adapter(directory: Path) -> DemoAdapter:
    recipe = json.loads((directory / RECIPE_FILE).read_text(encoding="utf-8"))
    recipe["labels"] = tuple(recipe["labels"])
    return DemoAdapter(name=directory.name, directory=directory, **recipe)
