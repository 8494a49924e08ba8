"""One line of OpenAI's chat form as turns to learn: what stands before an assistant's text, and it.

The base's chat template makes the prompt, as it does for `/v1/chat/completions`. Every assistant message
is learned, unless its `weight` is 0. Knows no files, and of rows only their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pydantic import ValidationError

from adapters.errors import DataInvalid
from server.api.error_replies import describe_validation, quoted
from server.api.generation.openai.bodies import Message
from server.api.generation.openai.messages import render_chat, text_of
from server.errors import RequestInvalid
from server.text.tokenizer import TextTokenizer

MESSAGES = "messages"
# What may stand beside the messages, and would change what the template makes of them.
_TOOLS = ("tools", "functions")
_ROLES = ("system", "developer", "user", "assistant")


class Turn(NamedTuple):
    """A prompt as the chat template makes it, and the assistant's text."""

    prompt: str
    answer: str


def turns(line: dict[str, Any], place: str, row: int, tokenizer: TextTokenizer) -> Iterator[Turn]:
    """What a line has to learn, in its order.

    Args:
        line: as it was read.
        place: where it stands, for messages.
        row: number of the row that its first turn becomes.
        tokenizer: the base's, which has a chat template.

    Raises:
        DataInvalid: it is no conversation that ends with an assistant's text, the template does not
            take it, or it has tools.
    """
    messages = [
        _message(one, number, place, row) for number, one in enumerate(_list_of(line, place, row))
    ]
    if messages[-1].role != "assistant":
        raise _wrong(place, row, "an assistant's message at the end", f"a {messages[-1].role}'s")
    learned = 0
    for number, message in enumerate(messages):
        if message.role != "assistant" or _weight(message, number, place, row) == 0:
            continue
        with _naming_place(place, row):
            answer = text_of(message, number)
            prompt = render_chat(tokenizer, messages[:number]) if number else ""
        if not answer or not prompt:
            expected = (
                "the assistant's text" if prompt else "a message before the assistant's first"
            )
            raise _wrong(f"{place}, {MESSAGES}.{number}", row, expected, "none")
        learned += 1
        yield Turn(prompt, answer)
    if not learned:
        raise _wrong(place, row, "an assistant's message of weight 1", "weight 0 only")


def _list_of(line: dict[str, Any], place: str, row: int) -> list[Any]:
    for name in _TOOLS:
        if line.get(name):
            raise _wrong(place, row, f"no {name}: they are not supported", name)
    found = line.get(MESSAGES)
    if not isinstance(found, list) or not found:
        raise _wrong(place, row, "a list of messages under 'messages'", quoted(found))
    return found


def _message(value: Any, number: int, place: str, row: int) -> Message:
    if not isinstance(value, dict):
        expected = "an object with role and content"
        raise _wrong(f"{place}, {MESSAGES}.{number}", row, expected, quoted(value))
    if value.get("role") not in _ROLES:
        expected, came = f"one of {', '.join(_ROLES)}", quoted(value.get("role"))
        raise _wrong(f"{place}, {MESSAGES}.{number}.role", row, expected, came)
    try:
        return Message.model_validate(value)
    except ValidationError as error:
        report = describe_validation(error.errors(include_url=False))
        at = ".".join(part for part in (MESSAGES, str(number), report.field) if part)
        raise _wrong(f"{place}, {at}", row, str(report.expected), str(report.came)) from error


def _weight(message: Message, number: int, place: str, row: int) -> int:
    weight = (message.model_extra or {}).get("weight", 1)
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _wrong(f"{place}, {MESSAGES}.{number}.weight", row, "0 or 1", quoted(weight))
    return int(weight)


@contextmanager
def _naming_place(place: str, row: int) -> Iterator[None]:
    """Refusals of a request's messages become those of a line."""
    try:
        yield
    except RequestInvalid as error:
        raise DataInvalid(
            f"{place}, {error.message}",
            row=row,
            field=place,
            expected=error.expected,
            came=error.came,
        ) from error


def _wrong(place: str, row: int, expected: str, came: str) -> DataInvalid:
    return DataInvalid(
        f"{place}: expected {expected}; came {came}",
        row=row,
        field=place,
        expected=expected,
        came=came,
    )
