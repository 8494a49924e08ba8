"""The tokenizer of a base directory. Apart from `load`: whoever needs only this imports no models."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adapters.errors import BaseUnsupported


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base directory (`LoadedBase.tokenizer_dir`).

    Raises:
        BaseUnsupported: the directory holds none that loads without code of its own.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            Path(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseUnsupported(f"{path}: the tokenizer does not load: {error}") from error
    return tokenizer
