"""Whether a prompt looks like those that an adapter was trained on.

Prompts are never changed for it: callers of the generating routes get what they asked for, and a remark.
Knows no route.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from adapters.metadata import AdapterMetadata
from adapters.template import Template
from server.text.chat import ChatTemplate, ConversationRefused

Difference = Literal["template", "white_space", "chat"]

_MARK = "graftwork"


def template_of(adapter: AdapterMetadata) -> Template | None:
    """An adapter's stored template, as it makes prompts; None if it has none."""
    if adapter.template is None:
        return None
    as_written = adapter.tokenization == "as_written"
    return Template.parse(adapter.template, keep_trailing_space=as_written)


class PromptForm:
    """The forms of one base's adapters.

    Args:
        chat_template: the base's; None if it has none.
    """

    def __init__(self, chat_template: ChatTemplate | None) -> None:
        self._chat_template = chat_template

    def difference(self, adapter: AdapterMetadata, text: str) -> Difference | None:
        """How a prompt differs from the adapter's training; None if it does not, or nothing is known.

        Returns:
            "template": it is not in the words of the adapter's template.
            "white_space": it ends with white space, which belongs to the target there.
            "chat": it is no conversation by the base's chat template.
        """
        template = template_of(adapter)
        if template is None:
            by_chat = (adapter.recipe or {}).get("prompts") == "chat"
            return None if not by_chat or self._is_chat(text) else "chat"
        if template.has_words and not template.recognises(text):
            return "template"
        if adapter.tokenization == "boundary" and text != text.rstrip():
            return "white_space"
        return None

    def _is_chat(self, text: str) -> bool:
        return text.rstrip().endswith(self._chat_ending)

    @cached_property
    def _chat_ending(self) -> str:
        """What stands behind the last message of every conversation."""
        if self._chat_template is None:
            return ""
        try:
            rendered = self._chat_template.render([{"role": "user", "content": _MARK}])
        except ConversationRefused:
            return ""
        return rendered.rpartition(_MARK)[2].rstrip()
