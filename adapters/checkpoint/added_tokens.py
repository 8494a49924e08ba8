"""Tokens that a tokenizer beside an adapter adds to its base's: read from the files that trainers save.

Prompts are split by the base's tokenizer, so an adapter that was trained with tokens of its own sees other
tokens here. Untrusted bytes in, token texts and a warning out; independent of archives and checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Bytes of a file that are read: `added_tokens` stands at the start of a tokenizer.json of any size.
MAX_BYTES = 1 << 20
_SHOWN = 8
_CHARACTERS = 40

# Token -> its id; None where the file does not say.
Tokens = dict[str, int | None]


def tokens_of(file_name: str, data: bytes) -> Tokens:
    """The added and special tokens that a tokenizer's file lists; none where it is not as expected.

    Args:
        file_name: one of `FILES`.
        data: its first `MAX_BYTES`.
    """
    text = data.decode("utf-8-sig", "replace")
    found: Tokens = {}
    try:
        for token, number in FILES[file_name](text):
            if token:
                merge(found, {token: number})
    except (ValueError, RecursionError):  # not JSON, or cut off in the middle
        return {}
    return found


def merge(tokens: Tokens, found: Tokens) -> None:
    """Add tokens; an id that is known stays."""
    for token, number in found.items():
        if number is not None or token not in tokens:
            tokens[token] = number


def warning_of(tokens: Tokens, vocab_size: int, knows: Callable[[str], bool] | None) -> str | None:
    """A warning that names the tokens that the base does not have; None if it has all of them.

    Args:
        tokens: as `tokens_of` gives them.
        vocab_size: rows of the base's embeddings.
        knows: whether the base's tokenizer has a token; None where it is not at hand, and the ids decide.
    """
    if knows is None:
        added = [
            token for token, number in tokens.items() if number is not None and number >= vocab_size
        ]
    else:
        added = [token for token in tokens if not knows(token)]
    if not added:
        return None
    shown = ", ".join(_quoted(token) for token in added[:_SHOWN])
    more = f" and {len(added) - _SHOWN} more" if len(added) > _SHOWN else ""
    return (
        f"the tokenizer beside the adapter has tokens that the base's does not have: {shown}{more}; "
        "prompts are split by the base's tokenizer, so text with such a token is split otherwise than in "
        "training"
    )


def _quoted(token: str) -> str:
    text = "".join(char if char.isprintable() else "?" for char in token[:_CHARACTERS])
    return repr(text)


# --- the files -----------------------------------------------------------------------------------


def _in_added_tokens(text: str) -> Iterator[tuple[str, int | None]]:
    yield from _by_token(json.loads(text))


def _in_config(text: str) -> Iterator[tuple[str, int | None]]:
    raw = json.loads(text)
    if not isinstance(raw, dict):
        return
    decoder = raw.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for number, entry in decoder.items():
            yield _content(entry), int(number) if number.isdecimal() else None
    yield from _in_map(raw)


def _in_special_tokens(text: str) -> Iterator[tuple[str, int | None]]:
    raw = json.loads(text)
    if isinstance(raw, dict):
        yield from _in_map(raw)


def _in_tokenizer(text: str) -> Iterator[tuple[str, int | None]]:
    start = text.find('"added_tokens"')
    start = text.find("[", start) if start >= 0 else -1
    if start < 0:
        return
    entries, _ = json.JSONDecoder().raw_decode(text, start)
    for entry in entries:
        number = entry.get("id") if isinstance(entry, dict) else None
        yield _content(entry), number if isinstance(number, int) else None


def _in_map(raw: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """The fields that name special tokens, such as `pad_token` and `additional_special_tokens`."""
    for name, value in raw.items():
        if name.endswith(("_token", "_tokens")):
            for entry in value if isinstance(value, list) else [value]:
                yield _content(entry), None


def _by_token(raw: Any) -> Iterator[tuple[str, int | None]]:
    if isinstance(raw, dict):
        for token, number in raw.items():
            yield token, number if isinstance(number, int) else None


def _content(entry: Any) -> str:
    """The text of a token that is written as text or as an object; empty for anything else."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""


FILES: Mapping[str, Callable[[str], Iterator[tuple[str, int | None]]]] = {
    "added_tokens.json": _in_added_tokens,
    "special_tokens_map.json": _in_special_tokens,
    "tokenizer.json": _in_tokenizer,
    "tokenizer_config.json": _in_config,
}
