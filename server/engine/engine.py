"""The engine: one `step` is schedule -> run -> sample -> commit.

Single-threaded: whoever owns it calls `submit`, `abort` and `step` from one thread. It never sees text,
adapter names or HTTP.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from adapters.base_model import BaseModelSpec
from adapters.parts import ActivationScales, ServingForm, SoftPrompt
from server.engine.adapter_slots import Residency
from server.engine.blocks import blocks_for
from server.engine.config import EngineConfig
from server.engine.grammar import MASK_SECONDS, Guide, Guides
from server.engine.grammar_check import GrammarRefused
from server.engine.grammar_compiler import Vocabulary
from server.engine.kv_cache import KVBlocks
from server.engine.loader import AdapterLoader, HostCache
from server.engine.model_runner import ModelRunner, StepRows
from server.engine.packed_linear import can_pack, pack_linears
from server.engine.request import (
    AdapterRef,
    Event,
    FailedEvent,
    FinishReason,
    GenerationRequest,
    ResidencyEvent,
    StatsEvent,
    TokenEvent,
    TokenLogprob,
)
from server.engine.sampler import Drawn, SampleRow, logprobs_of, sample
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.self_check import check_base, reference_logits
from server.engine.sequence import Sequence, SequenceState
from server.engine.step_plan import Chunk, StepPlan

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_LOAD_WAIT_SECONDS = 0.05
# How long a step waits for masks; an output whose mask is later draws its token in a later step.
_MASK_WAIT_SECONDS = 0.02
_FOLD_ATTEMPTS = 2
_NEVER_TOLD = ("disk", 0, 0)
# Adapters come and go for as long as a server runs: with more than these, idle ones are forgotten.
_MAX_KNOWN_ADAPTERS = 1024
# Fewer tokens than this fit no request worth serving, nor the self-check's probe.
_MIN_TOKENS = 32


class Engine:
    """Generates for many requests at once on one frozen base.

    Args:
        model: a causal language model of transformers, or one with the same names, in eval mode and
            already on its device.
        spec: its dimensions.
        config: sizes and limits.
        read_form: digest -> serving form; called on a thread of its own.
        read_vocabulary: for the first grammar; called on a thread of its own. None: no grammars.

    Raises:
        BaseUnsupported: the base gives other logits here than by itself.
        ValueError: `kv_bytes` has no room for a single short sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: BaseModelSpec,
        config: EngineConfig,
        read_form: Callable[[str], ServingForm],
        read_vocabulary: Callable[[], Vocabulary] | None = None,
    ) -> None:
        self.spec = spec
        self._fast_kernels = config.fast_kernels
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        num_blocks = _num_blocks(spec, config, dtype)
        self.limits = SchedulerLimits(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_running=config.max_running,
            max_step_tokens=config.max_step_tokens,
            prefill_chunk=config.prefill_chunk,
            max_adapter_blocks=max(1, int(num_blocks * config.adapter_kv_share)),
            num_scale_slots=config.scale_slots,
            prefix_caching=config.prefix_caching,
            prefill_tokens_beside=config.prefill_tokens_beside,
            per_adapter=config.batching == "per-adapter",
        )
        self.scheduler = Scheduler(self.limits)
        expected = reference_logits(model, spec)
        if config.packed_linears and can_pack(model):
            pack_linears(model)
        self.runner = ModelRunner(
            model,
            spec,
            num_blocks=num_blocks,
            block_size=config.block_size,
            num_scale_slots=config.scale_slots,
            prefill_chunk=config.prefill_chunk,
            fast_kernels=config.fast_kernels,
        )
        check_base(self.runner, spec, expected)
        folds_dir = Path(config.folds_dir) if config.folds_dir else None
        self._loader = AdapterLoader(read_form, spec, dtype, folds_dir)
        self._host = HostCache(config.host_bytes)
        self._guides = Guides(read_vocabulary, spec.vocab_size)
        self._held: dict[str, GenerationRequest] = {}  # until their grammar is compiled
        self._submitted_at: dict[str, float] = {}
        # (seconds in the queue, tokens found in the prefix cache), until the first token
        self._started: dict[str, tuple[float, int]] = {}
        self._prompt_logprobs: dict[str, list[TokenLogprob | None]] = {}
        # (residency, loads, evictions) as last reported
        self._told: dict[str, tuple[str, int, int]] = {}
        self._fold_rows: dict[str, torch.Tensor] = {}
        self._failed_folds: Counter[str] = Counter()
        self._loads_under_way = 0
        self._may_wait = False

    # --- commands --------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> list[Event]:
        """Queue a request; a list with its FailedEvent when it could never run."""
        reason = self._refusal(request)
        if reason is not None:
            return [FailedEvent(request.request_id, "too_long", reason)]
        self._submitted_at[request.request_id] = time.monotonic()
        self._may_wait = False
        if request.sampling.grammar is None:
            self.scheduler.add(request)
        else:
            self._held[request.request_id] = request
            self._guides.start(request.request_id, request.sampling)
        return []

    def abort(self, request_id: str) -> None:
        """Drop a request at once; unknown ids are ignored."""
        self.scheduler.abort(request_id)
        self._forget(request_id)

    def preload(self, ref: AdapterRef) -> None:
        """Make an adapter resident when there is room."""
        self.scheduler.preload(ref)

    def unload(self, digest: str) -> None:
        """Release an adapter's slot unless it is in use."""
        self.scheduler.unload(digest)

    def drop(self, digest: str) -> None:
        """As `unload`, and give its room in host memory back too."""
        self.scheduler.unload(digest)
        if self._host.drop(digest):
            self.scheduler.adapter_dropped(digest)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do, or will once a load ends or a grammar is compiled."""
        return self.scheduler.has_work or self._loads_under_way > 0 or bool(self._held)

    def close(self) -> None:
        """Stop the threads."""
        self._loader.close()
        self._guides.close()

    # --- the step --------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Run one step.

        A step after one with nothing to compute waits a moment for a load or a grammar that is under way.
        Whatever goes wrong inside ends the requests that it concerns; the engine goes on with the others.
        """
        events: list[Event] = []
        self._take_load(events)
        self._take_guided(events)
        plan = self.scheduler.schedule()
        self._hold_soft_rows(events)
        for digest in plan.loads:
            self._start_load(digest)
        self.runner.copy_blocks(plan.copies)
        self.runner.clear_blocks(plan.clears)
        self._install(plan, events)
        if plan.chunks:
            self._compute(plan, events)
        self._may_wait = not plan.chunks
        return events + self.residency_changes()

    def _compute(self, plan: StepPlan, events: list[Event]) -> None:
        self._note_started(plan)
        computed = self._in_halves(
            self._forward, plan.chunks, "the forward pass failed", events, lambda chunk: chunk
        )
        plan.chunks = [row.chunk for row, _ in computed]
        self.scheduler.complete(plan)
        self._draw(computed, events)
        for chunk in plan.chunks:
            fold = chunk.sequence
            if fold.fold_digest is None or fold.num_computed < fold.num_tokens:
                continue
            try:
                self._finish_fold(fold)
            except Exception as error:
                self._fail([chunk], "keeping a folded adapter failed", error, events)

    def _forward(self, chunks: list[Chunk]) -> list[tuple[StepRows, torch.Tensor]]:
        rows = [self._rows_of(chunk) for chunk in chunks]
        return list(zip(rows, self.runner.run(rows), strict=True))

    def _in_halves(
        self,
        work: Callable[[list[ItemT]], list[ResultT]],
        items: list[ItemT],
        what: str,
        events: list[Event],
        chunk_of: Callable[[ItemT], Chunk],
    ) -> list[ResultT]:
        """Do `work`; what fails is done again in two halves, down to the sequence that fails by itself.

        A row's arithmetic does not depend on the rest of the batch, so that halves give the same
        numbers; and they take less memory, the most frequent cause of failures.
        """
        try:
            return work(items) if items else []
        except torch.AcceleratorError:
            raise  # the device is of no use to this process any more: it ends, and is started again
        except Exception as error:
            if len(items) == 1:
                self._fail([chunk_of(items[0])], what, error, events)
                return []
            log.warning("%s for %d rows: %s; now in two halves", what, len(items), error)
        # Out here the failed attempt's tensors are gone.
        self.runner.release_memory()
        half = len(items) // 2
        first = self._in_halves(work, items[:half], what, events, chunk_of)
        return first + self._in_halves(work, items[half:], what, events, chunk_of)

    def _draw(self, computed: list[tuple[StepRows, torch.Tensor]], events: list[Event]) -> None:
        """A token for every row that is due one; a row whose choice fails, fails alone."""
        what = "choosing the next token failed"
        due: list[tuple[Chunk, torch.Tensor]] = []
        for row, out in computed:
            try:
                self._collect_prompt_logprobs(row, out)
            except Exception as error:
                self._fail([row.chunk], what, error, events)
                continue
            if row.chunk.samples:
                due.append((row.chunk, out[-1:]))
        masks = self._masks([chunk for chunk, _ in due], events)
        sampling = [(chunk, out) for chunk, out in due if chunk.sequence in masks]

        def draw(part: list[tuple[Chunk, torch.Tensor]]) -> list[tuple[Chunk, Drawn]]:
            logits = [out[0] for _, out in part]
            rows = [_sample_row(chunk.sequence, masks[chunk.sequence]) for chunk, _ in part]
            drawn = sample(logits, rows, fast=self._fast_kernels)
            return list(zip((chunk for chunk, _ in part), drawn, strict=True))

        for chunk, drawn in self._in_halves(draw, sampling, what, events, lambda item: item[0]):
            try:
                events.append(self._commit(chunk.sequence, drawn))
            except Exception as error:
                self._fail([chunk], what, error, events)

    def _fail(self, chunks: list[Chunk], what: str, error: Exception, events: list[Event]) -> None:
        """End the sequences of a step that failed, but for those that ended in it."""
        log.error("%s", what, exc_info=error)
        message = f"{what}: {str(error) or type(error).__name__}"
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.state is not SequenceState.RUNNING:
                continue
            if sequence.request is None:
                self._fail_fold(sequence, message, events)
                continue
            self.scheduler.finish(sequence)
            self._forget(sequence.request.request_id)
            events.append(FailedEvent(sequence.request.request_id, "engine_error", message))

    def _fail_fold(self, fold: Sequence, message: str, events: list[Event]) -> None:
        """Abandon a fold for now; its waiting sequences fail after the second time in a row."""
        digest = fold.fold_digest or ""
        self.scheduler.fold_failed(fold)
        self._fold_rows.pop(digest, None)
        self._failed_folds[digest] += 1
        if self._failed_folds[digest] >= _FOLD_ATTEMPTS:
            del self._failed_folds[digest]
            self._give_up_adapter(digest, "adapter_not_loaded", message, events)

    def _rows_of(self, chunk: Chunk) -> StepRows:
        sequence = chunk.sequence
        if sequence.fold_digest is not None:
            return StepRows(chunk, None, soft_rows=self._soft_rows(sequence.fold_digest))
        digest = sequence.adapter_digest
        entry = None if digest is None else self.scheduler.slots.entries[digest]
        return StepRows(chunk, entry, num_logits=_num_logits(chunk))

    def _hold_soft_rows(self, events: list[Event]) -> None:
        # Right after the fold was planned, and until it ends: its first rows are computed a step later,
        # and by then host memory may have wanted the room of its form.
        for sequence in [s for s in self.scheduler.running if s.fold_digest is not None]:
            try:
                self._soft_rows(sequence.fold_digest or "")
            except RuntimeError as error:  # it has only just started: no chunk of it is planned
                log.error("a fold could not start", exc_info=error)
                self._fail_fold(sequence, str(error), events)

    def _soft_rows(self, digest: str) -> torch.Tensor:
        if digest not in self._fold_rows:
            form = self._host.get(digest)
            if not isinstance(form, SoftPrompt):
                raise RuntimeError("a fold without its soft prompt")
            self._fold_rows[digest] = form.embeddings
        return self._fold_rows[digest]

    def _commit(self, sequence: Sequence, drawn: Drawn) -> Event:
        request = sequence.request
        assert request is not None  # noqa: S101 - folds do not sample
        if drawn.token_id is None:
            self.scheduler.discard(sequence)
            self._forget(request.request_id)
            return FailedEvent(
                request.request_id, "non_finite", "the model's logits were not finite for this row"
            )
        self.scheduler.append_token(sequence, drawn.token_id)
        guide = self._guides.get(request.request_id)
        reason = _finish_reason(sequence, drawn.token_id, guide)
        first = sequence.num_output_tokens == 1
        prompt_logprobs = self._prompt_logprobs.pop(request.request_id, None) if first else None
        started = self._started.pop(request.request_id, None) if first else None
        queue_seconds, cached_tokens = started or (None, None)
        event = TokenEvent(
            request.request_id,
            drawn.token_id,
            drawn.logprob,
            reason,
            None if prompt_logprobs is None else tuple(prompt_logprobs),
            queue_seconds,
            cached_tokens,
        )
        if reason is not None:
            self.scheduler.finish(sequence)
            self._forget(request.request_id)
        elif guide is not None:
            guide.advance(drawn.token_id)
        return event

    def _note_started(self, plan: StepPlan) -> None:
        now = time.monotonic()
        for chunk in plan.chunks:
            request = chunk.sequence.request
            if request is not None and request.request_id in self._submitted_at:
                waited = now - self._submitted_at.pop(request.request_id)
                # A prompt's first chunk begins where what was cached ends.
                self._started[request.request_id] = (waited, chunk.start)

    def _collect_prompt_logprobs(self, row: StepRows, out: torch.Tensor) -> None:
        sequence = row.chunk.sequence
        if sequence.prompt_logprobs_done or sequence.request is None:
            return
        sampling = sequence.request.sampling
        unwanted: list[TokenLogprob | None] = [None] * max(1, sampling.prompt_logprobs_from)
        collected = self._prompt_logprobs.setdefault(sequence.request.request_id, unwanted)
        # A preempted prompt starts again: what was collected already stands.
        first = row.chunk.start + row.chunk.num_tokens - len(out) + 1
        targets = sequence.token_ids[first : first + len(out)]
        targets = targets[: max(0, sequence.num_prompt_tokens - first)]
        known = len(collected) - first
        if known < len(targets):
            part = out[known : len(targets)]
            collected += logprobs_of(
                part, targets[known:], sampling.num_logprobs or 0, fast=self._fast_kernels
            )
        if row.chunk.samples:
            sequence.prompt_logprobs_done = True

    # --- grammars --------------------------------------------------------------------------

    def _take_guided(self, events: list[Event]) -> None:
        """Queue the requests whose grammar is compiled now."""
        if not self._held:
            return
        waits = self._may_wait and not self._loads_under_way
        for started in self._guides.poll(_LOAD_WAIT_SECONDS if waits else None):
            request = self._held.pop(started.request_id)
            if started.refusal is None:
                self.scheduler.add(request)
            else:
                self._forget(request.request_id)
                failed = FailedEvent(request.request_id, "grammar_invalid", started.refusal)
                events.append(failed)

    def _masks(
        self, chunks: list[Chunk], events: list[Event]
    ) -> dict[Sequence, torch.Tensor | None]:
        """The sequences that draw a token now, each with the ids that its grammar allows, if it has one.

        One whose mask is late is left out: its newest token is computed again in the next step.
        """
        deadline = time.monotonic() + _MASK_WAIT_SECONDS
        masks: dict[Sequence, torch.Tensor | None] = {}
        for chunk in chunks:
            sequence = chunk.sequence
            request_id = sequence.request.request_id if sequence.request is not None else ""
            guide = self._guides.get(request_id)
            if guide is None:
                masks[sequence] = None
                continue
            # A prompt's last chunk is not computed twice: a single token takes another path.
            wait = deadline - time.monotonic() if chunk.num_tokens == 1 else MASK_SECONDS
            try:
                allowed = guide.allowed(max(0.0, wait))
            except GrammarRefused as refusal:
                self.scheduler.finish(sequence)
                self._forget(request_id)
                events.append(FailedEvent(request_id, "grammar_invalid", str(refusal)))
                continue
            except Exception as error:
                self._fail([chunk], "following the grammar failed", error, events)
                continue
            if allowed is None:
                sequence.num_computed -= 1
            else:
                masks[sequence] = allowed
        return masks

    # --- adapters --------------------------------------------------------------------------

    def _start_load(self, digest: str) -> None:
        form = self._host.get(digest)
        if form is not None:
            self.scheduler.adapter_loaded(digest, needs_fold=isinstance(form, SoftPrompt))
            return
        self._loads_under_way += 1
        self._loader.start(digest)

    def _take_load(self, events: list[Event]) -> None:
        # One a step: another one at once could drop it from host memory before it was installed.
        if not self._loads_under_way:
            return
        loaded = self._loader.poll(timeout=_LOAD_WAIT_SECONDS if self._may_wait else None)
        if loaded is None:
            return
        self._loads_under_way -= 1
        ref = self.scheduler.slots.entries[loaded.digest].ref
        if loaded.form is None:
            code = "adapter_corrupt" if loaded.corrupt else "adapter_not_loaded"
            message = f"the adapter cannot be read: {loaded.error}"
            self._give_up_adapter(loaded.digest, code, message, events)
            return
        expected = _kind(ref.num_virtual_tokens, ref.uses_scales)
        came = _kind(loaded.form.num_virtual_tokens, isinstance(loaded.form, ActivationScales))
        if came != expected:
            message = f"the adapter is not what its record says: expected {expected}, came {came}"
            self._give_up_adapter(loaded.digest, "adapter_corrupt", message, events)
        else:
            self.scheduler.slots.entries[loaded.digest].num_loads += 1
            self._keep(loaded.digest, loaded.form)
            needs_fold = isinstance(loaded.form, SoftPrompt)
            self.scheduler.adapter_loaded(loaded.digest, needs_fold=needs_fold)

    def _give_up_adapter(self, digest: str, code: str, message: str, events: list[Event]) -> None:
        """End every request that waits for an adapter; the next one that comes tries again."""
        for sequence in self.scheduler.adapter_failed(digest):
            if sequence.request is not None:
                self._forget(sequence.request.request_id)
                events.append(FailedEvent(sequence.request.request_id, code, message))

    def _keep(self, digest: str, form: ServingForm) -> None:
        for dropped in self._host.put(digest, form):
            self.scheduler.adapter_dropped(dropped)

    def _install(self, plan: StepPlan, events: list[Event]) -> None:
        for entry in plan.installs:
            digest = entry.ref.digest
            if entry.residency is not Residency.DEVICE:
                continue  # evicted again for another one in the same plan
            try:
                form = self._host.get(digest)
                if form is None:
                    raise RuntimeError("an adapter without its host form")
                self.runner.install(entry, form)
            except Exception as error:
                # It was made resident for this very step: nothing outside the plan uses it.
                users = [c for c in plan.chunks if c.sequence.adapter_digest == digest]
                plan.chunks = [chunk for chunk in plan.chunks if chunk not in users]
                self._fail(users, "an adapter could not be put on the device", error, events)
                self.scheduler.unload(digest)

    def _finish_fold(self, fold: Sequence) -> None:
        digest = fold.fold_digest or ""
        folded = self.runner.read_fold(self.scheduler.slots.entries[digest])
        self.scheduler.fold_finished(fold)
        self._fold_rows.pop(digest, None)
        self._failed_folds.pop(digest, None)
        self._keep(digest, folded)
        self._loader.keep_fold(digest, folded)

    # --- counters -----------------------------------------------------------------------------

    def _refusal(self, request: GenerationRequest) -> str | None:
        prefix, most = request.num_virtual_tokens, self.spec.max_positions
        if prefix + request.num_own_positions > most:
            prompt, new = len(request.prompt_token_ids), request.sampling.max_new_tokens
            return (
                f"{prefix} virtual tokens, {prompt} prompt tokens and {new} new tokens make "
                f"{prefix + prompt + new}; the base has {most} positions and the last new token takes "
                f"none: expected at most {most + 1}"
            )
        return self.scheduler.refusal(request)

    def _forget(self, request_id: str) -> None:
        self._submitted_at.pop(request_id, None)
        self._started.pop(request_id, None)
        self._prompt_logprobs.pop(request_id, None)
        self._held.pop(request_id, None)
        self._guides.forget(request_id)

    def residency_changes(self) -> list[Event]:
        """Adapters that moved since the last call; `step` includes them in its events."""
        names = {Residency.DEVICE: "device", Residency.HOST: "host", Residency.FOLDING: "host"}
        changes: list[Event] = []
        for entry in self.scheduler.slots.take_moved():
            digest = entry.ref.digest
            now = names.get(entry.residency, "disk")
            before = self._told.get(digest, _NEVER_TOLD)
            after = (now, entry.num_loads, entry.num_evictions)
            if before != after:
                self._told[digest] = after
                loads, evictions = after[1] - before[1], after[2] - before[2]
                changes.append(
                    ResidencyEvent(digest, now, entry.ref.name, loads, evictions)  # type: ignore[arg-type]
                )
        if len(self._told) > _MAX_KNOWN_ADAPTERS:
            # Only now: their moves have been reported.
            for digest in self.scheduler.forget_idle():
                self._told.pop(digest, None)
                self._failed_folds.pop(digest, None)
        return changes

    def stats(self) -> StatsEvent:
        """Counts of now."""
        return StatsEvent(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting + len(self._held),
            kv_blocks_used=self.scheduler.pool.num_used,
            kv_blocks_total=self.scheduler.pool.num_blocks,
            prefix_query_tokens=self.scheduler.prefix_query_tokens,
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            num_preemptions=self.scheduler.num_preemptions,
        )


