"""Replies of the routes that generate, rank and tokenise. Documentation only."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import RootModel

from server.api.openapi.fields import Reply, may_show, shows

# --- TGI ---------------------------------------------------------------------------------------


class Alternative(Reply):
    """A token that might have come."""

    id: int = shows(253, "Id in the vocabulary.")
    text: str = shows(" complaint", "The token's text.")
    logprob: float = shows(-0.25, "Raw log-softmax, before any penalty.")
    special: bool = shows(False, "Whether it is a special token.")


class Token(Reply):
    """One token of an output."""

    id: int = shows(253, "Id in the vocabulary.")
    text: str = shows(" complaint", "What it adds to the output; empty inside a character.")
    logprob: float | None = shows(-0.25, "Raw log-softmax, before any penalty.")
    special: bool = shows(False, "Whether it is a special token, which is no part of the output.")
    alternative_tokens: list[Alternative] | None = may_show(
        [], "The likeliest tokens here, where return_k_alternatives asked for them."
    )


class PrefillToken(Reply):
    """One token of a prompt; virtual tokens never appear."""

    id: int = shows(19161, "Id in the vocabulary.")
    text: str = shows("Tweet", "The token's text.")
    logprob: float | None = shows(-3.5, "Of this token after those before it; null for the first.")


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class Details(Reply):
    """What is known of one output."""

    finish_reason: FinishReason = shows("eos_token", "Why it ended.")
    prompt_tokens: int = shows(9, "Tokens of the prompt, without virtual ones.")
    generated_tokens: int = shows(2, "Tokens of the output, the end of sequence included.")
    seed: int | None = shows(None, "Of the draws; null where nothing was drawn.")
    prefill: list[PrefillToken] = shows([], "The prompt, where decoder_input_details asked for it.")
    tokens: list[Token] = shows([], "The output, token by token.")
    top_tokens: list[list[Alternative]] | None = may_show(
        [], "The likeliest tokens at each place, where top_n_tokens asked for them."
    )


class Sequence(Details):
    """An output that best_of did not choose."""

    generated_text: str = shows(" complaint", "The output.")


class BestDetails(Details):
    """What is known of the output, and of those that were not chosen."""

    best_of_sequences: list[Sequence] | None = may_show(
        [], "The others, where best_of was above 1."
    )


class Generated(Reply):
    """One output."""

    generated_text: str = shows(" complaint", "The output; after the prompt, if return_full_text.")
    details: BestDetails | None = may_show(
        None, "Where details or decoder_input_details asked for it."
    )


class GeneratedList(RootModel[list[Generated]]):
    """One output, in a list of one."""


class StreamDetails(Reply):
    """What a stream's last frame says of the output."""

    finish_reason: FinishReason = shows("eos_token", "Why it ended.")
    generated_tokens: int = shows(2, "Tokens of the output.")
    seed: int | None = shows(None, "Of the draws.")
    input_length: int = shows(9, "Tokens of the prompt, in TGI's word.")
    prompt_tokens: int = shows(9, "The same, in LoRAX's.")


class GenerateFrame(Reply):
    """The data of one event of TGI's stream, a token each."""

    index: int = shows(1, "Counts tokens from 1.")
    token: Token = shows({}, "The token.")
    top_tokens: list[Alternative] | None = may_show([], "Where top_n_tokens asked for them.")
    generated_text: str | None = shows(" complaint", "The whole output, with the last token.")
    details: StreamDetails | None = shows(None, "With the last token, where asked for.")


# --- OpenAI ------------------------------------------------------------------------------------


class PromptTokens(Reply):
    """What became of the prompt's tokens."""

    cached_tokens: int = shows(0, "Their keys and values were in the cache already.")


class Usage(Reply):
    """Tokens of a request; virtual tokens are not among them."""

    prompt_tokens: int = shows(9, "Each prompt once.")
    completion_tokens: int = shows(2, "Everything that was drawn.")
    total_tokens: int = shows(11, "The sum of both.")
    prompt_tokens_details: PromptTokens = shows({"cached_tokens": 0}, "More on `prompt_tokens`.")


class CompletionLogprobs(Reply):
    """Lists with one entry a token: of the echoed prompt, then of the output."""

    tokens: list[str] = shows(
        [" complaint"], "Texts, or bytes as bytes:\\xe2 of a split character."
    )
    token_logprobs: list[float | None] = shows([-0.25], "Raw log-softmax; null for the very first.")
    top_logprobs: list[dict[str, float] | None] = shows(
        [{" complaint": -0.25}], "The likeliest tokens by their texts, this one included."
    )
    text_offset: list[int] = shows([0], "Where each token begins in the text.")


class CompletionChoice(Reply):
    """One output of a prompt."""

    index: int = shows(0, "Choices of the first prompt come first.")
    text: str = shows(" complaint", "The output; after the prompt, if echo.")
    logprobs: CompletionLogprobs | None = shows(None, "Where logprobs asked for them.")
    finish_reason: Literal["length", "stop"] | None = shows("stop", "Why it ended.")


class _Envelope(Reply):
    id: str = shows("cmpl-4f1a…", "Of the reply; every chunk of a stream has the same.")
    created: int = shows(1795376932, "Unix time, seconds.")
    model: str = shows("complaints", "The name that was asked for.")
    system_fingerprint: str = shows(
        "fp_1a45f6bea123_6e0e5b0c1d22", "The exact weights: base, adapter."
    )


