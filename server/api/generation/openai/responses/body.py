"""The body of `/v1/responses`, with vLLM's extensions where the engine has the same.

Text in, text out. Parts of the API that are not supported are refused by their names; hints without
effect here are named in `x-ignored-parameters`. Knows no adapter and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PlainValidator

from server.api.bounds import AtMost
from server.api.error_replies import invalid, quoted
from server.api.generation.openai.bodies import ChatBody, Message, SampledBody
from server.api.openapi.constraints import (
    NO_STRAY_ADAPTERS,
    NOT_BLANK,
    OBJECT,
    SOME_LIST,
    SOME_TEXT,
    TEXT,
    constrained,
    not_both,
    nullable,
    one_of,
)
from server.api.schemas import MAX_TOP_TOKENS, Text
from server.errors import RequestInvalid

_LOGPROBS = "message.output_text.logprobs"
_ROLES = ("system", "developer", "user", "assistant")
_TEXT_PARTS = ("input_text", "output_text", "text")
_PART = 'a text part: {"type": "input_text", "text": ...}'
# Of these not even an empty value means anything here.
_NEVER = ("previous_response_id", "conversation", "prompt")
# Not supported, and what a request has to say instead. Null passes, and elsewhere empty values.
_UNSUPPORTED: Mapping[str, str] = {
    "previous_response_id": "none: responses are not stored; send the earlier messages in input",
    "conversation": "none: conversations are not stored; send the earlier messages in input",
    "prompt": "none: there are no stored prompts; send input",
    "tools": "none: tools are not supported",
    "background": "false: a response is made while the client waits",
    "reasoning": "none: the base does not reason apart from its output",
    "context_management": "none: nothing is left out of the input",
    "moderation": "none: nothing is moderated here",
}


def _item(value: Any) -> Any:
    return value if isinstance(value, str | list | None) else _refuse_input(value)


def _refuse_input(value: Any) -> Any:
    raise ValueError(f"expected a text or a list of messages, came {quoted(value)}")


_Input = Annotated[
    Any,
    AtMost("max_messages"),
    PlainValidator(_item, json_schema_input_type=str | list[dict[str, Any]] | None),
]


_MESSAGE = {
    **OBJECT,
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": [*_ROLES], "description": "Who speaks."},
        "type": {"const": "message", "description": "May be left out."},
        "content": {
            "description": "A text, or a list of text parts.",
            "anyOf": [
                TEXT,
                {
                    **SOME_LIST,
                    "items": {
                        **OBJECT,
                        "required": ["type", "text"],
                        "properties": {
                            "type": {"enum": [*_TEXT_PARTS], "description": "A text."},
                            "text": {**TEXT, "description": "The part's text."},
                        },
                    },
                },
            ],
        },
    },
}
_FORMAT = {
    "description": "How the output is constrained.",
    **nullable(
        {
            **OBJECT,
            "required": ["type"],
            "properties": {
                "type": {
                    "enum": ["text", "json_object", "json_schema"],
                    "description": "With json_schema stands a schema.",
                }
            },
        }
    ),
}


class ResponsesBody(SampledBody):
    """Body of `/v1/responses`."""

    model_config = ConfigDict(
        json_schema_extra=constrained(
            **NO_STRAY_ADAPTERS,
            properties={
                "model": NOT_BLANK,
                "input": nullable(SOME_TEXT, {**SOME_LIST, "items": _MESSAGE}),
                "truncation": {"enum": ["disabled", None]},
                "tool_choice": {"enum": ["auto", "none", None]},
                "tools": {"maxItems": 0},
                "background": {"enum": [False, None]},
                "include": {"items": {"const": _LOGPROBS}},
                "text": {"properties": {"format": _FORMAT}},
                **{name: {"type": "null"} for name in _NEVER},
                "reasoning": nullable({**OBJECT, "additionalProperties": {"enum": [None, "none"]}}),
            },
            allOf=[
                {"anyOf": one_of(input={"type": ["string", "array"]}, row=OBJECT)},
                {"anyOf": not_both("instructions", "row")},
            ],
            examples=[{"model": "complaints", "input": "Late again.", "max_output_tokens": 8}],
        )
    )

    input: _Input = Field(
        None, description="A text, which is one user message, or a list of messages."
    )
    instructions: Text | None = Field(
        None, description="A system message in front of the conversation."
    )
    max_output_tokens: int | None = Field(None, ge=1, description="What fits, if left out.")
    text: dict[str, Any] | None = Field(
        None, description="The output's shape: format is text, json_object or json_schema."
    )
    include: list[str] | None = Field(
        None, description=f"{_LOGPROBS} reports the tokens' log-probabilities; nothing else."
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_TOKENS,
        description="Likeliest tokens to report with each; see include.",
    )
    metadata: dict[str, str] | None = Field(None, description="Returned as it is.")
    truncation: str | None = Field(
        None, description="disabled: an input that is too long is refused."
    )
    tools: list[Any] | None = Field(None, description="Not supported: empty or left out.")
    tool_choice: Any = Field(None, description="Without effect: auto, none or left out.")
    previous_response_id: Any = Field(None, description="Not supported: responses are not stored.")
    conversation: Any = Field(None, description="Not supported: conversations are not stored.")
    prompt: Any = Field(None, description="Not supported: prompts are not stored.")
    reasoning: Any = Field(None, description="Not supported.")
    background: bool | None = Field(None, description="Not supported: false or left out.")
    use_adapter_template: bool | None = Field(
        None,
        description="Whether the adapter's own template makes the prompt, and not the base's chat "
        "template. Left out: where it has one.",
    )

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report with each token; None reports no log-probabilities."""
        return (self.top_logprobs or 0) if _LOGPROBS in (self.include or ()) else None


