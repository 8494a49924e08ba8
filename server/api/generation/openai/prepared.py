"""A request of either route that is ready to run: its prompts, its sequences, how its choices are written.

What a choice looks like is the route's `Shape`. Knows no HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from server.api.generation.openai import openai_types as shapes
from server.api.generation.openai.batch import Batch
from server.api.generation.openai.bodies import OpenAIBody
from server.api.generation.openai.prompts import Given
from server.engine.request import GenerationRequest, TokenLogprob
from server.errors import Contradiction, RequestInvalid
from server.generation.generator import FinishReason, Generation, Generator, Options, Piece
from server.services import Services
from server.store.registry import AdapterRecord

_REASONS: dict[FinishReason, shapes.OpenAIFinishReason] = {
    "length": "length",
    "eos_token": "stop",
    "stop_sequence": "stop",
}


class Output:
    """One sequence as far as it has been read; the engine may be further on.

    Args:
        given: its prompt.
        generation: the sequence itself.
        first: the prompt's first sample, which has its log-probabilities where this one has none.
        prompt_only: only the prompt was requested (`max_tokens` of 0); what the engine made
            beside it is left out.

    Attributes:
        given: its prompt.
        pieces: its tokens so far, an end-of-sequence token among them.
        finish_reason: OpenAI's name of how it ended; None while it goes on.
    """

    def __init__(
        self, given: Given, generation: Generation, first: Generation, *, prompt_only: bool
    ) -> None:
        self.given = given
        self.pieces: list[Piece] = []
        self.finish_reason: shapes.OpenAIFinishReason | None = None
        self._generation = generation
        self._first = first
        self._prompt_only = prompt_only

    def take(self, piece: Piece) -> list[Piece]:
        """Note a token; gives what of it is part of the output: a list of it, or of nothing."""
        if self._prompt_only:
            self.finish_reason = "length"
            return []
        if piece.finish_reason is not None:
            self.finish_reason = _REASONS[piece.finish_reason]
        self.pieces.append(piece)
        return [piece]

    @property
    def text(self) -> str:
        """The output so far."""
        return "".join(piece.added for piece in self.pieces)

    @property
    def cached_tokens(self) -> int:
        """Tokens of its prompt that were in the cache; known with the first token.

        None of a further sample, as its prompt is counted with the first one.
        """
        return self._generation.cached_tokens if self._generation is self._first else 0

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """One entry a prompt token, if requested; known with the first token."""
        return self._generation.prompt_logprobs or self._first.prompt_logprobs or ()


class Shape(Protocol):
    """How a route writes its choices."""

    @property
    def id_prefix(self) -> str:
        """What ids of replies begin with."""

    @property
    def object_name(self) -> str:
        """What a whole reply is."""

    @property
    def chunk_name(self) -> str:
        """What a chunk of a stream is."""

    async def choice(
        self, output: Output, index: int
    ) -> shapes.CompletionChoice | shapes.ChatChoice:
        """A whole choice."""

    async def opening(
        self, output: Output, index: int
    ) -> shapes.CompletionChoice | shapes.ChatDeltaChoice | None:
        """What a stream sends of a choice before its first token, if anything."""

    def delta(
        self, output: Output, index: int, pieces: Sequence[Piece]
    ) -> shapes.CompletionChoice | shapes.ChatDeltaChoice:
        """What the last `pieces` of an output add to its choice."""


@dataclass(frozen=True)
class PreparedBatch:
    """A request that has passed every check that needs no engine.

    Attributes:
        generator: the engine's front.
        model: the name in the request.
        fingerprint: names the exact weights that answer.
        prompts: one or more.
        requests: `best_of` for every prompt, in order.
        options: the same for all requests.
        n: choices for every prompt.
        best_of: samples for every prompt.
        max_parallel: sequences in the engine at a time.
        prompt_only: see Output.
        logprobs: whether chunks carry log-probabilities, and may not be left out.
        shape: how choices are written.
    """

    generator: Generator
    model: str
    fingerprint: str
    prompts: Sequence[Given]
    requests: Sequence[GenerationRequest]
    options: Options
    n: int
    best_of: int
    max_parallel: int
    prompt_only: bool
    logprobs: bool
    shape: Shape
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each prompt once; virtual tokens are not among them."""
        return sum(len(given.prompt.token_ids) for given in self.prompts)

    def batch(self) -> Batch:
        """The sequences, not begun yet."""
        return Batch(self.generator, self.requests, self.options, self.max_parallel)

    def output(self, batch: Batch, index: int) -> Output:
        """An output for the request at `index`, which has begun."""
        place, sample = divmod(index, self.best_of)
        first = batch.generations[index - sample]
        return Output(
            self.prompts[place], batch.generations[index], first, prompt_only=self.prompt_only
        )

    def envelope(
        self, object_name: str, choices: Sequence[shapes.CompletionChoice | shapes.ChatChoice]
    ) -> dict[str, Any]:
        """What stands around choices."""
        return {
            "id": f"{self.shape.id_prefix}{self.id}",
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def usage(self, outputs: Sequence[Output]) -> shapes.Usage:
        """Prompt tokens, each prompt once, and every token that was drawn; virtual tokens are not
        among them."""
        prompt = self.num_prompt_tokens
        completion = sum(len(output.pieces) for output in outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(output.cached_tokens for output in outputs)
            },
        }


