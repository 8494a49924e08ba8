"""Finds the weight files of a Hugging Face model directory, by file name only."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the weights, as transformers would choose them, by name."""
    index = directory / INDEX_FILE
    whole = directory / WEIGHTS_FILE
    if whole.is_file():
        return [whole]
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [directory / shard for shard in sorted(shards)]
    return []
