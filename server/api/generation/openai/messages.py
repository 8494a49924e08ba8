"""Messages as a prompt: by the base's chat template, or as the one text an adapter's template takes.

A list of text parts is their texts one after another. The role `developer` is the newer name of
`system`, and the base's template sees that one. Knows no options and no reply.
"""

from __future__ import annotations

from collections.abc import Sequence

from adapters.template import Template
from server.api.error_replies import invalid, quoted
from server.api.generation.openai.bodies import Message, TextPart
from server.api.generation.openai.prompts import Given, from_row
from server.api.schemas import BodyRow
from server.errors import RequestInvalid
from server.generation.generator import Generator
from server.store.registry import AdapterRecord
from server.text.chat import ConversationRefused
from server.text.tokenizer import TextTokenizer

_CALLS = ("tool_calls", "function_call")
_INSTEAD = 'send "use_adapter_template": false for the base\'s chat template'


def render_chat(
    tokenizer: TextTokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    field: str = "messages",
) -> str:
    """The prompt that the base's chat template makes, its special tokens included.

    Args:
        tokenizer: the base's.
        messages: the conversation.
        add_generation_prompt: see `ChatTemplate.render`.
        continue_final_message: see `ChatTemplate.render`.
        field: what the route calls the messages.

    Raises:
        RequestInvalid: the base has no template, or it does not take these messages.
    """
    template = tokenizer.chat_template
    if template is None:
        raise RequestInvalid(
            f"{field}: the base has no chat template; send the prompt to /v1/completions, or name "
            "an adapter that has a template of its own",
            field=field,
            expected="a base with a chat template",
            came="a base without one",
        )
    conversation = [_plain(message, number) for number, message in enumerate(messages)]
    if not conversation:
        raise invalid(field, "at least one message", "none")
    try:
        return template.render(
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
    except ConversationRefused as error:
        raise RequestInvalid(
            f"{field}: the base's chat template does not take these: {error}",
            field=field,
            expected="messages that the base's chat template takes",
            came=str(error),
        ) from error


def row_of(messages: Sequence[Message], record: AdapterRecord, field: str = "messages") -> BodyRow:
    """The row for an adapter's own template that needs one column: what the one user message says.

    Args:
        messages: the conversation.
        record: of an adapter with a template.
        field: what the route calls the messages.

    Raises:
        RequestInvalid: the template has another number of columns, or there are other messages.
    """
    template = Template.parse(record.template or "")
    columns, column = template.columns, template.sole_column
    if column is None:
        names = ", ".join(repr(name) for name in columns) or "none"
        raise RequestInvalid(
            f"{field}: the template of the adapter {record.name!r} takes the columns {names}, and "
            f'a message fills one; send "row": {{column: value}} without {field}, or {_INSTEAD}',
            field=field,
            expected="a row",
            came=field,
        )
    if len(messages) != 1 or messages[0].role != "user":
        came = ", ".join(message.role for message in messages[:10]) or "none"
        raise RequestInvalid(
            f"{field}: the adapter {record.name!r} has a template of its own, which one user message "
            f"fills; came: {came}. Send that message alone, or {_INSTEAD}",
            field=field,
            expected="one user message",
            came=came,
        )
    return {column: text_of(messages[0], 0)}


async def conversation_prompt(
    generator: Generator,
    messages: Sequence[Message],
    record: AdapterRecord | None,
    *,
    use_adapter_template: bool | None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    field: str = "messages",
) -> Given:
    """A conversation's prompt, by the adapter's own template or else the base's chat template.

    Args:
        generator: encodes it.
        messages: the conversation.
        record: the adapter; None is the base.
        use_adapter_template: None uses it where there is one.
        add_generation_prompt: see `ChatTemplate.render`.
        continue_final_message: see `ChatTemplate.render`.
        field: what the route calls the messages.

    Raises:
        RequestInvalid: the template does not take these messages, or there is none.
        TooLong: more characters than may be tokenised.
    """
    if templates_chats(record) and record is not None and use_adapter_template is not False:
        return await from_row(generator, row_of(messages, record, field), record)
    text = await generator.run_aside(
        lambda: render_chat(
            generator.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            field=field,
        )
    )
    # The template has written what special tokens there are.
    return Given(await generator.encode(text, add_special_tokens=False, field=field), "chat")


def templates_chats(record: AdapterRecord | None) -> bool:
    """Whether a conversation with it is rendered by a template of its own."""
    return record is not None and record.template is not None


def text_of(message: Message, number: int) -> str:
    """A message's text; `number` counts messages from 0.

    Raises:
        RequestInvalid: no content, or content that is not text.
    """
    place = f"messages.{number}"
    for name in _CALLS:
        if (message.model_extra or {}).get(name):
            raise invalid(f"{place}.{name}", "none: tools are not supported", "a call")
    if message.content is None:
        raise invalid(f"{place}.content", "a text or a list of text parts", "nothing")
    if isinstance(message.content, str):
        return message.content
    return "".join(
        _part_text(part, f"{place}.content.{index}") for index, part in enumerate(message.content)
    )


def _part_text(part: TextPart, place: str) -> str:
    if part.type != "text":
        raise invalid(f"{place}.type", "'text': the base reads nothing else", quoted(part.type))
    if part.text is None:
        raise invalid(f"{place}.text", "a text", "nothing")
    return part.text


def _plain(message: Message, number: int) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    plain = {"role": role, "content": text_of(message, number)}
    return plain if message.name is None else {**plain, "name": message.name}
