"""Bodies of OpenAI's generation routes, with vLLM's extensions where the engine has the same.

Unknown fields are taken, and named in `x-ignored-parameters`. A null means the same as a field left
out. Nothing here knows the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator

from server.api.bounds import AtMost
from server.api.openapi.constraints import (
    CLOSED,
    NO_STRAY_ADAPTERS,
    NOT_BLANK,
    NULL,
    OBJECT,
    SOME_LIST,
    SOME_TEXT,
    TYPED,
    constrained,
    either,
    nullable,
    one_of,
    only_with,
)
from server.api.schemas import MAX_TOP_TOKENS, BodyRow, OpenBody, StopString, Text

DEFAULT_MAX_TOKENS = 16

PromptInput: TypeAlias = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
_PROMPTS = "a text, a list of texts, a list of token ids or a list of such lists"


def _check_prompt(value: Any) -> Any:
    """One sentence of refusal, where a union of types would report each of its members."""
    if value is None or _is_text(value) or _is_ids(value):
        return value
    AtMost("max_sequences").checked(value)
    if (
        isinstance(value, list)
        and value
        and (all(map(_is_text, value)) or all(map(_is_ids, value)))
    ):
        return value
    raise ValueError(f"expected {_PROMPTS}")


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("expected text, came a lone surrogate") from None
    return True


def _is_ids(value: Any) -> bool:
    # A bool is an int to Python, and no token.
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    return [one for one in value if one is not None] if isinstance(value, list) else value


_Prompt = Annotated[
    Any,
    PlainValidator(
        _check_prompt,
        json_schema_input_type=str | list[str] | list[int] | list[list[int]] | None,
    ),
]
Stops = Annotated[
    list[StopString] | None,
    AtMost("max_stops"),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str | None] | None),
]
_Bias = Annotated[float, Field(ge=-100, le=100)]


_STOP = {"type": "string", "minLength": 1, "maxLength": 1000}
_IDS = {**SOME_LIST, "items": {"type": "integer", "minimum": 0}}
_OBJECT_OR_NULL = {"type": ["object", "null"]}
_NOT_SET = {"enum": [False, None]}
# What the types of these fields cannot say.
_FIELDS: dict[str, Any] = {
    "model": NOT_BLANK,
    "stop": nullable(_STOP, {"type": "array", "maxItems": 16, "items": nullable(_STOP)}),
    "logit_bias": {"propertyNames": {"pattern": "^[0-9]{1,9}$"}},
    "guided_choice": nullable({**SOME_LIST, "items": SOME_TEXT, "maxItems": 1000}),
    "guided_json": nullable(OBJECT, {**SOME_TEXT, "contentMediaType": "application/json"}),
    "guided_regex": nullable({**SOME_TEXT, "format": "regex", "maxLength": 4096}),
    "response_format": {**_OBJECT_OR_NULL, **TYPED},
    "structured_outputs": {
        **_OBJECT_OR_NULL,
        **CLOSED,
        "minProperties": 1,
        "properties": {
            "json": {"description": "A JSON Schema, or the text of one."},
            "json_object": {"type": ["boolean", "null"], "description": "Any object."},
            "regex": {"type": ["string", "null"], "description": "What the output matches."},
            "choice": {"type": ["array", "null"], "description": "Texts, one of which it is."},
        },
    },
}
_STREAM_OPTIONS = only_with({"stream": {"const": True}}, "stream_options")
_NO_TOOLS = either(
    {"tool_choice": {"const": "none"}},
    {"tool_choice": {"enum": ["auto", None]}, "tools": {"maxItems": 0}},
)


class StreamOptions(OpenBody):
    """What a stream carries besides the output."""

    include_usage: bool | None = Field(
        None, description="Count tokens in a last chunk of its own, without choices."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="vLLM's: with include_usage, count in every chunk."
    )


class SampledBody(OpenBody):
    """What every route that samples takes."""

    model: Text = Field(description="The base, or an adapter: NAME, NAME@VERSION or NAME@ALIAS.")
    row: BodyRow | None = Field(
        None, description="Columns for the adapter's stored template, in place of a prompt."
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken from a token's logit for each time it was put out."
    )
    ignore_eos: bool | None = Field(None, description="vLLM's: go on to the limit regardless.")
    min_p: float | None = Field(None, ge=0, lt=1, description="vLLM's.")
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Taken from the logit of every token that was put out."
    )
    repetition_penalty: float | None = Field(None, gt=0, description="vLLM's.")
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="Of the draws; sample i of a prompt draws with seed + i. Left out, one is drawn.",
    )
    stop: Stops = Field(None, description="Texts that end the output; they are not part of it.")
    stream: bool | None = Field(
        None, description="Answer as server-sent events; false if left out."
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="0 takes the likeliest token. Left out: the adapter's default_temperature, which "
        "is 0 if it has labels; else 1.",
    )
    top_k: int | None = Field(None, ge=-1, description="vLLM's; 0 and -1 keep every token.")
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the likeliest tokens that together have this probability.",
    )


class OpenAIBody(SampledBody):
    """What completions and chats take."""

    guided_choice: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="vLLM's: one of these texts."
    )
    guided_json: Any = Field(None, description="vLLM's: a JSON Schema, or the text of one.")
    guided_regex: str | None = Field(None, description="vLLM's: the whole output matches it.")
    include_stop_str_in_output: bool | None = Field(
        None, description="vLLM's: leave the stop string that ended the output in it."
    )
    logit_bias: Annotated[dict[Text, _Bias], AtMost("max_logit_biases", "object")] | None = Field(
        None,
        description="Token ids, as texts, with what is added to their logits.",
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="Newer name of max_tokens.")
    n: int | None = Field(None, ge=1, description="Outputs a prompt; 1 if left out.")
    response_format: Any = Field(
        None, description="OpenAI's object: text, json_object or json_schema."
    )
    stream_options: StreamOptions | None = Field(
        None, description="What a stream carries besides the output."
    )
    structured_outputs: Any = Field(
        None, description="vLLM's object with json, json_object, regex or choice."
    )
    typical_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Keep the most typical tokens that together have this probability.",
    )


class CompletionBody(OpenAIBody):
    """Body of `/v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra=constrained(
            **NO_STRAY_ADAPTERS,
            properties={
                **_FIELDS,
                "prompt": nullable(
                    SOME_TEXT, {**SOME_LIST, "items": SOME_TEXT}, _IDS, {**SOME_LIST, "items": _IDS}
                ),
                "suffix": NULL,
            },
            allOf=[
                {"anyOf": one_of(prompt={"type": ["string", "array"]}, row=OBJECT)},
                either({"echo": {"const": True}}, {"max_tokens": {"minimum": 1}}),
                _STREAM_OPTIONS,
            ],
            examples=[
                {
                    "model": "complaints",
                    "prompt": "Tweet text : Late again. Label :",
                    "max_tokens": 8,
                }
            ],
        )
    )

    prompt: _Prompt = Field(None, description=f"{_PROMPTS[0].upper()}{_PROMPTS[1:]}.")
    best_of: int | None = Field(
        None,
        ge=1,
        description="Sample so many a prompt and return the n with the best mean logprob.",
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_TOKENS, description="Likeliest tokens to report with each token."
    )
    max_tokens: int | None = Field(
        None,
        ge=0,
        description=f"{DEFAULT_MAX_TOKENS} if left out; 0 together with echo reports the prompt alone.",
    )
    suffix: Text | None = Field(None, description="Not supported: the base only goes forward.")


class TextPart(OpenBody):
    """A part of a message; only texts are understood."""

    type: str = Field(description="text; nothing else is read.")
    text: Text | None = Field(None, description="The part's text.")


def _check_content(value: Any) -> Any:
    if value is None or _is_text(value):
        return value
    if not isinstance(value, list):
        raise ValueError("expected a text or a list of parts")
    AtMost("max_messages").checked(value)
    return [_read_part(part, number) for number, part in enumerate(value)]


def _read_part(value: Any, number: int) -> TextPart:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError(f'expected {{"type": "text", "text": ...}} as part {number}')
    text = value.get("text")
    if text is not None and not _is_text(text):
        raise ValueError(f"expected a text as part {number}'s text")
    return TextPart(type=value["type"], text=text)


_Content = Annotated[
    str | list[TextPart] | None,
    PlainValidator(_check_content, json_schema_input_type=str | list[TextPart] | None),
]


class Message(OpenBody):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Who speaks; developer is the newer name of system."
    )
    content: _Content = Field(None, description="A text, or a list of text parts.")
    name: Text | None = Field(None, description="Passed to the base's chat template.")


class ChatBody(OpenAIBody):
    """Body of `/v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra=constrained(
            **NO_STRAY_ADAPTERS,
            properties={**_FIELDS, "chat_template": NULL},
            allOf=[
                {"anyOf": one_of(messages=SOME_LIST, row=OBJECT)},
                either({"logprobs": {"const": True}}, {"top_logprobs": {"enum": [0, None]}}),
                {
                    "anyOf": [
                        {"properties": {"continue_final_message": _NOT_SET}},
                        {"properties": {"add_generation_prompt": _NOT_SET}},
                    ]
                },
                _NO_TOOLS,
                _STREAM_OPTIONS,
            ],
            examples=[
                {"model": "complaints", "messages": [{"role": "user", "content": "Late again."}]}
            ],
        )
    )

    messages: Annotated[list[Message], Field(fail_fast=True), AtMost("max_messages")] | None = (
        Field(None, description="The conversation so far.")
    )
    add_generation_prompt: bool | None = Field(
        None, description="vLLM's: end the prompt where the assistant begins; true if left out."
    )
    chat_template: Any = Field(None, description="Refused: templates come with the base only.")
    continue_final_message: bool | None = Field(
        None, description="vLLM's: the output goes on with the last message."
    )
    logprobs: bool | None = Field(None, description="Report the tokens' log-probabilities.")
    max_tokens: int | None = Field(None, ge=1, description="What fits, if left out.")
    tool_choice: Any = Field(None, description='Tools are not supported: "none" or left out.')
    tools: list[Any] | None = Field(None, description="Not supported: empty or left out.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_TOKENS, description="Likeliest tokens to report; needs logprobs."
    )
    use_adapter_template: bool | None = Field(
        None,
        description="Whether the adapter's own template makes the prompt, and not the base's chat "
        "template. Left out: where it has one.",
    )
