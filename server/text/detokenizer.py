"""Token ids back to text, one token at a time.

A token is not a piece of text: it may hold a part of a UTF-8 character, and some tokenizers decode
the first token of a text differently (they drop its leading space). So a few tokens that came
before are decoded along with the new one, and text that ends inside a character is held back.
Knows nothing of stop strings or of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "�"
# A UTF-8 character has at most four bytes, thus at most four tokens: when so many have not
# completed one, the bytes are not UTF-8 and waiting longer would be in vain.
_MAX_TOKENS_PER_CHARACTER = 4
_CONTEXT_TOKENS = 6


class IncrementalDetokenizer:
    """Turns one sequence's new tokens into text that only ever grows.

    Args:
        decode: ids -> text, invalid bytes replaced by U+FFFD (special tokens are kept by it).
        context_ids: what stands before the output, normally the prompt; its last few ids suffice.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], context_ids: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        # The window that is decoded: ids[:_num_context] were given out before and are context.
        self._ids = list(context_ids[-_CONTEXT_TOKENS:])
        self._num_context = len(self._ids)
        # Characters of the window's text that were given out, or belong to the context.
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
        # Only the last replacement character can still become something else.
        end = len(text) - 1
        piece = text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece

    def flush(self) -> str:
        """The text still held back when the output ends, an incomplete character replaced."""
        if len(self._ids) == self._num_context:
            return ""
        piece = self._decode(self._ids)[self._num_given :]
        self._advance()
        return piece

    def _advance(self) -> None:
        # One context's worth of the newest tokens is enough, and keeps the cost constant.
        self._ids = self._ids[self._num_context :][-_CONTEXT_TOKENS:] or self._ids
        self._num_context = len(self._ids)
        self._num_given = len(self._decode(self._ids))
