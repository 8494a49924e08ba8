"""Responses and their events, as the dictionaries that are written. Knows no route."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from server.api.generation.openai.openai_types import ChatLogprob
from server.api.reply_fields import shows

Status = Literal["in_progress", "completed", "incomplete", "failed"]

EXAMPLE_EVENTS = (
    'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", '
    '"sequence_number": 4, "item_id": "msg_4f1a", "output_index": 0, "content_index": 0, '
    '"delta": " complaint", "logprobs": []}\n\n'
)


class OutputText(TypedDict):
    """A text of a message."""

    type: Annotated[Literal["output_text"], shows("output_text", "What this is.")]
    text: Annotated[str, shows(" complaint", "The text.")]
    annotations: Annotated[list[Any], shows([], "Always empty.")]
    logprobs: Annotated[list[ChatLogprob], shows([], "One entry a token, if include asks for it.")]


class OutputMessage(TypedDict):
    """The one item of an output."""

    id: Annotated[str, shows("msg_4f1a", "Of the message.")]
    type: Annotated[Literal["message"], shows("message", "What this is.")]
    role: Annotated[Literal["assistant"], shows("assistant", "Who speaks.")]
    status: Annotated[Status, shows("completed", "Whether it is whole.")]
    content: Annotated[list[OutputText], shows([], "One text.")]


class InputTokensDetails(TypedDict):
    """What became of the prompt's tokens."""

    cached_tokens: Annotated[int, shows(0, "Their keys and values were in the cache already.")]
    cache_write_tokens: Annotated[int, shows(0, "Always 0.")]


class OutputTokensDetails(TypedDict):
    """Parts of the output."""

    reasoning_tokens: Annotated[int, shows(0, "Always 0.")]


class ResponseUsage(TypedDict):
    """Tokens of a response; virtual tokens are not among them."""

    input_tokens: Annotated[int, shows(9, "Of the prompt.")]
    input_tokens_details: Annotated[InputTokensDetails, shows({}, "More on them.")]
    output_tokens: Annotated[int, shows(2, "Everything that was drawn.")]
    output_tokens_details: Annotated[OutputTokensDetails, shows({}, "More on them.")]
    total_tokens: Annotated[int, shows(11, "The sum of both.")]


class FailedWhy(TypedDict):
    """Why a response failed."""

    code: Annotated[str, shows("server_error", "OpenAI's coarse category.")]
    message: Annotated[str, shows("the engine failed", "One sentence.")]


class IncompleteWhy(TypedDict):
    """Why a response is not whole."""

    reason: Annotated[
        Literal["max_output_tokens"], shows("max_output_tokens", "The limit that was reached.")
    ]


class ResponseObject(TypedDict):
    """OpenAI's `response`."""

    id: Annotated[str, shows("resp_4f1a", "Of the response; it cannot be fetched by it.")]
    object: Annotated[Literal["response"], shows("response", "What this is.")]
    created_at: Annotated[int, shows(1795376932, "Unix time, seconds.")]
    completed_at: Annotated[int | None, shows(1795376933, "Unix time, seconds.")]
    status: Annotated[Status, shows("completed", "How it ended, or that it goes on.")]
    error: Annotated[FailedWhy | None, shows(None, "Why it failed.")]
    incomplete_details: Annotated[IncompleteWhy | None, shows(None, "Why it is not whole.")]
    instructions: Annotated[str | None, shows(None, "As in the request.")]
    max_output_tokens: Annotated[int | None, shows(None, "As in the request.")]
    metadata: Annotated[dict[str, str], shows({}, "As in the request.")]
    model: Annotated[str, shows("complaints", "The name in the request.")]
    output: Annotated[list[OutputMessage], shows([], "One message, once there is one.")]
    parallel_tool_calls: Annotated[bool, shows(True, "Without effect.")]
    previous_response_id: Annotated[None, shows(None, "Always null.")]
    store: Annotated[Literal[False], shows(False, "Always false: responses are not stored.")]
    temperature: Annotated[float, shows(1.0, "As it was used.")]
    text: Annotated[dict[str, Any], shows({"format": {"type": "text"}}, "As in the request.")]
    tool_choice: Annotated[str, shows("auto", "Without effect.")]
    tools: Annotated[list[Any], shows([], "Always empty.")]
    top_logprobs: Annotated[int, shows(0, "As in the request.")]
    top_p: Annotated[float, shows(1.0, "As it was used.")]
    truncation: Annotated[Literal["disabled"], shows("disabled", "Always disabled.")]
    usage: Annotated[ResponseUsage | None, shows(None, "Tokens, once it has ended.")]


class ResponseEvent(TypedDict):
    """The data of one event; which fields there are follows from its type."""

    type: Annotated[str, shows("response.output_text.delta", "What happened.")]
    sequence_number: Annotated[int, shows(4, "Counts the events of a stream from 0.")]
    response: NotRequired[Annotated[ResponseObject, shows({}, "The response as it is now.")]]
    output_index: NotRequired[Annotated[int, shows(0, "Always 0.")]]
    content_index: NotRequired[Annotated[int, shows(0, "Always 0.")]]
    item_id: NotRequired[Annotated[str, shows("msg_4f1a", "Of the message.")]]
    item: NotRequired[Annotated[OutputMessage, shows({}, "The message as it is now.")]]
    part: NotRequired[Annotated[OutputText, shows({}, "The text as it is now.")]]
    delta: NotRequired[Annotated[str, shows(" complaint", "New text.")]]
    text: NotRequired[Annotated[str, shows(" complaint", "The whole text.")]]
    logprobs: NotRequired[
        Annotated[list[ChatLogprob], shows([], "Of the new tokens, if include asks for it.")]
    ]
    code: NotRequired[Annotated[str, shows("engine_unavailable", "Of an error.")]]
    message: NotRequired[Annotated[str, shows("the engine ended", "Of an error.")]]
    param: NotRequired[Annotated[str | None, shows(None, "Of an error.")]]
    error: NotRequired[Annotated[dict[str, Any], shows({}, "The same as other routes write it.")]]
