"""What training must know of a tokenizer. Implemented outside; `server.text.tokenizer` fits."""

from __future__ import annotations

from typing import Protocol


class Encoder(Protocol):
    """Text to token ids, with the characters that each token covers.

    Attributes:
        eos_token_id: the end-of-sequence token that targets end with; None where there is none.
    """

    eos_token_id: int | None

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool, plain: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids (n,) and half-open character ranges (n,).

        Args:
            text: any string.
            add_special_tokens: add what the tokenizer adds to a text (a BOS token, for some), with an
                empty range.
            plain: take names of special tokens inside `text` as plain text, as data is; else they are
                those tokens, as in a prompt that a chat template made.
        """
        ...
