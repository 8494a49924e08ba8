"""Loads the tokenizer of a base directory. Separate from `load` to avoid importing model classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import BaseUnsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Model types for which AutoTokenizer uses the tokenizer class named in the config.
_TAKEN_AT_THEIR_WORD = frozenset({"llama"})


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base directory (`LoadedBase.tokenizer_dir`).

    Raises:
        BaseUnsupported: no tokenizer that loads without custom code.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = _tokenizer_class(Path(path)).from_pretrained(
            Path(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseUnsupported(f"{path}: the tokenizer does not load: {error}") from error
    return tokenizer


def _tokenizer_class(directory: Path) -> Any:
    """AutoTokenizer, or the class that it would choose, if the files determine it.

    AutoTokenizer imports every model's config first, and torch with them.
    """
    named = _read(directory / "tokenizer_config.json")
    kind = _read(directory / "config.json").get("model_type")
    if (
        named.get("tokenizer_class") == "TokenizersBackend"
        and "auto_map" not in named
        and kind in _TAKEN_AT_THEIR_WORD
        and (directory / "tokenizer.json").is_file()
    ):
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