_SAME_FIELDS = (*SampledBody.model_fields, "use_adapter_template")


def as_chat(body: ResponsesBody) -> ChatBody:
    """The chat that a body describes; `messages` and `row` as they were given.

    Raises:
        RequestInvalid: a part of the API that is not supported, by its name.
    """
    _check_supported(body)
    same = {name: getattr(body, name) for name in _SAME_FIELDS}
    messages = None if body.input is None else _messages(body.input)
    if messages is not None and body.instructions:
        messages = [Message(role="system", content=body.instructions), *messages]
    return ChatBody.model_construct(
        **same, messages=messages, response_format=_response_format(body.text)
    )


def _check_supported(body: ResponsesBody) -> None:
    extra = body.model_extra or {}
    for name, expected in _UNSUPPORTED.items():
        value = getattr(body, name, extra.get(name))
        if name == "reasoning" and value is not None:
            if not isinstance(value, dict):
                raise invalid(name, expected, quoted(value))
            value = {key: one for key, one in value.items() if one not in (None, "none")}
        if value or (name in _NEVER and value is not None):
            raise invalid(name, expected, quoted(value))
    if body.tool_choice not in (None, "auto", "none"):
        raise invalid(
            "tool_choice", "auto or none: tools are not supported", quoted(body.tool_choice)
        )
    if body.truncation not in (None, "disabled"):
        raise invalid(
            "truncation", "disabled: an input that is too long is refused", quoted(body.truncation)
        )
    for number, one in enumerate(body.include or ()):
        if one != _LOGPROBS:
            raise invalid(
                f"include.{number}", f"{_LOGPROBS}, the only part that there is", quoted(one)
            )
    if body.instructions is not None and body.input is None:
        raise invalid(
            "instructions", "none with a row, which the adapter's template renders", "some"
        )


def _response_format(text: dict[str, Any] | None) -> Any:
    """`text.format` as chats have it, whose schema lies one level deeper."""
    given = (text or {}).get("format")
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type") not in (
        "text",
        "json_object",
        "json_schema",
    ):
        expected = "an object whose type is text, json_object or json_schema"
        raise invalid("text.format", expected, quoted(given))
    if given["type"] != "json_schema":
        return {"type": given["type"]}
    if not isinstance(given.get("schema"), dict):
        raise invalid("text.format.schema", "a JSON Schema", quoted(given.get("schema")))
    return {"type": "json_schema", "json_schema": {"schema": given["schema"]}}


def _messages(value: str | list[Any]) -> list[Message]:
    if isinstance(value, str):
        if not _check_text(value, "input"):
            raise invalid("input", "a text of at least one character", "''")
        return [Message(role="user", content=value)]
    if not value:
        raise invalid("input", "a text or at least one message", "an empty list")
    return [_message(one, f"input.{number}") for number, one in enumerate(value)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise invalid(place, 'a message: {"role": ..., "content": ...}', quoted(item))
    kind = item.get("type", "message")
    if kind != "message":
        raise invalid(f"{place}.type", "'message': other items are not supported", quoted(kind))
    role = item.get("role")
    if role not in _ROLES:
        raise invalid(f"{place}.role", f"one of {', '.join(_ROLES)}", quoted(role))
    return Message(role=role, content=_content(item.get("content"), f"{place}.content"))


def _content(value: Any, place: str) -> str:
    if isinstance(value, str):
        return _check_text(value, place)
    if not isinstance(value, list) or not value:
        raise invalid(place, "a text or a list of text parts", quoted(value))
    AtMost("max_messages").checked(value)
    return "".join(_part(one, f"{place}.{number}") for number, one in enumerate(value))


def _part(value: Any, place: str) -> str:
    if not isinstance(value, dict):
        raise invalid(place, _PART, quoted(value))
    if value.get("type") not in _TEXT_PARTS:
        raise invalid(
            f"{place}.type",
            "'input_text': the base reads nothing but text",
            quoted(value.get("type")),
        )
    if not isinstance(value.get("text"), str):
        raise invalid(f"{place}.text", "a text", quoted(value.get("text")))
    return _check_text(value["text"], f"{place}.text")


def _check_text(value: str, place: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestInvalid(
            f"{place}: expected text, came a lone surrogate",
            field=place,
            expected="text",
            came="a lone surrogate",
        ) from None
    return value
