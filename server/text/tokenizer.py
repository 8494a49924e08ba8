"""The server's view of the base's tokenizer.

Uses backends of its own, so that other code cannot enable truncation or padding; their large parts, the
vocabulary and its merges, are shared with the fast tokenizer. Strings get the special tokens that the
tokenizer adds; ids are used unchanged. Independent of requests and templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from server.text.chat import ChatTemplate


def _letters_of_bytes() -> Iterator[tuple[int, str]]:
    """GPT-2's table: printable bytes stand for themselves, the others for letters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    yield from ((byte, chr(byte)) for byte in printable)
    yield from ((byte, chr(256 + place)) for place, byte in enumerate(others))


# How byte-level tokenizers write bytes (GPT-2's table), and those that fall back to bytes.
_BYTE_OF_LETTER = {letter: byte for byte, letter in _letters_of_bytes()}
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
# Inputs with more characters or ids than this block other threads for too long.
_LONG = 4_096


@dataclass(frozen=True)
class TokenSpan:
    """One token of an encoded text; `start` and `stop` count characters, half open."""

    id: int
    text: str
    start: int
    stop: int


class TextTokenizer:
    """Encodes and decodes for one base.

    Args:
        fast: a transformers fast tokenizer.
        eos_token_ids: ids that end a sequence; the tokenizer's own is added.
    """

    def __init__(self, fast: Any, eos_token_ids: Sequence[int] = ()) -> None:
        self._backend = _own_backend(fast.backend_tokenizer)
        # Rows of data are quoted text: a special token's name inside them is plain text.
        self._plain = _own_backend(fast.backend_tokenizer)
        self._plain.encode_special_tokens = True
        own_eos = () if fast.eos_token_id is None else (int(fast.eos_token_id),)
        # The end of training targets: the tokenizer's EOS, else the first id that ends generation.
        self.eos_token_id: int | None = next(iter((*own_eos, *eos_token_ids)), None)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*eos_token_ids, *own_eos)))
        self.special_ids: frozenset[int] = frozenset(
            token_id
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        ) | frozenset(self.eos_token_ids)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.info: dict[str, Any] = _info(fast)
        # None for a base without a chat template.
        self.chat_template = ChatTemplate.of(fast)
        # Context before a token that is decoded to determine its bytes.
        self._anchor = self.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = self.decode(self._anchor)
        self._bytes: dict[int, bytes] = {}

    def encode(
        self, text: str, *, add_special_tokens: bool = True, plain: bool = False
    ) -> tuple[int, ...]:
        """Text to ids.

        Args:
            text: any string.
            add_special_tokens: add the tokenizer's special tokens (such as BOS).
            plain: treat names of special tokens in `text` as plain text.
        """
        backend = self._plain if plain else self._backend
        return tuple(_encoded(backend, text, add_special_tokens=add_special_tokens).ids)

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool, plain: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Text to ids and character ranges, see `adapters.training.encoding.Encoder`."""
        backend = self._plain if plain else self._backend
        encoding = _encoded(backend, text, add_special_tokens=add_special_tokens)
        return list(encoding.ids), _offsets(encoding)

    def spans(self, text: str, *, add_special_tokens: bool = True) -> list[TokenSpan]:
        """Text to ids with their character ranges."""
        encoding = _encoded(self._backend, text, add_special_tokens=add_special_tokens)
        return [
            TokenSpan(token_id, text[start:stop], start, stop)
            for token_id, (start, stop) in zip(encoding.ids, _offsets(encoding), strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids to text; invalid UTF-8 becomes U+FFFD, ids outside the vocabulary are dropped."""
        if len(ids) > _LONG:  # see `_encoded`
            batch = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
            return str(batch[0])
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def has_token(self, text: str) -> bool:
        """Whether this text is one token of the vocabulary, added and special ones included."""
        return self._backend.token_to_id(text) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text; special tokens by their name.

        They may start or end inside a character. A leading space is preserved, which some tokenizers
        drop from a token that is decoded alone.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._read_bytes(token_id)
        return known

    def _read_bytes(self, token_id: int) -> bytes:
        after = self.decode((*self._anchor, token_id))
        text = after.removeprefix(self._anchor_text)
        if "\ufffd" not in text:
            return text.encode()
        piece = self._backend.id_to_token(token_id) or ""
        if fallback := _BYTE_TOKEN.fullmatch(piece):
            return bytes.fromhex(fallback.group(1))
        if piece and all(letter in _BYTE_OF_LETTER for letter in piece):
            return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
        return text.encode()

    def token_text(self, token_id: int) -> str:
        """One token decoded alone, special tokens by their name."""
        return self.decode((token_id,))


def read_eos_token_ids(base: Path) -> tuple[int, ...]:
    """The ids that end a sequence, from the base's directory.

    `generation_config.json` takes precedence over `config.json`; either may hold one id, a list or nothing.
    """
    for name in ("generation_config.json", "config.json"):
        path = base / name
        if not path.is_file():
            continue
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        if value is not None:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def _encoded(backend: Tokenizer, text: str, *, add_special_tokens: bool) -> Encoding:
    if len(text) <= _LONG:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    # As a batch: only the batch call releases the interpreter lock.
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]


def _offsets(encoding: Encoding) -> list[tuple[int, int]]:
    if len(encoding) <= _LONG:
        return list(encoding.offsets)
    # One by one, although slower: building the whole list at once blocks every other thread.
    return [encoding.token_to_chars(index) or (0, 0) for index in range(len(encoding))]


def _own_backend(theirs: Tokenizer) -> Tokenizer:
    """A backend with its own settings that shares its parts with `theirs`.

    A copy of the parts takes 12 MB for a vocabulary of 49,152.
    """
    ours = Tokenizer(theirs.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(theirs, part)) is not None:
            setattr(ours, part, value)
    # In order of id: each gets the next free id, as in the original and when loading from a file.
    for _, token in sorted(theirs.get_added_tokens_decoder().items()):
        (ours.add_special_tokens if token.special else ours.add_tokens)([token])
    return ours


def _info(fast: Any) -> dict[str, Any]:
    """Information for clients that render prompts themselves, in the format of vLLM's /tokenizer_info."""
    return {
        "tokenizer_class": type(fast).__name__,
        "bos_token": fast.bos_token,
        "eos_token": fast.eos_token,
        "pad_token": fast.pad_token,
        "unk_token": fast.unk_token,
        "chat_template": fast.chat_template,
    }
