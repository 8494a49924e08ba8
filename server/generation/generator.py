"""The generation pipeline: from a prompt and an adapter name to text.

    resolve -> tokenise -> check limits -> GenerationRequest -> engine stream -> text, stop strings

Independent of HTTP and JSON: a route fills in `Options` and reads `Piece`s. The adapter version is fixed
when the name is resolved; replacing or deleting it later does not affect running requests.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import anyio
import anyio.to_thread
import structlog

from adapters.errors import AdapterCorrupt, BaseMismatch
from adapters.template import Row
from server.config.limits import Limits
from server.config.settings import num_cores
from server.engine.client import (
    AdapterOverloaded,
    EngineClient,
    EngineOverloaded,
    EngineUnavailable,
    RequestFailed,
    RequestStream,
)
from server.engine.request import (
    AdapterRef,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from server.errors import RequestInvalid, TooLong
from server.generation.adapter_lookup import Lookups
from server.generation.fair_threads import FairThreads
from server.generation.observers import Ended, GenerationObserver, Observer
from server.generation.prompt_form import Difference, PromptForm, template_of
from server.store.caller import Caller, PerCaller
from server.store.registry import AdapterRecord, Registry
from server.text.detokenizer import IncrementalDetokenizer
from server.text.stop import StopStrings
from server.text.tokenizer import TextTokenizer, TokenSpan

log = structlog.get_logger(__name__)

FinishReason = Literal["length", "eos_token", "stop_sequence"]
ResultT = TypeVar("ResultT")

DEFAULT_MAX_NEW_TOKENS = 64
# Longer texts are tokenised off the event loop: a megabyte takes about a second.
_INLINE_CHARACTERS = 4_096
# Many texts are tokenised in batches, bounded by characters and by number of texts.
_PIECE_CHARACTERS = 65_536
_PIECE_TEXTS = 256
# A resolved adapter counts as in use for this long, even before its request is submitted.
_RESOLVED_SECONDS = 60.0
# Refusal codes reported to observers for an adapter that exists.
_REFUSALS: dict[type[Exception], str] = {
    AdapterOverloaded: "adapter_overloaded",
    EngineOverloaded: "overloaded",
    EngineUnavailable: "engine_unavailable",
    AdapterCorrupt: "adapter_corrupt",
    BaseMismatch: "base_mismatch",
}


@dataclass(frozen=True)
class Options:
    """Per-request options of a generation.

    Attributes:
        sampling: its `max_new_tokens` and `eos_token_ids` are filled in here.
        max_new_tokens: None takes `default_new_tokens`, or what fits if that is less.
        default_new_tokens: None is all that fits.
        stop: strings that end the output.
        include_stop: whether the output includes the stop string that ended it.
        truncate: keep only this many tokens at the end of the prompt.
        prompt_field: the API's name for the prompt, used in errors.
        length_field: the API's name for `max_new_tokens`, used in errors.
    """

    sampling: SamplingParams
    max_new_tokens: int | None = None
    default_new_tokens: int | None = DEFAULT_MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    include_stop: bool = True
    truncate: int | None = None
    prompt_field: str = "inputs"
    length_field: str = "max_new_tokens"


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as ids, without virtual tokens."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One new token as text.

    Attributes:
        token_id: the token.
        text: the same as `added`, except that a special token has its name here, which is not part of
            the output.
        added: text added to the output; empty while a character is incomplete, or while it may be the
            prefix of an excluded stop string.
        offset: characters of the output before it, including those held back.
        special: whether it is a special token.
        logprob: None unless requested.
        finish_reason: None until the sequence ends.
    """

    token_id: int
    text: str
    added: str
    offset: int
    special: bool
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None