class Completion(_Envelope):
    """OpenAI's `text_completion`."""

    object: Literal["text_completion"] = shows("text_completion", "What this is.")
    choices: list[CompletionChoice] = shows([], "n for every prompt.")
    usage: Usage = shows({}, "Tokens.")


class CompletionChunk(_Envelope):
    """The data of one event of a completion's stream; the last data is `[DONE]`."""

    object: Literal["text_completion"] = shows("text_completion", "What this is.")
    choices: list[CompletionChoice] = shows([], "What is new; none in the chunk with the usage.")
    usage: Usage | None = may_show({}, "Where stream_options.include_usage asked for it.")


class NamedLogprob(Reply):
    """A token by its text and its bytes."""

    token: str = shows(" complaint", "Its text, or its bytes as bytes:\\xe2.")
    logprob: float = shows(-0.25, "Raw log-softmax.")
    bytes: list[int] = shows([32, 99], "Its bytes.")


class ChatLogprob(NamedLogprob):
    """A token of a message."""

    top_logprobs: list[NamedLogprob] = shows([], "The likeliest tokens here.")


class ChatLogprobs(Reply):
    """Log-probabilities of a message."""

    content: list[ChatLogprob] = shows([], "One entry a token.")
    refusal: None = shows(None, "Always null.")


class ChatMessage(Reply):
    """What the assistant says."""

    role: Literal["assistant"] = shows("assistant", "Who speaks.")
    content: str = shows("complaint", "The output.")
    refusal: None = shows(None, "Always null: nothing is refused in words.")


class ChatChoice(Reply):
    """One output."""

    index: int = shows(0, "Counts choices from 0.")
    message: ChatMessage = shows({}, "The message.")
    logprobs: ChatLogprobs | None = shows(None, "Where logprobs asked for them.")
    finish_reason: Literal["length", "stop"] = shows("stop", "Why it ended.")


class ChatCompletion(_Envelope):
    """OpenAI's `chat.completion`."""

    object: Literal["chat.completion"] = shows("chat.completion", "What this is.")
    choices: list[ChatChoice] = shows([], "n of them.")
    usage: Usage = shows({}, "Tokens.")


class ChatDelta(Reply):
    """What is new in a message."""

    role: Literal["assistant"] | None = may_show("assistant", "In a choice's first chunk.")
    content: str | None = may_show("compl", "New text.")


class ChatDeltaChoice(Reply):
    """What is new in a choice."""

    index: int = shows(0, "Which choice.")
    delta: ChatDelta = shows({}, "What is new.")
    logprobs: ChatLogprobs | None = shows(None, "Of the new tokens, where asked for.")
    finish_reason: Literal["length", "stop"] | None = shows(None, "In a choice's last chunk.")


class ChatChunk(_Envelope):
    """The data of one event of a chat's stream; the last data is `[DONE]`."""

    object: Literal["chat.completion.chunk"] = shows("chat.completion.chunk", "What this is.")
    choices: list[ChatDeltaChoice] = shows([], "What is new; none in the chunk with the usage.")
    usage: Usage | None = may_show({}, "Where stream_options.include_usage asked for it.")


# --- ranking and tokens ------------------------------------------------------------------------


class Ranked(Reply):
    """One input's labels."""

    label: str = shows("complaint", "The likeliest.")
    scores: dict[str, float] = shows(
        {"complaint": 0.9, "no complaint": 0.1}, "Softmax over the labels that were given."
    )
    logprobs: dict[str, float] = shows(
        {"complaint": -0.2, "no complaint": -2.4}, "Log-likelihood of each, normalised as asked."
    )


class RankedInputs(RootModel[Ranked | list[Ranked]]):
    """An object for a text or a row, a list of them for a list."""


class TokenSpan(Reply):
    """A token and where it stands."""

    id: int = shows(19161, "Id in the vocabulary.")
    text: str = shows("Tweet", "The characters that it covers.")
    start: int = shows(0, "Its first character.")
    stop: int = shows(5, "The character behind its last.")


class TokenIds(Reply):
    """Tokens in vLLM's shape."""

    count: int = shows(2, "How many.")
    max_model_len: int = shows(8192, "Tokens that prompt and output may have together.")
    tokens: list[int] = shows([19161, 2], "Their ids.")


class Tokenized(RootModel[list[TokenSpan] | TokenIds]):
    """A list for TGI's `inputs`, an object for vLLM's `prompt`."""


class Detokenized(Reply):
    """A text in vLLM's shape."""

    prompt: str = shows("Tweet text", "The text; special tokens by name.")


class TokenizerInfo(Reply):
    """The base's tokenizer, in vLLM's shape."""

    tokenizer_class: str = shows("PreTrainedTokenizerFast", "transformers' name of it.")
    bos_token: str | None = shows("<|im_start|>", "Begins a text, where there is one.")
    eos_token: str | None = shows("<|im_end|>", "Ends a sequence.")
    pad_token: str | None = shows("<|im_end|>", "Fills up batches elsewhere.")
    unk_token: str | None = shows(None, "Stands for what the vocabulary lacks.")
    chat_template: str | dict[str, Any] | None = shows(
        "{% for message in messages %}…", "Jinja, as the base has it."
    )