def prepare_batch(
    services: Services,
    generator: Generator,
    record: AdapterRecord | None,
    model: str,
    prompts: Sequence[Given],
    options: Options,
    samples: tuple[int, int],
    shape: Shape,
    *,
    streamed: bool = False,
    prompt_only: bool = False,
    logprobs: bool = False,
) -> PreparedBatch:
    """Prepare every sequence.

    Sample i of a prompt draws with `seed + i`, so that each can be had again alone.

    Raises:
        RequestInvalid: too many sequences, or an empty prompt.
        TooLong: a prompt with its output does not fit the base or the engine.
    """
    n, best_of = samples
    most = services.settings.max_sequences
    if len(prompts) * best_of > most:
        raise RequestInvalid(
            f"{options.prompt_field}: {len(prompts)} prompts with {best_of} samples each are "
            f"{len(prompts) * best_of} sequences; at most {most} are taken at once",
            field=options.prompt_field,
            expected=f"at most {most} sequences",
            came=str(len(prompts) * best_of),
        )
    # The engine's ids are ours: two requests in flight may carry the same x-request-id.
    batch_id = uuid.uuid4().hex
    requests = []
    for place, given in enumerate(prompts):
        first = generator.prepare(given.prompt, record, options, f"{batch_id}-{place}")
        requests += [_sample(first, index, alone=streamed) for index in range(best_of)]
    if record is not None:
        services.adapter_use.count(record.name)
    return PreparedBatch(
        generator=generator,
        model=model,
        fingerprint=f"fp_{services.client.base.digest[:12]}"
        + (f"_{record.digest[:12]}" if record is not None else ""),
        prompts=prompts,
        requests=requests,
        options=options,
        n=n,
        best_of=best_of,
        max_parallel=services.settings.max_running,
        prompt_only=prompt_only,
        logprobs=logprobs,
        shape=shape,
    )


def _sample(first: GenerationRequest, index: int, *, alone: bool) -> GenerationRequest:
    # A prompt's log-probabilities are the same for all its samples: where none has to begin without
    # the others, the first one brings them.
    sampling = replace(
        first.sampling,
        seed=first.sampling.seed + index,
        prompt_logprobs=first.sampling.prompt_logprobs and (alone or index == 0),
    )
    return replace(first, request_id=f"{first.request_id}-{index}", sampling=sampling)


def check_stream_options(body: OpenAIBody) -> None:
    """Refuse what only a stream can do.

    Raises:
        Contradiction: `stream_options` without `stream`.
    """
    if body.stream_options is not None and not body.stream:
        raise Contradiction(
            "stream_options is given without stream",
            field="stream_options",
            expected="stream: true",
            came="no stream",
        )