class Generation:
    """One request in the engine, read as text.

    Iterate it once; `abort` may be called at any time and any number of times. After the last
    piece, `text`, `num_tokens` and `finish_reason` are final.
    """

    def __init__(
        self,
        stream: RequestStream,
        request: GenerationRequest,
        detokenizer: IncrementalDetokenizer,
        stops: StopStrings,
        tokenizer: TextTokenizer,
        mark_corrupt: Callable[[str], None],
        observers: Sequence[GenerationObserver] = (),
    ) -> None:
        self.request = request
        self.text = ""
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.queue_seconds: float | None = None
        self.cached_tokens = 0
        self.first_token_seconds: float | None = None
        self._stream = stream
        self._detokenizer = detokenizer
        self._stops = stops
        self._tokenizer = tokenizer
        self._mark_corrupt = mark_corrupt
        self._observers = observers
        self._has_ended = False
        self._submitted_at = self._last_at = time.monotonic()
        self._num_characters = 0

    def abort(self) -> None:
        """Abort the request; the output read so far is preserved."""
        self._stream.abort()
        if not self._has_ended:
            self._last_at = time.monotonic()
            self._report_end("abort")

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Yield one piece per token.

        Raises:
            RequestFailed: the request failed in the engine.
        """
        try:
            async for event in self._stream:
                piece = self._take(event)
                if piece.finish_reason is not None:
                    self._report_end("length" if piece.finish_reason == "length" else "stop")
                yield piece
                if piece.finish_reason is not None:
                    return
            raise RequestFailed("engine_error", "the engine ended the request without a reason")
        except RequestFailed as failure:
            self._last_at = time.monotonic()
            self._report_end("error", failure.code)
            if failure.code == "adapter_corrupt" and self.request.adapter is not None:
                await self._note_corrupt(self.request.adapter.digest)
            raise
        finally:
            self.abort()

    async def _note_corrupt(self, digest: str) -> None:
        try:
            await anyio.to_thread.run_sync(self._mark_corrupt, digest)
        except Exception:  # the request's own failure must reach its caller
            log.exception("mark_corrupt_failed", digest=digest)

    def _take(self, event: TokenEvent) -> Piece:
        if self.num_tokens == 0:
            self.prompt_logprobs = event.prompt_logprobs
            self.cached_tokens = event.cached_tokens or 0
        self._report_token(self._stream.heard_at, event.queue_seconds)
        self.num_tokens += 1
        if event.token_id in self._tokenizer.special_ids:
            return self._take_special(event)
        offset = self._num_characters
        text = self._detokenizer.feed(event.token_id)
        if event.finish_reason is not None:
            text += self._detokenizer.flush()
        self._num_characters += len(text)
        text, stopped = self._stops.feed(text)
        self.finish_reason = "stop_sequence" if stopped else _finish_reason(event)
        if self.finish_reason is not None:
            text += self._stops.flush()
        self.text += text
        return Piece(event.token_id, text, text, offset, False, event.logprob, self.finish_reason)

    def _report_token(self, at: float, queue_seconds: float | None) -> None:
        # Arrival time, not read time: a slow client must not count as a slow engine.
        before, self._last_at = self._last_at, at
        if self.num_tokens:
            for observer in self._observers:
                observer.token(at - before)
            return
        self.first_token_seconds = at - self._submitted_at
        self.queue_seconds = queue_seconds
        for observer in self._observers:
            observer.first_token(self.first_token_seconds, queue_seconds)

    def _report_end(self, how: Ended, code: str | None = None) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        for observer in self._observers:
            observer.ended(how, self._last_at - self._submitted_at, code)

    def _take_special(self, event: TokenEvent) -> Piece:
        self.finish_reason = _finish_reason(event)
        added = ""
        if self.finish_reason is not None:
            # An output that ends inside a character ends in a replacement character.
            added, _ = self._stops.feed(self._detokenizer.flush())
            added += self._stops.flush()
        self.text += added
        name = self._tokenizer.token_text(event.token_id)
        offset = self._num_characters
        return Piece(event.token_id, name, added, offset, True, event.logprob, self.finish_reason)


class Generator(PerCaller):
    """Turns prompts into generations on one engine.

    Args:
        client: the started engine.
        registry: the registry of adapters.
        tokenizer: the base's tokenizer.
        base_id: the model name of the base itself.
        observers: of every generation.
        admit: called with the caller before each generation starts; raises to refuse it.
        limits: limits on prompts and outputs.
    """

    def __init__(
        self,
        client: EngineClient,
        registry: Registry,
        tokenizer: TextTokenizer,
        base_id: str,
        observers: Sequence[Observer] = (),
        admit: Callable[[Caller], None] = lambda _caller: None,
        limits: Limits | None = None,
    ) -> None:
        self._client = client
        self._limits = limits or Limits()
        self._admit = admit
        self._registry = registry
        self.tokenizer = tokenizer
        self.base_id = base_id
        self._resolved_at: dict[str, float] = {}
        self._threads = FairThreads(num_cores())
        self._lookups = Lookups(
            lambda name, caller: registry.seen_by(caller).resolve(name),
            # A limiter of their own: they wait for nothing else, be it tokenisation, or writes that
            # are blocked on the database's lock.
            anyio.CapacityLimiter(1),
            registry.data_version,
        )
        self._observers = tuple(observers)
        self._prompt_form = PromptForm(tokenizer.chat_template)

    @property
    def max_sequence_tokens(self) -> int:
        """Positions that virtual, prompt and output tokens may take; the last new one takes none."""
        return self._client.max_sequence_tokens

    async def resolve(self, name: str | None) -> AdapterRecord | None:
        """Resolve `NAME`, `NAME@VERSION` or `NAME@ALIAS` to an exact version; None is the base.

        Raises:
            NameInvalid, AdapterNotFound, VersionNotFound, AdapterCorrupt: no fallback to the base.
            BaseMismatch: the adapter was trained here on another base.
        """
        if name is None or name == self.base_id:
            return None
        with self._reporting_refusal(name.partition("@")[0]):
            record = await self._lookups.find(name, self._caller)
            record.require_base(self._client.base)
        self._resolved_at[record.digest] = time.monotonic()
        return record

    async def digests_in_use(self) -> set[str]:
        """Digests of adapters whose stored bytes a request may still need, deleted or not.

        Includes those of requests whose lookup was in progress at the call.
        """
        await self._lookups.settle()
        since = time.monotonic() - _RESOLVED_SECONDS
        for digest in [d for d, at in self._resolved_at.items() if at < since]:
            del self._resolved_at[digest]  # in place: the views of all callers share it
        return self._client.digests_in_flight() | self._resolved_at.keys()

    @property
    def vocab_size(self) -> int:
        """Number of valid token ids: those that both tokenizer and base have."""
        return min(self.tokenizer.vocab_size, self._client.base.vocab_size)

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, field: str = "inputs"
    ) -> Prompt:
        """Encode a text as a prompt, with or without the tokenizer's special tokens.

        Raises:
            TooLong: more characters than may be tokenised.
        """
        [prompt] = await self.encode_all([text], add_special_tokens=add_special_tokens, field=field)
        return prompt

    async def encode_all(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        plain: bool = False,
        field: str = "inputs",
    ) -> list[Prompt]:
        """Encode texts as prompts, in batches, and off the event loop if they are long.

        Args:
            texts: any strings.
            add_special_tokens: see `TextTokenizer.encode`.
            plain: see `TextTokenizer.encode`.
            field: the API's name for the texts, used in errors.

        Raises:
            TooLong: a text of more characters than may be tokenised.
        """
        for text in texts:
            self._check_characters(text, field)

        def encoded(piece: Sequence[str]) -> list[Prompt]:
            return [
                Prompt(
                    text,
                    self.tokenizer.encode(text, add_special_tokens=add_special_tokens, plain=plain),
                )
                for text in piece
            ]

        prompts: list[Prompt] = []
        for piece in _pieces(texts):
            work = partial(encoded, piece)
            prompts += await self._run(sum(map(len, piece)), work)
        return prompts

    async def spans(
        self, text: str, *, add_special_tokens: bool, field: str = "inputs"
    ) -> list[TokenSpan]:
        """Tokens of a text with their character ranges.

        Raises:
            TooLong: more characters than may be tokenised.
        """
        self._check_characters(text, field)
        return await self._run(
            len(text), lambda: self.tokenizer.spans(text, add_special_tokens=add_special_tokens)
        )

    async def encode_row(self, row: Row, adapter: AdapterRecord | None) -> Prompt:
        """Render a row of data with the adapter's stored template and encode it as a prompt.

        Raises:
            RequestInvalid: no adapter was named, or it has no template.
            TemplateInvalid: the row does not fit the template.
            TooLong: the rendered text has more characters than may be tokenised.
        """
        [prompt] = await self.encode_rows([row], adapter)
        return prompt

    async def encode_rows(self, rows: Sequence[Row], adapter: AdapterRecord | None) -> list[Prompt]:
        """As `encode_row`, for each row."""
        template = None if adapter is None else template_of(adapter)
        if template is None:
            whose = "the base" if adapter is None else f"the adapter {adapter.name!r}"
            raise RequestInvalid(
                f"row: {whose} has no stored template; send inputs instead",
                field="row",
                expected="an adapter with a stored template",
                came=whose,
            )
        texts: list[str] = []
        for start in range(0, len(rows), _PIECE_TEXTS):
            piece = rows[start : start + _PIECE_TEXTS]
            work = partial(lambda piece: [template.render(row) for row in piece], piece)
            texts += await self._run(sum(map(_num_characters, piece)), work)
        return await self.encode_all(texts, plain=True, field="row")

    async def encode_inputs(
        self, texts: Sequence[str], adapter: AdapterRecord | None, *, field: str = "inputs"
    ) -> list[Prompt]:
        """Texts for an adapter, rendered with its stored template unless they are already.

        A template of one column (see `Template.sole_column`) is filled with the text. A text in the
        template's own words (see `Template.recognises`) is a prompt as it is, as is every text for an
        adapter without a template.

        Args:
            texts: at least one.
            adapter: None is the base.
            field: the API's name for the texts, used in errors.

        Raises:
            RequestInvalid: the template has several columns, which one text cannot fill.
            TooLong: a text has more characters than may be tokenised.
        """
        template = None if adapter is None else template_of(adapter)
        if adapter is None or template is None or not template.columns:
            return await self.encode_all(texts, field=field)
        for text in texts:
            self._check_characters(text, field)
            if not text.strip():
                raise _no_tokens(field)
        characters = sum(map(len, texts))
        as_is = await self._run(characters, lambda: [template.recognises(text) for text in texts])
        rows = [text for text, whole in zip(texts, as_is, strict=True) if not whole]
        column = template.sole_column
        if rows and column is None:
            raise _several_columns(template.columns, adapter.name, field)
        filled = iter(await self.encode_rows([{column or "": text} for text in rows], adapter))
        whole_texts = [text for text, whole in zip(texts, as_is, strict=True) if whole]
        prompts = iter(await self.encode_all(whole_texts, field=field))
        return [next(prompts) if whole else next(filled) for whole in as_is]

    async def differences(self, adapter: AdapterRecord, texts: Sequence[str]) -> Difference | None:
        """How the first prompt that does differs from the adapter's training, see `PromptForm`."""

        def first() -> Difference | None:
            found = (self._prompt_form.difference(adapter, text) for text in texts)
            return next((one for one in found if one is not None), None)

        return await self._run(sum(map(len, texts)), first)

    async def encode_targets(
        self, texts: Sequence[str], *, append_eos: bool
    ) -> list[tuple[int, ...]]:
        """Encode targets as in training: plain text, then end of sequence.

        Args:
            texts: separator and target of each.
            append_eos: end with the end-of-sequence token, if the base has one.

        Raises:
            RequestInvalid: a target has no tokens.
            TooLong: a target has more characters than may be tokenised.
        """
        eos = self.tokenizer.eos_token_id if append_eos else None
        end = () if eos is None else (eos,)
        encoded = await self.encode_all(texts, add_special_tokens=False, plain=True, field="labels")
        targets = [target.token_ids + end for target in encoded]
        if not all(targets):
            raise RequestInvalid(
                "labels: expected labels of at least one token, came an empty one",
                field="labels",
                expected="at least one token",
                came="none",
            )
        return targets

    def prepare(
        self, prompt: Prompt, adapter: AdapterRecord | None, options: Options, request_id: str
    ) -> GenerationRequest:
        """Check a prompt against the limits and build the request.

        Raises:
            RequestInvalid: the prompt has no tokens.
            TooLong: virtual tokens, prompt and output do not fit the base or the engine.
        """
        ids = prompt.token_ids
        if options.truncate is not None:
            ids = ids[-options.truncate :]
        if not ids:
            raise _no_tokens(options.prompt_field)
        max_new_tokens = self.check_length(len(ids), adapter, options)
        sampling = replace(
            options.sampling,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.tokenizer.eos_token_ids,
        )
        ref = None if adapter is None else adapter_ref(adapter)
        return GenerationRequest(
            request_id, ids, sampling, ref, cache_scope=self._caller.owner or ""
        )

    def submit(self, request: GenerationRequest, options: Options) -> Generation:
        """Queue a prepared request.

        Raises:
            EngineOverloaded: the queue is full.
            EngineUnavailable: the engine's process is down.
            QuotaExceeded: the token quota of the caller's key is used up.
        """
        with self._reporting_refusal(None if request.adapter is None else request.adapter.name):
            return self._submit(request, options)

    def try_submit(self, request: GenerationRequest, options: Options) -> Generation | None:
        """Queue a further request of an operation in progress; a full queue is not an error.

        Returns:
            None if the queue is full.

        Raises:
            EngineUnavailable, QuotaExceeded: see `submit`.
        """
        with self._reporting_refusal(None if request.adapter is None else request.adapter.name):
            try:
                return self._submit(request, options)
            except EngineOverloaded:
                return None

    def _submit(self, request: GenerationRequest, options: Options) -> Generation:
        self._admit(self._caller)
        detokenizer = IncrementalDetokenizer(self.tokenizer.decode, request.prompt_token_ids)
        return Generation(
            self._client.submit(request),
            request,
            detokenizer,
            StopStrings(options.stop, include=options.include_stop),
            self.tokenizer,
            self._registry.mark_corrupt,
            [observer.began(request, self._caller) for observer in self._observers],
        )

    @contextmanager
    def _reporting_refusal(self, adapter: str | None) -> Iterator[None]:
        try:
            yield
        except tuple(_REFUSALS) as error:
            code = next(code for kind, code in _REFUSALS.items() if isinstance(error, kind))
            for observer in self._observers:
                observer.refused(adapter, code)
            raise

    async def _run(self, characters: int, work: Callable[[], ResultT]) -> ResultT:
        if characters <= _INLINE_CHARACTERS:
            return work()
        return await self.run_aside(work, is_long=characters > _PIECE_CHARACTERS)

    async def run_aside(self, work: Callable[[], ResultT], *, is_long: bool = False) -> ResultT:
        """Run work of the processor on a thread, in turn with other callers: see `FairThreads`."""
        return await self._threads.run(self._caller, work, is_long=is_long)

    @property
    def max_prompt_tokens(self) -> int:
        """Maximum prompt tokens; the one new token that follows takes no position."""
        room = self.max_sequence_tokens
        most = self._limits.max_prompt_tokens
        return room if most is None else min(room, most)

    def check_length(
        self, num_prompt_tokens: int, adapter: AdapterRecord | None, options: Options
    ) -> int:
        """Check lengths against the limits before anything of that length is allocated.

        Returns:
            The maximum number of output tokens.

        Raises:
            TooLong: see `prepare`.
        """
        prompt = num_prompt_tokens
        virtual = 0 if adapter is None else adapter.num_virtual_tokens
        for field, came, most in (
            (options.prompt_field, prompt, self._limits.max_prompt_tokens),
            (options.length_field, options.max_new_tokens, self._limits.max_output_tokens),
        ):
            if most is not None and (came or 0) > most:
                raise _too_long(field, f"at most {most} tokens", f"{came}")
        return self._max_new_tokens(prompt, virtual, options)

    def _check_characters(self, text: str, field: str) -> None:
        most = self._limits.max_prompt_characters
        if len(text) > most:
            raise _too_long(field, f"at most {most} characters", str(len(text)))

    def _max_new_tokens(self, prompt: int, virtual: int, options: Options) -> int:
        asked = options.max_new_tokens
        # The last new token takes no position, see `positions_taken`.
        fit = self._client.room(virtual) + virtual + 1
        room = fit - virtual - prompt
        wanted = 1 if asked is None else asked
        if wanted > room:
            taken = f"{prompt} prompt tokens + {wanted} new tokens"
            if virtual:
                taken += f" + {virtual} virtual tokens of the adapter"
            raise TooLong(
                f"{options.prompt_field} and {options.length_field} take {taken}, "
                f"at most {fit} fit in all",
                field=options.prompt_field if room < 1 else options.length_field,
                expected=f"at most {fit} tokens in all",
                came=str(prompt + wanted + virtual),
            )
        if asked is not None:
            return asked
        bounds = (room, options.default_new_tokens, self._limits.max_output_tokens)
        return min(bound for bound in bounds if bound is not None)


