"""Replies and events of OpenAI's generation routes, as the dictionaries that are written.

These are TypedDicts, as a model for each token would cost more than its JSON. Knows no route.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from typing_extensions import TypedDict

from server.api.reply_fields import shows

OpenAIFinishReason = Literal["length", "stop"]

COMPLETION_EVENTS = (
    'data: {"id": "cmpl-4f1a", "object": "text_completion", "created": 1795376932, "model": '
    '"complaints", "system_fingerprint": "fp_1a45f6bea123", "choices": [{"index": 0, "text": '
    '" complaint", "logprobs": null, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
)
CHAT_EVENTS = (
    'data: {"id": "chatcmpl-4f1a", "object": "chat.completion.chunk", "created": 1795376932, '
    '"model": "complaints", "system_fingerprint": "fp_1a45f6bea123", "choices": [{"index": 0, '
    '"delta": {"content": "complaint"}, "logprobs": null, "finish_reason": "stop"}]}\n\n'
    "data: [DONE]\n\n"
)


class PromptTokens(TypedDict):
    """What became of the prompt's tokens."""

    cached_tokens: Annotated[int, shows(0, "Their keys and values were in the cache already.")]


class Usage(TypedDict):
    """Tokens of a request; virtual tokens are not among them."""

    prompt_tokens: Annotated[int, shows(9, "Each prompt once.")]
    completion_tokens: Annotated[int, shows(2, "Everything that was drawn.")]
    total_tokens: Annotated[int, shows(11, "The sum of both.")]
    prompt_tokens_details: Annotated[
        PromptTokens, shows({"cached_tokens": 0}, "More on `prompt_tokens`.")
    ]


class CompletionLogprobs(TypedDict):
    """Lists with one entry a token: of the echoed prompt, then of the output."""

    tokens: Annotated[
        list[str], shows([" complaint"], "Texts, or bytes as bytes:\\xe2 of a split character.")
    ]
    token_logprobs: Annotated[
        list[float | None], shows([-0.25], "Raw log-softmax; null for the very first.")
    ]
    top_logprobs: Annotated[
        list[dict[str, float] | None],
        shows([{" complaint": -0.25}], "The likeliest tokens by their texts, this one included."),
    ]
    text_offset: Annotated[list[int], shows([0], "Where each token begins in the text.")]


class CompletionChoice(TypedDict):
    """One output of a prompt."""

    index: Annotated[int, shows(0, "Choices of the first prompt come first.")]
    text: Annotated[str, shows(" complaint", "The output; after the prompt, if echo.")]
    logprobs: Annotated[CompletionLogprobs | None, shows(None, "If logprobs requests them.")]
    finish_reason: Annotated[OpenAIFinishReason | None, shows("stop", "Why it ended.")]


class Envelope(TypedDict):
    """What both routes' replies have around their choices."""

    id: Annotated[str, shows("cmpl-4f1a…", "Of the reply; every chunk of a stream has the same.")]
    created: Annotated[int, shows(1795376932, "Unix time, seconds.")]
    model: Annotated[str, shows("complaints", "The name in the request.")]
    system_fingerprint: Annotated[
        str, shows("fp_1a45f6bea123_6e0e5b0c1d22", "The exact weights: base, adapter.")
    ]


class Completion(Envelope):
    """OpenAI's `text_completion`."""

    object: Annotated[Literal["text_completion"], shows("text_completion", "What this is.")]
    choices: Annotated[list[CompletionChoice], shows([], "n for every prompt.")]
    usage: Annotated[Usage, shows({}, "Tokens.")]


class CompletionChunk(Envelope):
    """The data of one event of a completion's stream; the last data is `[DONE]`."""

    object: Annotated[Literal["text_completion"], shows("text_completion", "What this is.")]
    choices: Annotated[
        list[CompletionChoice], shows([], "What is new; none in the chunk with the usage.")
    ]
    usage: NotRequired[
        Annotated[Usage | None, shows({}, "If stream_options.include_usage requests it.")]
    ]


class NamedLogprob(TypedDict):
    """A token by its text and its bytes."""

    token: Annotated[str, shows(" complaint", "Its text, or its bytes as bytes:\\xe2.")]
    logprob: Annotated[float, shows(-0.25, "Raw log-softmax.")]
    bytes: Annotated[list[int], shows([32, 99], "Its bytes.")]


class ChatLogprob(NamedLogprob):
    """A token of a message."""

    top_logprobs: Annotated[list[NamedLogprob], shows([], "The likeliest tokens here.")]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a message."""

    content: Annotated[list[ChatLogprob], shows([], "One entry a token.")]
    refusal: Annotated[None, shows(None, "Always null.")]


class ChatMessage(TypedDict):
    """What the assistant says."""

    role: Annotated[Literal["assistant"], shows("assistant", "Who speaks.")]
    content: Annotated[str, shows("complaint", "The output.")]
    refusal: Annotated[None, shows(None, "Always null.")]


class ChatChoice(TypedDict):
    """One output."""

    index: Annotated[int, shows(0, "Counts choices from 0.")]
    message: Annotated[ChatMessage, shows({}, "The message.")]
    logprobs: Annotated[ChatLogprobs | None, shows(None, "If logprobs requests them.")]
    finish_reason: Annotated[OpenAIFinishReason, shows("stop", "Why it ended.")]


class ChatCompletion(Envelope):
    """OpenAI's `chat.completion`."""

    object: Annotated[Literal["chat.completion"], shows("chat.completion", "What this is.")]
    choices: Annotated[list[ChatChoice], shows([], "n of them.")]
    usage: Annotated[Usage, shows({}, "Tokens.")]


class ChatDelta(TypedDict):
    """What is new in a message."""

    role: NotRequired[
        Annotated[Literal["assistant"], shows("assistant", "In a choice's first chunk.")]
    ]
    content: NotRequired[Annotated[str, shows("compl", "New text.")]]


class ChatDeltaChoice(TypedDict):
    """What is new in a choice."""

    index: Annotated[int, shows(0, "Which choice.")]
    delta: Annotated[ChatDelta, shows({}, "What is new.")]
    logprobs: Annotated[ChatLogprobs | None, shows(None, "Of the new tokens, if requested.")]
    finish_reason: Annotated[OpenAIFinishReason | None, shows(None, "In a choice's last chunk.")]


class ChatChunk(Envelope):
    """The data of one event of a chat's stream; the last data is `[DONE]`."""

    object: Annotated[
        Literal["chat.completion.chunk"], shows("chat.completion.chunk", "What this is.")
    ]
    choices: Annotated[
        list[ChatDeltaChoice], shows([], "What is new; none in the chunk with the usage.")
    ]
    usage: NotRequired[
        Annotated[Usage | None, shows({}, "If stream_options.include_usage requests it.")]
    ]
