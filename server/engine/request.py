"""The plain data that crosses between the API and the engine.

Commands go in, events come out. Everything here is a frozen dataclass of numbers, strings and
tuples, so that the engine can live in another thread or another process. No tensors, no text, no
adapter names: a request says token ids and an adapter's digest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

FinishReason = Literal["length", "eos", "aborted", "error"]


@dataclass(frozen=True)
class Grammar:
    """What an output must look like.

    Attributes:
        kind: "json_schema" (`text` is a JSON Schema), "regex" (a regular expression that the whole
            output must match) or "choice" (a JSON list of texts, one of which is the output).
        text: see `kind`.
    """

    kind: Literal["json_schema", "regex", "choice"]
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How the next tokens of one sequence are chosen.

    The order in which the filters apply is transformers': repetition, presence and frequency
    penalties, temperature, top_k, top_p, min_p, typical_p.

    Attributes:
        max_new_tokens: tokens to generate at most, at least 1.
        do_sample: False takes the most likely token after penalties.
        temperature: > 0.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this mass, in (0, 1].
        min_p: drop tokens under this share of the most likely one's probability, in [0, 1).
        typical_p: locally typical sampling, in (0, 1].
        repetition_penalty: > 0; over prompt and output; 1 is none.
        presence_penalty: over the output only; 0 is none.
        frequency_penalty: over the output only; 0 is none.
        seed: with the position of the token it fixes the draw.
        eos_token_ids: ids that end the sequence.
        ignore_eos: go on to `max_new_tokens` regardless, or until a grammar is complete.
        num_logprobs: how many most likely tokens to report with each token; 0 reports the
            chosen one's log-probability alone, None reports nothing.
        prompt_logprobs: also report the log-probability of every prompt token.
        prompt_logprobs_from: with `prompt_logprobs`, the first prompt token that is wanted; what
            stands before it is reported as None, and its keys and values may come from the cache.
        logit_bias: (token id, number to add to its logit), before everything else but `grammar`;
            reported log-probabilities do not contain it.
        grammar: only tokens that it allows are drawn, and the end of sequence once it is complete.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    prompt_logprobs_from: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None


@dataclass(frozen=True)
class AdapterRef:
    """An adapter as the engine knows it.

    Attributes:
        digest: content digest (hex); the engine finds the stored bytes by it.
        num_virtual_tokens: n, positions taken before the prompt (0 for IA3).
        uses_scales: True for IA3, which needs a row of the scale tables.
        name: its name, for counters and traces; the engine only reports it.
        version: of that name.
    """

    digest: str
    num_virtual_tokens: int
    uses_scales: bool
    name: str = field(default="", compare=False)
    version: int = field(default=0, compare=False)


def positions_taken(num_virtual_tokens: int, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Positions that a sequence takes; the last new token is never run, so it takes none.

    The only place of this rule. Source: transformers' `generate` and PEFT, which stop after sampling it.
    """
    return num_virtual_tokens + num_prompt_tokens + max(max_new_tokens, 1) - 1


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate; as a command, it queues that sequence.

    Attributes:
        request_id: unique among the requests in flight.
        prompt_token_ids: at least one id, without virtual tokens.
        sampling: see SamplingParams.
        adapter: None is the base itself.
        cache_scope: requests reuse the keys and values of prompts of the same scope only, so
            that the time a prompt takes does not reveal whether another tenant sent it before.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: AdapterRef | None = None
    cache_scope: str = ""

    @property
    def num_virtual_tokens(self) -> int:
        """Positions of the adapter before the prompt."""
        return 0 if self.adapter is None else self.adapter.num_virtual_tokens

    @property
    def num_own_positions(self) -> int:
        """Positions that prompt and output may take, the adapter's left out."""
        return positions_taken(0, len(self.prompt_token_ids), self.sampling.max_new_tokens)


# --- commands: API -> engine ---------------------------------------------------------------


@dataclass(frozen=True)
class Abort:
    """Drop a request; its row is free within two steps. Unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True)
class Preload:
    """Make an adapter resident without a request."""

    adapter: AdapterRef


@dataclass(frozen=True)
class Unload:
    """Let an adapter leave the device once no sequence uses it."""

    digest: str


@dataclass(frozen=True)
class Drop:
    """Release everything cached of an adapter whose stored bytes were removed."""

    digest: str


@dataclass(frozen=True)
class Shutdown:
    """Abort what is running and end the loop."""


Command: TypeAlias = GenerationRequest | Abort | Preload | Unload | Drop | Shutdown


# --- events: engine -> API -----------------------------------------------------------------


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one token: raw float32 log-softmax, before any penalty.

    `top` lists (token_id, logprob), most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """A new token of a request.

    Attributes:
        request_id: whose token.
        token_id: the token; the end-of-sequence token is reported too.
        logprob: None unless the request asked.
        finish_reason: None while the sequence goes on.
        prompt_logprobs: with the first token, one entry a prompt token (the first is None), if asked.
        queue_seconds: with the first token, time from submission to the first scheduled step.
        cached_tokens: with the first token, prompt tokens whose keys and values were in the cache.
    """

    request_id: str
    token_id: int
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    queue_seconds: float | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class FailedEvent:
    """A request that ends without more tokens.

    `code` is one of "adapter_corrupt", "adapter_not_loaded", "too_long", "grammar_invalid",
    "non_finite", "aborted", "engine_error", or "engine_unavailable" where the client reports for a
    process that ended; `message` is for a person.
    """

    request_id: str
    code: str
    message: str


@dataclass(frozen=True)
class ResidencyEvent:
    """Where an adapter is now: "disk", "host" or "device" (`None` digest never occurs).

    Attributes:
        digest: of the adapter.
        residency: where it is.
        name: by which the engine first heard of it.
        loads: times it was read from disk since the event before.
        evictions: times it gave its place on the device to another since the event before.
    """

    digest: str
    residency: Literal["disk", "host", "device"]
    name: str = field(default="", compare=False)
    loads: int = field(default=0, compare=False)
    evictions: int = field(default=0, compare=False)


@dataclass(frozen=True)
class StatsEvent:
    """A snapshot after a step: counts of now, and totals since the start.

    Attributes:
        num_running, num_waiting: sequences.
        kv_blocks_used, kv_blocks_total: blocks; what is only kept for reuse counts as free.
        prefix_query_tokens: total of tokens that started sequences had.
        prefix_hit_tokens: of those, how many had their keys and values in the prefix cache.
        num_preemptions: total of sequences that had to give their blocks back.
    """

    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_preemptions: int = 0


Event: TypeAlias = TokenEvent | FailedEvent | ResidencyEvent | StatsEvent