def _pieces(texts: Sequence[str]) -> Iterator[list[str]]:
    """Split texts into batches within the tokenisation limits."""
    piece: list[str] = []
    size = 0
    for text in texts:
        if piece and (size + len(text) > _PIECE_CHARACTERS or len(piece) == _PIECE_TEXTS):
            yield piece
            piece, size = [], 0
        piece.append(text)
        size += len(text)
    if piece:
        yield piece


def _num_characters(row: Row) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, str))


def _several_columns(columns: Sequence[str], name: str, field: str) -> RequestInvalid:
    listed = ", ".join(repr(column) for column in columns)
    example = ", ".join(f"{json.dumps(column, ensure_ascii=False)}: ..." for column in columns)
    return RequestInvalid(
        f"{field}: the template of the adapter {name!r} takes the columns {listed}, and one text "
        f'cannot fill them; send "row": {{{example}}} (or "rows", a list of them), or "raw": true '
        "for a prompt that is taken as it is",
        field=field,
        expected=f'"row" with the columns {listed}',
        came="a text",
    )


def _no_tokens(field: str) -> RequestInvalid:
    return RequestInvalid(
        f"{field}: expected at least one token, came an empty text",
        field=field,
        expected="at least one token",
        came="none",
    )


def _too_long(field: str, expected: str, came: str) -> TooLong:
    return TooLong(
        f"{field}: expected {expected}, came {came}", field=field, expected=expected, came=came
    )


def adapter_ref(record: AdapterRecord) -> AdapterRef:
    """The engine's reference to an adapter record."""
    return AdapterRef(
        record.digest,
        record.num_virtual_tokens,
        record.uses_scales,
        name=record.name,
        version=record.version,
    )


def mean_logprob(pieces: list[Piece]) -> float:
    """Mean log-probability of an output, by which `best_of` chooses."""
    known = [piece.logprob.logprob for piece in pieces if piece.logprob is not None]
    return sum(known) / len(known) if known else -math.inf


def _finish_reason(event: TokenEvent) -> FinishReason | None:
    match event.finish_reason:
        case None:
            return None
        case "length":
            return "length"
        case "eos":
            return "eos_token"
        case reason:
            raise RequestFailed(
                "aborted" if reason == "aborted" else "engine_error",
                f"the engine ended the request early ({reason})",
            )
