"""The tokenizer interface that training needs. `server.text.tokenizer` implements it."""

from __future__ import annotations

from typing import Protocol


class Encoder(Protocol):
    """Text to token ids, with the characters that each token covers.

    Attributes:
        eos_token_id: the end-of-sequence token that targets end with; None if there is none.
    """

    eos_token_id: int | None

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool, plain: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids (n,) and half-open character ranges (n,).

        Args:
            text: any string.
            add_special_tokens: add the tokenizer's special tokens (such as BOS), with an empty range.
            plain: treat names of special tokens in `text` as plain text, as for data; otherwise they
                become those tokens, as in a prompt rendered by a chat template.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; it may begin or end inside a character."""
        ...
