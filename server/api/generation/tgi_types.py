"""Replies and events of TGI's routes, as the dictionaries that are written.

These are TypedDicts, as a model for each token would cost more than its JSON. Knows no route.
"""

from __future__ import annotations

from typing import Annotated, NotRequired

from typing_extensions import TypedDict

from server.api.reply_fields import shows
from server.generation.generator import FinishReason

EXAMPLE_EVENTS = (
    'data: {"index": 1, "token": {"id": 253, "text": " complaint", "logprob": -0.25, '
    '"special": false}, "generated_text": " complaint", "details": null}\n\n'
)


class Alternative(TypedDict):
    """A likely token in the place of one of the output."""

    id: Annotated[int, shows(253, "Id in the vocabulary.")]
    text: Annotated[str, shows(" complaint", "The token's text.")]
    logprob: Annotated[float, shows(-0.25, "Raw log-softmax, before any penalty.")]
    special: Annotated[bool, shows(False, "Whether it is a special token.")]


class Token(TypedDict):
    """One token of an output."""

    id: Annotated[int, shows(253, "Id in the vocabulary.")]
    text: Annotated[
        str, shows(" complaint", "Text that it adds to the output; empty inside a character.")
    ]
    logprob: Annotated[float | None, shows(-0.25, "Raw log-softmax, before any penalty.")]
    special: Annotated[
        bool, shows(False, "Whether it is a special token, which is no part of the output.")
    ]
    alternative_tokens: NotRequired[
        Annotated[
            list[Alternative],
            shows([], "The likeliest tokens here, if return_k_alternatives requests them."),
        ]
    ]


class PrefillToken(TypedDict):
    """One token of a prompt; virtual tokens never appear."""

    id: Annotated[int, shows(19161, "Id in the vocabulary.")]
    text: Annotated[str, shows("Tweet", "The token's text.")]
    logprob: Annotated[
        float | None, shows(-3.5, "Of this token after those before it; null for the first.")
    ]


class Details(TypedDict):
    """Details of one output."""

    finish_reason: Annotated[FinishReason, shows("eos_token", "Why it ended.")]
    prompt_tokens: Annotated[int, shows(9, "Tokens of the prompt, without virtual ones.")]
    generated_tokens: Annotated[
        int, shows(2, "Tokens of the output, the end of sequence included.")
    ]
    seed: Annotated[int | None, shows(None, "Of the draws; null where nothing was drawn.")]
    prefill: Annotated[
        list[PrefillToken], shows([], "The prompt, if decoder_input_details requests it.")
    ]
    tokens: Annotated[list[Token], shows([], "The output, token by token.")]
    top_tokens: NotRequired[
        Annotated[
            list[list[Alternative]],
            shows([], "The likeliest tokens at each place, if top_n_tokens requests them."),
        ]
    ]


class OtherSequence(Details):
    """An output that best_of did not choose."""

    generated_text: Annotated[str, shows(" complaint", "The output.")]


class OtherSequences(TypedDict):
    """The part of the details that best_of adds."""

    best_of_sequences: NotRequired[
        Annotated[list[OtherSequence], shows([], "The others, where best_of was above 1.")]
    ]


class BestDetails(Details, OtherSequences):
    """Details of the output, and the outputs that were not chosen."""


class Generated(TypedDict):
    """One output."""

    generated_text: Annotated[
        str, shows(" complaint", "The output; after the prompt, if return_full_text.")
    ]
    details: NotRequired[
        Annotated[BestDetails, shows(None, "If details or decoder_input_details requests it.")]
    ]


class StreamDetails(TypedDict):
    """Details of the output, in a stream's last event."""

    finish_reason: Annotated[FinishReason, shows("eos_token", "Why it ended.")]
    generated_tokens: Annotated[int, shows(2, "Tokens of the output.")]
    seed: Annotated[int | None, shows(None, "Of the draws.")]
    input_length: Annotated[int, shows(9, "Tokens of the prompt, by TGI's name.")]
    prompt_tokens: Annotated[int, shows(9, "The same, by LoRAX's.")]


class TopTokens(TypedDict):
    """The part of an event that top_n_tokens adds."""

    top_tokens: NotRequired[
        Annotated[list[Alternative], shows([], "If top_n_tokens requests them.")]
    ]


class GenerateFrame(TopTokens):
    """The data of one event of TGI's stream, a token each."""

    index: Annotated[int, shows(1, "Counts tokens from 1.")]
    token: Annotated[Token, shows({}, "The token.")]
    generated_text: Annotated[
        str | None, shows(" complaint", "The whole output, with the last token.")
    ]
    details: Annotated[StreamDetails | None, shows(None, "With the last token, if requested.")]
