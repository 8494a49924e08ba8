"""The example that ships: customer messages and the adapters that were trained on them.

`make demo-adapters` made the adapters, with `graftwork train`. Reads packaged data only. It does not
know the registry, the engine or the base model; whoever installs the adapters takes them from here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters.training.job import TrainingJob
from adapters.training.provenance import PROVENANCE_FILE, Provenance, read_provenance

Split = Literal["train", "held_out"]

_HERE = Path(__file__).parent
MESSAGES_FILE = _HERE / "messages.jsonl"
ADAPTERS_DIR = _HERE / "adapters"


@dataclass(frozen=True)
class DemoMessage:
    """One short customer message, written for this project, with its label."""

    text: str
    label: str
    split: Split


@dataclass(frozen=True)
class DemoAdapter:
    """One packaged adapter.

    Attributes:
        name: the name to register it under, such as "complaints".
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        provenance: how it was trained, and what is stored with it; the only column of its template
            is "text".
    """

    name: str
    directory: Path
    provenance: Provenance

    @property
    def job(self) -> TrainingJob:
        """What it was trained to do."""
        return self.provenance.job


def demo_adapters() -> list[DemoAdapter]:
    """Every packaged adapter, by name; `complaints` comes first."""
    return [
        _read_adapter(file.parent) for file in sorted(ADAPTERS_DIR.glob(f"*/{PROVENANCE_FILE}"))
    ]


def demo_messages(split: Split | None = None) -> list[DemoMessage]:
    """The packaged messages in file order: one split, or all 100."""
    lines = MESSAGES_FILE.read_text(encoding="utf-8").splitlines()
    messages = [DemoMessage(**json.loads(line)) for line in lines]
    return [message for message in messages if split is None or message.split == split]


def _read_adapter(directory: Path) -> DemoAdapter:
    provenance = read_provenance(directory)
    if provenance is None:
        raise FileNotFoundError(directory / PROVENANCE_FILE)
    return DemoAdapter(directory.name, directory, provenance)