def _num_blocks(spec: BaseModelSpec, config: EngineConfig, dtype: torch.dtype) -> int:
    per_block = KVBlocks.bytes_per_block(spec, config.block_size, dtype)
    tokens = min(_MIN_TOKENS, spec.max_positions)
    least = per_block * blocks_for(tokens, config.block_size)
    if config.kv_bytes < least:
        raise ValueError(
            f"kv_bytes is {config.kv_bytes}, expected at least {least}: "
            f"keys and values of {tokens} tokens of this base take that much"
        )
    return config.kv_bytes // per_block


def _kind(num_virtual_tokens: int, uses_scales: bool) -> str:
    return "scales" if uses_scales else f"{num_virtual_tokens} virtual tokens"


def _num_logits(chunk: Chunk) -> int:
    """Of how many of its last tokens the logits are needed."""
    sequence = chunk.sequence
    if sequence.prompt_logprobs_done or sequence.request is None:
        return int(chunk.samples)
    wanted = max(0, sequence.request.sampling.prompt_logprobs_from - 1)
    end = chunk.start + chunk.num_tokens
    return max(int(chunk.samples), end - max(chunk.start, wanted))


def _sample_row(sequence: Sequence, allowed: torch.Tensor | None) -> SampleRow:
    assert sequence.request is not None  # noqa: S101 - folds do not sample
    return SampleRow(
        sequence.request.sampling, sequence.token_ids, sequence.num_prompt_tokens, allowed
    )


def _finish_reason(sequence: Sequence, token_id: int, guide: Guide | None) -> FinishReason | None:
    assert sequence.request is not None  # noqa: S101 - folds do not sample
    sampling = sequence.request.sampling
    ends = not sampling.ignore_eos and token_id in sampling.eos_token_ids
    if ends if guide is None else guide.ends(token_id):
        return "eos"
    if sequence.num_output_tokens >= sampling.max_new_tokens:
        return "length"
    return None
