"""Conversations as prompts, by the chat template that comes with the base.

transformers renders it, in its sandbox; no template ever comes from a request. Names of special
tokens inside a message are special tokens, as they are where transformers renders and tokenises a
conversation. Knows no roles and no requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ConversationRefused(ValueError):
    """The template cannot make a prompt of these messages; says why."""


class ChatTemplate:
    """One base's chat template.

    Args:
        fast: a transformers tokenizer that has one.
    """

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    @classmethod
    def of(cls, fast: Any) -> ChatTemplate | None:
        """The template of a tokenizer; None if it has none."""
        return cls(fast) if fast.chat_template else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt of a conversation, its special tokens included: none are to be added to it.

        Args:
            messages: at least one, each with `role` and `content`.
            add_generation_prompt: end where the assistant's next message begins.
            continue_final_message: end inside the last message.

        Raises:
            ConversationRefused: the template does not take these messages.
        """
        try:
            text = self._fast.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        # Whatever a template stumbles over, it is over these messages.
        except Exception as error:
            raise ConversationRefused(str(error) or type(error).__name__) from error
        return str(text)
