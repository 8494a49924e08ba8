"""Incremental detokenization, one token at a time.

A token does not map to text independently: it may hold part of a UTF-8 character, and some tokenizers
decode the first token of a text differently (they drop its leading space). A few preceding tokens are
therefore decoded together with the new one, and text that ends inside a character is held back.
Independent of stop strings and requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "�"
# A UTF-8 character has at most four bytes, hence at most four tokens. If four tokens have not completed
# one, the bytes are not UTF-8 and there is nothing to wait for.
_MAX_TOKENS_PER_CHARACTER = 4
_CONTEXT_TOKENS = 6


class IncrementalDetokenizer:
    """Turns one sequence's new tokens into append-only text.

    Args:
        decode: ids -> text, special tokens included, invalid bytes replaced by U+FFFD.
        context_ids: the ids before the output, normally the prompt; the last few suffice.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], context_ids: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        # The decoded window: ids[:_num_context] were emitted before and are context.
        self._ids = list(context_ids[-_CONTEXT_TOKENS:])
        self._num_context = len(self._ids)
        # Characters of the window's text that were emitted or belong to the context.
        self._num_given = len(decode(self._ids)) if self._ids else 0

    def feed(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if not text.endswith(REPLACEMENT):
            piece = text[self._num_given :]
            self._advance()
            return piece
        if len(self._ids) - self._num_context <= _MAX_TOKENS_PER_CHARACTER:
            return ""
        # Only the last replacement character can still change.
        end = len(text) - 1
        piece = text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece

    def flush(self) -> str:
        """The held-back text when the output ends, with an incomplete character replaced."""
        if len(self._ids) == self._num_context:
            return ""
        piece = self._decode(self._ids)[self._num_given :]
        self._advance()
        return piece

    def _advance(self) -> None:
        # A fixed number of the newest tokens suffices and keeps the cost constant.
        self._ids = self._ids[self._num_context :][-_CONTEXT_TOKENS:] or self._ids
        self._num_context = len(self._ids)
        self._num_given = len(self._decode(self._ids))
