"""Log-probabilities in OpenAI's two shapes: lists beside one another for completions, a list of
objects for chat.

A token goes by its text; one that holds a part of a character goes by its bytes ("bytes:\\xe2"),
so that no two of them look alike. Numbers are the raw log-softmax, before any penalty or bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from server.api.generation.openai.openai_types import (
    ChatLogprobs,
    CompletionLogprobs,
    NamedLogprob,
)
from server.engine.request import TokenLogprob
from server.generation.generator import Piece
from server.text.tokenizer import TextTokenizer

# JSON has no infinity; OpenAI's own API writes this for what cannot be.
_LEAST = -9999.0


@dataclass
class LogprobLists:
    """Log-probabilities of a completion, or of a part of it in a stream.

    Every list has one entry a token: of the echoed prompt, then of the output.
    """

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add_prompt(
        self,
        tokenizer: TextTokenizer,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob | None],
        offsets: Sequence[int],
    ) -> None:
        """Add an echoed prompt; its first token has no log-probability."""
        for token_id, logprob, offset in zip(token_ids, logprobs, offsets, strict=True):
            self._add(tokenizer, token_id, logprob, offset)

    def add_output(self, tokenizer: TextTokenizer, pieces: Iterable[Piece], start: int) -> None:
        """Add new tokens; `start` is where the output begins in the text."""
        for piece in pieces:
            self._add(tokenizer, piece.token_id, piece.logprob, start + piece.offset)

    def as_json(self) -> CompletionLogprobs:
        """The object that stands under `logprobs`."""
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }

    def _add(
        self, tokenizer: TextTokenizer, token_id: int, logprob: TokenLogprob | None, offset: int
    ) -> None:
        self.tokens.append(token_name(tokenizer, token_id))
        self.text_offset.append(offset)
        if logprob is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        self.token_logprobs.append(_finite(logprob.logprob))
        top: dict[str, float] = {}
        # The token itself is always there. Of two that look alike the likelier stays.
        for other, value in (*logprob.top, (token_id, logprob.logprob)):
            top.setdefault(token_name(tokenizer, other), _finite(value))
        self.top_logprobs.append(top)


def chat_logprobs(tokenizer: TextTokenizer, pieces: Iterable[Piece], num_top: int) -> ChatLogprobs:
    """The object that stands under a chat choice's `logprobs`."""
    return {
        "content": [
            {
                **_named(tokenizer, piece.token_id, piece.logprob.logprob),
                "top_logprobs": [_named(tokenizer, *one) for one in piece.logprob.top[:num_top]],
            }
            for piece in pieces
            if piece.logprob is not None
        ],
        "refusal": None,
    }


def token_name(tokenizer: TextTokenizer, token_id: int) -> str:
    """A token's text, or its bytes where they are not whole characters."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _named(tokenizer: TextTokenizer, token_id: int, logprob: float) -> NamedLogprob:
    return {
        "token": token_name(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
