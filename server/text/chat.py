"""Renders conversations to prompts with the base's chat template.

transformers renders the template in its sandbox; requests cannot supply templates. Names of special tokens
inside a message become special tokens, as when transformers renders and tokenises a conversation.
Independent of roles and requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ConversationRefused(ValueError):
    """The template cannot render these messages; the message gives the reason."""


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
        """Render the prompt of a conversation, including special tokens; add none when encoding it.

        Args:
            messages: at least one, each with `role` and `content`.
            add_generation_prompt: end where the assistant's next message starts.
            continue_final_message: end inside the last message.

        Raises:
            ConversationRefused: the template does not accept these messages.
        """
        try:
            text = self._fast.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        # Any exception of the template is caused by these messages.
        except Exception as error:
            raise ConversationRefused(str(error) or type(error).__name__) from error
        return str(text)
