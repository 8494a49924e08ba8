"""What the next step computes.

The scheduler decides, on plain numbers, which sequences run, how many tokens each gets, which
adapters come and go, and who gives way when KV runs out. It knows no tensors, clocks or threads.

The rules, in the order in which `schedule` applies them:

1. Running sequences first, oldest first. One that needs a block while none is free evicts an idle
   adapter, else the youngest running sequence is preempted: its blocks go, its tokens stay, and it
   is prefilled again later. Nothing is emitted twice, since its output is part of what is prefilled.
2. Preempted sequences come back before anything new is admitted, oldest first. So the oldest
   sequence always moves, and every sequence becomes the oldest at some time.
3. New sequences are admitted from one queue an adapter, one at a time in rotation, so that an
   adapter with a long queue cannot keep others out. An adapter that is being read is passed by; one
   that does not fit is passed by too, but only MAX_PASSED_OVER times: then nobody else is admitted
   until it fits.

A sequence starts from the longest beginning that the prefix cache knows. While a running sequence is
still computing a longer part of the same beginning, it waits: that part is computed once, for all.

While sequences decode, a step computes `prefill_tokens_beside` tokens of prompts at most, so that a
long prompt does not stall the streams; unless as many sequences wait for their prompts as decode, which
then wait for them: of many requests that come at once the first would hold up the others. Adapters take
turns in that share, those that wait for admission included: one chunk each, the oldest sequence of an
adapter first. The oldest sequence of all then moves once a round instead of in every step, and keeps its
blocks meanwhile.

An adapter that crowds the others (`turns.crowd`) gives way to them: it leaves a few places free, and
prompts of theirs that end within a step have every second one to themselves, with as many tokens as beside
streams. So a first token waits for a step of the crowd, and not for a place or for its rows as well.

With `per_adapter` a step computes rows of one adapter only, by deficit round robin over tokens; the
base counts as one. The rules hold within that adapter. While a sequence is preempted, the oldest one's
adapter is served, so that it ends and gives back its blocks.

A prompt's chunks end at multiples of `prefill_chunk` from the start of its own tokens. A step's token
budget defers a chunk but never cuts it, so that the arithmetic of a row is the same in any batch. What
is left once everybody has a chunk goes to further chunks of the same prompts, the oldest first: the runner
computes each as if it had come alone. While a sequence decodes only prompts of WHOLE_CHUNKS get them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass

from server.engine.adapter_slots import AdapterEntry, AdapterSlots, Residency
from server.engine.blocks import BlockPool, blocks_for, room_in_blocks
from server.engine.fairness import Budget, Turns, crowd
from server.engine.prefix_cache import NOTHING, PrefixCache
from server.engine.request import AdapterRef, GenerationRequest
from server.engine.round_robin import RoundRobin
from server.engine.sequence import Sequence, SequenceState
from server.engine.step_plan import Chunk, StepPlan, side_by_side

MAX_PASSED_OVER = 64
# Loaded adapters are held until a step takes them; more would exceed host memory.
MAX_LOADS = 4
# A prompt of so many chunks is computed in one step beside streams too. 48 tokens had their first token
# after 37 ms where two steps took 54; with 4 chunks mixed traffic was 1 to 4 % slower and its longest steps
# longer.
WHOLE_CHUNKS = 2
# A crowding adapter leaves one place in so many free: others arrive one by one, and each end makes room.
SPARE_PLACES = 16


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes that the scheduler must keep; see `EngineConfig` for their meaning."""

    num_blocks: int
    block_size: int
    max_running: int
    max_step_tokens: int
    prefill_chunk: int
    max_adapter_blocks: int
    num_scale_slots: int
    prefix_caching: bool = True
    prefill_tokens_beside: int | None = None
    per_adapter: bool = False

    def room(self, num_virtual_tokens: int) -> int:
        """Positions that prompt and output have in the KV blocks beside a prefix in blocks of its own."""
        return room_in_blocks(self.num_blocks, self.block_size, num_virtual_tokens)

    @property
    def max_virtual_tokens(self) -> int:
        """Virtual tokens of one adapter at most, so that its request has a block left."""
        return min(self.max_adapter_blocks, self.num_blocks - 1) * self.block_size


def _turn_of(sequence: Sequence) -> str | None:
    """Whose turn a sequence takes: its adapter's, and a fold that of the adapter that it makes."""
    return sequence.fold_digest or sequence.adapter_digest


class Scheduler:
    """Queues, running sequences, blocks and slots of one engine."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.prefixes = PrefixCache(self.pool, limits.block_size)
        self.slots = AdapterSlots(
            self.pool, limits.block_size, limits.max_adapter_blocks, limits.num_scale_slots
        )
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._preempted: list[Sequence] = []
        self._queues: OrderedDict[str | None, deque[Sequence]] = OrderedDict()
        self._passed_over: dict[str | None, int] = {}
        self._preloads: deque[AdapterEntry] = deque()
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._turns = Turns()
        # Worth a step of single tokens, so that adapters whose sequences decode serve a step each.
        self._served_alone = RoundRobin(limits.max_running)
        self._oldest_waited = 0  # steps since the oldest sequence moved
        self._crowd: Collection[str | None] = ()
        self._made_way = False  # whether the step before was one for the crowded ones

    # --- what comes in ---------------------------------------------------------------------

    def refusal(self, request: GenerationRequest) -> str | None:
        """Why the request could never run here, or None when it can."""
        reason = None if request.adapter is None else self._adapter_refusal(request.adapter)
        if reason is not None:
            return reason
        prefix, tokens = request.num_virtual_tokens, request.num_own_positions
        block_size = self.limits.block_size
        need = blocks_for(prefix, block_size) + blocks_for(tokens, block_size)
        if need > self.limits.num_blocks:
            return (
                f"{tokens} positions and {prefix} virtual tokens need {need} KV blocks, "
                f"the engine has {self.limits.num_blocks}"
            )
        return None

    def _adapter_refusal(self, ref: AdapterRef) -> str | None:
        need = blocks_for(ref.num_virtual_tokens, self.limits.block_size)
        if need > self.limits.max_adapter_blocks:
            return (
                f"the adapter's {ref.num_virtual_tokens} virtual tokens need {need} KV blocks, "
                f"adapters may hold {self.limits.max_adapter_blocks}"
            )
        if ref.uses_scales and not self.limits.num_scale_slots:
            return "the engine has no scale slots"
        return None

    def add(self, request: GenerationRequest) -> Sequence:
        """Queue a request that `refusal` let through."""
        sequence = Sequence.of(request, self._next_arrival())
        self._sequences[request.request_id] = sequence
        if request.adapter is not None:
            self.slots.entry(request.adapter).leaves = False
        self._queues.setdefault(sequence.adapter_digest, deque()).append(sequence)
        return sequence

    def abort(self, request_id: str) -> Sequence | None:
        """Drop a sequence in whatever state it is; None when it is not known (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.finish(sequence)
        return sequence

    def preload(self, ref: AdapterRef) -> None:
        """Make an adapter resident when there is room, without a request.

        One that could never be is left alone: its requests are refused with the reason.
        """
        if self._adapter_refusal(ref) is not None:
            return
        entry = self.slots.entry(ref)
        entry.leaves = False
        if entry not in self._preloads:
            self._preloads.append(entry)

    def unload(self, digest: str) -> bool:
        """Release an adapter's slot; False if it holds none, or if it is no longer used."""
        entry = self.slots.entries.get(digest)
        if entry is None:
            return False
        entry.leaves = bool(entry.pins) or digest in self._queues
        if entry.pins or entry.residency is not Residency.DEVICE:
            return False
        self.slots.release(entry)
        return True

    def forget_idle(self) -> list[str]:
        """Drop the entries of adapters that are on disk only and not waited for; returns their digests."""
        wanted = {sequence.adapter_digest for sequence in self._preempted} | self._queues.keys()
        wanted |= {entry.ref.digest for entry in self._preloads}
        idle = [
            digest
            for digest, entry in self.slots.entries.items()
            if entry.residency is Residency.DISK and not entry.on_host and digest not in wanted
        ]
        for digest in idle:
            del self.slots.entries[digest]
        return idle

    def adapter_loaded(self, digest: str, *, needs_fold: bool) -> None:
        """The adapter's host form is in memory."""
        entry = self.slots.entries[digest]
        self.slots.move(entry, Residency.HOST)
        entry.on_host = True
        entry.needs_fold = needs_fold

    def adapter_dropped(self, digest: str) -> None:
        """The adapter's host form left memory."""
        entry = self.slots.entries.get(digest)
        if entry is None:
            return
        entry.on_host = False
        if entry.residency is Residency.HOST:
            self.slots.move(entry, Residency.DISK)

    def adapter_failed(self, digest: str) -> list[Sequence]:
        """The adapter cannot be read: its waiting sequences, finished, for the caller to report."""
        entry = self.slots.entries[digest]
        if entry.residency is Residency.LOADING:
            self.slots.move(entry, Residency.DISK)
        if entry in self._preloads:
            self._preloads.remove(entry)
        failed = list(self._queues.get(digest, ()))
        failed += [sequence for sequence in self._preempted if sequence.adapter_digest == digest]
        for sequence in failed:
            self.finish(sequence)
        return failed

    def fold_finished(self, fold: Sequence) -> AdapterEntry:
        """All rows of a fold are computed: its blocks become the adapter's shared segment."""
        assert fold.fold_digest is not None  # noqa: S101 - a fold by construction
        entry = self.slots.entries[fold.fold_digest]
        fold.block_ids = []
        fold.to(SequenceState.FINISHED)
        self.running.remove(fold)
        self.slots.move(entry, Residency.DEVICE)
        entry.needs_fold = False
        entry.pins -= 1
        return entry

    def fold_failed(self, fold: Sequence) -> None:
        """A fold's step failed: its slot is given back and the adapter is as before the fold."""
        assert fold.fold_digest is not None  # noqa: S101 - a fold by construction
        entry = self.slots.entries[fold.fold_digest]
        fold.block_ids = []
        fold.to(SequenceState.FINISHED)
        self.running.remove(fold)
        entry.pins -= 1
        self.slots.release(entry)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands, and give back what it holds."""
        if sequence.state is SequenceState.RUNNING:
            self._leave_running(sequence)
        elif sequence.state is SequenceState.PREEMPTED:
            self._preempted.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._dequeue(sequence)
        sequence.to(SequenceState.FINISHED)
        if sequence.request is not None:
            self._sequences.pop(sequence.request.request_id, None)

    def discard(self, sequence: Sequence) -> None:
        """As `finish`, for a sequence whose keys and values are not to be trusted."""
        self.prefixes.forget(sequence.block_ids)
        self.finish(sequence)

    def append_token(self, sequence: Sequence, token_id: int) -> None:
        """Commit a drawn token."""
        sequence.token_ids.append(token_id)

    # --- what is there ---------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks: queued or preempted."""
        return sum(len(queue) for queue in self._queues.values()) + len(self._preempted)

    @property
    def has_work(self) -> bool:
        """Whether a step could do anything, now or once a load ends."""
        return bool(self.running or self._preempted or self._queues or self._preloads)

    # --- the step --------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan one step; blocks and slots it needs are taken when it returns."""
        plan = StepPlan()
        if self.limits.per_adapter:
            self._serve_one_adapter(plan)
        else:
            self._serve_all(plan)
        if not self._preempted:
            self._start_preloads(plan)
        plan.chunks.sort(key=side_by_side)
        return plan

    def complete(self, plan: StepPlan) -> None:
        """The step's KV is in place."""
        for chunk in plan.chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            if self.limits.prefix_caching and chunk.sequence.request is not None:
                self.prefixes.note(chunk.sequence)

    def _serve_all(self, plan: StepPlan) -> None:
        oldest = self._oldest()
        counts = Counter(_turn_of(sequence) for sequence in self.running)
        self._crowd = crowd(counts, self._queues, self.limits.max_running)
        self._made_way = self._make_way(plan)
        if not self._made_way:
            budget = self._schedule_running(plan, oldest)
            if not plan.preempted:
                self._resume(plan, budget)
                if not self._preempted:
                    self._admit(plan, budget)
                self._extend(plan, budget)
        moved = oldest is None or any(chunk.sequence is oldest for chunk in plan.chunks)
        self._oldest_waited = 0 if moved else self._oldest_waited + 1

    def _make_way(self, plan: StepPlan) -> bool:
        """Plan prompts of crowded adapters, and nothing else; False if they have none.

        Not in two steps in a row: the streams wait for one step at most.
        """
        if not self._crowd or self._made_way:
            return False
        by_age = sorted(self.running, key=lambda sequence: sequence.arrival)
        budget = self._budget([s for s in by_age if self._is_decode(s)])
        prompts = [s for s in by_age if not self._is_decode(s)]
        heads = [*prompts, *self._preempted[:1], *(queue[0] for queue in self._queues.values())]
        long = {_turn_of(s) for s in heads if not self._is_short(s)}
        self._take_turns(plan, prompts, budget, left_out={*self._crowd, *long})
        self._extend(plan, budget)
        return bool(plan.chunks)

    def _serve_one_adapter(self, plan: StepPlan) -> None:
        """Plan the adapter whose turn it is; one that cannot run yet, as it is being read, is skipped."""
        by_age = sorted(self.running, key=lambda sequence: sequence.arrival)
        adapters = [_turn_of(sequence) for sequence in by_age + self._preempted]
        order = self._served_alone.order([*adapters, *self._queues])
        oldest = self._oldest()
        # An adapter served out of turn admits no further sequences: memory would be short again at
        # once, and no other adapter would get a turn.
        admits = not self._preempted
        if self._preempted and oldest is not None:
            # Memory is short: the oldest sequence has to end for the others to come back.
            order.insert(0, _turn_of(oldest))
        for key in order:
            self._serve(plan, key, [s for s in by_age if _turn_of(s) == key], admits=admits)
            if plan.chunks:
                self._served_alone.served(key, plan.num_tokens)
                return

    def _serve(
        self, plan: StepPlan, key: str | None, running: list[Sequence], *, admits: bool
    ) -> None:
        """Plan one adapter's sequences, the oldest first, then single tokens, then new ones."""
        decodes = [s for s in running if self._is_decode(s)]
        budget = self._budget(decodes)
        first = [s for s in running if s.request is not None][:1]
        rest = [s for s in running if not self._is_decode(s)]
        for sequence in first + [s for s in decodes + rest if s not in first]:
            self._continue(plan, sequence, budget)
        if plan.preempted:
            return
        while self._preempted and _turn_of(self._preempted[0]) == key:
            if not self._resume_first(plan, budget):
                break
        while admits and not self._preempted and key in self._queues and key in self._admissible():
            if not self._admit_from(plan, key, budget):
                break
        self._extend(plan, budget)

    def _budget(self, decodes: list[Sequence]) -> Budget:
        most, beside = self.limits.max_step_tokens, self.limits.prefill_tokens_beside
        streams = [s for s in self.running if s.request is not None and self._is_decode(s)]
        prompts = sum(not self._is_decode(s) for s in self.running)
        prompts += min(self.num_waiting, self.limits.max_running - len(self.running))
        is_bounded = any(s.request is not None for s in decodes) and prompts < len(streams)
        share = beside if beside is not None and is_bounded else most
        return Budget(most, share, bool(streams))

    def _extend(self, plan: StepPlan, budget: Budget) -> None:
        """Further chunks of the step's prompts, while there is unclaimed room."""
        if plan.preempted:
            return
        for index, chunk in enumerate(plan.chunks):
            sequence, size = chunk.sequence, chunk.num_tokens
            if budget.streams and not self._is_short(sequence):
                continue
            while (left := sequence.num_tokens - chunk.start - size) > 0:
                more = min(left, self.limits.prefill_chunk)
                need = self._num_missing(sequence, chunk.start + size + more)
                if not budget.allows_more(more, size) or need > self.pool.num_free:
                    break
                self._take_blocks(plan, sequence, need)
                budget.take_more(more, size)
                size += more
            plan.chunks[index] = Chunk.of(sequence, chunk.start, size)

    def _schedule_running(self, plan: StepPlan, oldest: Sequence | None) -> Budget:
        """Plan what is under way; returns what is left of the step.

        The oldest request comes first, since no other may take its blocks before it; then single
        tokens. The budget holds one chunk and a token for every other sequence, so every decode has
        a place, whatever prompts are under way.
        """
        by_age = sorted(self.running, key=lambda sequence: sequence.arrival)
        decodes = [s for s in by_age if self._is_decode(s)]
        prompts = [s for s in by_age if not self._is_decode(s)]
        budget = self._budget(decodes)
        shared = budget.prompt_tokens < budget.tokens
        first = oldest
        if oldest is not None and shared and not self._is_decode(oldest) and not self._is_overdue():
            first = None
        for sequence in ([] if first is None else [first]) + [s for s in decodes if s is not first]:
            self._continue(plan, sequence, budget)
        if shared:
            self._take_turns(plan, prompts, budget)
        taken = {id(chunk.sequence) for chunk in plan.chunks}
        for sequence in [s for s in prompts if id(s) not in taken]:
            self._continue(plan, sequence, budget)
        return budget

    def _continue(self, plan: StepPlan, sequence: Sequence, budget: Budget) -> None:
        """Compute a running sequence's next chunk if there is a place and room for it."""
        if sequence.state is not SequenceState.RUNNING:
            return  # preempted for an older one in this very step
        size = sequence.next_chunk(self.limits.prefill_chunk)
        if budget.allows(size) and self._grow(sequence, size, plan):
            self._take(plan, sequence, size, budget)

    def _take_turns(
        self,
        plan: StepPlan,
        prompts: list[Sequence],
        budget: Budget,
        left_out: Collection[str | None] = (),
    ) -> None:
        """One chunk for each adapter whose turn it is, of prompts that run or could join."""
        heads: dict[str | None, Sequence] = {}
        taken = {id(chunk.sequence) for chunk in plan.chunks}
        for sequence in [s for s in prompts if id(s) not in taken]:
            heads.setdefault(_turn_of(sequence), sequence)
        back = [_turn_of(sequence) for sequence in self._preempted[:1]]
        for key in self._turns.order([*heads, *back, *self._queues]):
            if budget.prompt_tokens <= 0:
                return
            if key in left_out:
                continue
            if key in heads:
                self._continue(plan, heads[key], budget)
            elif not plan.preempted:
                self._join(plan, key, budget)

    def _join(self, plan: StepPlan, key: str | None, budget: Budget) -> None:
        if self._preempted:
            if _turn_of(self._preempted[0]) == key:
                self._resume_first(plan, budget)
        elif key in self._queues and key in self._admissible():
            self._admit_from(plan, key, budget)

    def _is_overdue(self) -> bool:
        """Whether the oldest sequence has waited for a round of turns."""
        return self._oldest_waited >= min(len(self._turns), self.limits.max_running)

    def _oldest(self) -> Sequence | None:
        requests = [s for s in self.running if s.request is not None]
        return min(requests, key=lambda sequence: sequence.arrival, default=None)

    def _is_short(self, sequence: Sequence) -> bool:
        return sequence.num_tokens <= WHOLE_CHUNKS * self.limits.prefill_chunk

    def _is_decode(self, sequence: Sequence) -> bool:
        return sequence.num_tokens - sequence.num_computed == 1

    def _take(self, plan: StepPlan, sequence: Sequence, size: int, budget: Budget) -> None:
        plan.chunks.append(Chunk.of(sequence, sequence.num_computed, size))
        entry = self._entry_of(sequence)
        if entry is not None:
            self.slots.touch(entry)
        budget.take(size)
        if size > 1:
            self._turns.served(_turn_of(sequence))

    def _grow(self, sequence: Sequence, size: int, plan: StepPlan) -> bool:
        """Give `sequence` blocks for `size` more tokens, preempting the youngest if need be."""
        need = self._num_missing(sequence, sequence.num_computed + size)
        while need > 0 and not self.slots.make_room(need):
            victim = None if plan.joined else self._youngest(plan, sequence)
            if victim is None or (victim is sequence and not self._is_youngest(sequence)):
                return False  # younger ones already move in this step: wait, they will end
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        self._take_blocks(plan, sequence, need)
        return True

    def _num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that `sequence` lacks for its first `num_tokens` tokens."""
        return blocks_for(num_tokens, self.limits.block_size) - len(sequence.block_ids)

    def _take_blocks(self, plan: StepPlan, sequence: Sequence, count: int) -> None:
        """Give `sequence` free blocks; the step fills all of them but the last one to the end."""
        if count > 0:
            taken = self.pool.allocate(count) or []
            sequence.block_ids += taken
            plan.clears += taken[-1:]

    def _youngest(self, plan: StepPlan, growing: Sequence) -> Sequence | None:
        """The youngest running request that this step does not compute already.

        Folds never yield, nor does the oldest request to another, though it may not have moved yet.
        """
        taken = {id(chunk.sequence) for chunk in plan.chunks}
        oldest = self._oldest()
        if oldest is not None and oldest is not growing:
            taken.add(id(oldest))
        candidates = [s for s in self.running if s.request is not None and id(s) not in taken]
        return max(candidates, key=lambda sequence: sequence.arrival, default=None)

    def _is_youngest(self, sequence: Sequence) -> bool:
        return all(s.arrival <= sequence.arrival for s in self.running if s.request is not None)

    def _preempt(self, sequence: Sequence, plan: StepPlan) -> None:
        self._leave_running(sequence)
        sequence.num_computed = sequence.num_noted = 0
        sequence.to(SequenceState.PREEMPTED)
        self._preempted.append(sequence)
        self._preempted.sort(key=lambda s: s.arrival)
        plan.preempted.append(sequence)
        self.num_preemptions += 1

    def _resume(self, plan: StepPlan, budget: Budget) -> None:
        while self._preempted and self._resume_first(plan, budget):
            pass

    def _resume_first(self, plan: StepPlan, budget: Budget) -> bool:
        sequence = self._preempted[0]
        if not self._try_start(plan, sequence, budget):
            return False
        self._preempted.pop(0)
        self._start(plan, sequence, budget)
        return True

    def _admit(self, plan: StepPlan, budget: Budget) -> None:
        # Every pass over the rotation admits at most one sequence an adapter.
        admitted = True
        while admitted:
            admitted = False
            for key in self._admissible():
                admitted = self._admit_from(plan, key, budget) or admitted

    def _admissible(self) -> list[str | None]:
        """Adapters with waiting sequences, in rotation; only those passed by too often, if any are."""
        starved = [k for k, count in self._passed_over.items() if count >= MAX_PASSED_OVER]
        return starved or list(self._queues)

    def _admit_from(self, plan: StepPlan, key: str | None, budget: Budget) -> bool:
        places = self.limits.max_running
        spare = -(-places // SPARE_PLACES) if key in self._crowd else 0
        if len(self.running) >= places - spare:
            return False
        sequence = self._queues[key][0]
        if not self._try_start(plan, sequence, budget):
            return False
        self._dequeue(sequence)
        if key in self._queues:
            self._queues.move_to_end(key)
        self._start(plan, sequence, budget)
        self._passed_over.pop(key, None)
        for other in self._passed_over:
            self._passed_over[other] += 1
        return True

    def _try_start(self, plan: StepPlan, sequence: Sequence, budget: Budget) -> bool:
        """Whether `sequence` can join now; its adapter is made resident on the way.

        True leaves the blocks of the sequence's first chunk free for the taking.
        """
        if len(self.running) >= self.limits.max_running:
            return False
        if budget.tokens <= 0 or budget.prompt_tokens <= 0:
            return False
        entry = self._entry_of(sequence)
        away = entry is not None and entry.residency is not Residency.DEVICE
        if entry is not None and away and not self._make_resident(plan, entry, sequence):
            return False
        if not self._take_prefix(plan, sequence, entry):
            return False
        if not budget.allows(sequence.next_chunk(self.limits.prefill_chunk)):
            self._leave_prefix(plan, sequence)
            return False
        return True

    def _take_prefix(self, plan: StepPlan, sequence: Sequence, entry: AdapterEntry | None) -> bool:
        """Give `sequence` what is known of its beginning, and see that there is room for the rest."""
        if not self.limits.prefix_caching:
            match = NOTHING
        else:
            match = self.prefixes.match(sequence)
            if self.prefixes.is_under_way(sequence, match, self.running):
                return False
        copy = self.prefixes.attach(sequence, match)
        if copy is not None:
            plan.copies.append(copy)
        # Room for the whole of what is known, so that admission does not cause preemption at once.
        if self.slots.make_room(self._num_missing(sequence, sequence.num_tokens), keep=entry):
            return True
        self._leave_prefix(plan, sequence)
        self._note_blocked(sequence)
        return False

    def _leave_prefix(self, plan: StepPlan, sequence: Sequence) -> None:
        """Undo `_take_prefix`."""
        plan.copies = [copy for copy in plan.copies if copy[1] not in sequence.block_ids]
        self.prefixes.detach(sequence)

    def _make_resident(
        self, plan: StepPlan, entry: AdapterEntry, sequence: Sequence | None
    ) -> bool:
        """Move an adapter towards the device; True when it is there, before the forward pass runs."""
        if entry.residency is Residency.DISK and self._may_load():
            self.slots.move(entry, Residency.LOADING)
            plan.loads.append(entry.ref.digest)
        if entry.residency is not Residency.HOST:
            return False
        if entry.needs_fold and len(self.running) >= self.limits.max_running:
            return False  # a preload's fold takes a place like any sequence
        if not self.slots.take_slot(entry):
            if sequence is not None:
                self._note_blocked(sequence)
            return False
        if entry.needs_fold:
            self._start_fold(plan, entry)
            return False
        self.slots.move(entry, Residency.DEVICE)
        plan.installs.append(entry)
        return True

    def _may_load(self) -> bool:
        loading = [e for e in self.slots.entries.values() if e.residency is Residency.LOADING]
        return len(loading) < MAX_LOADS

    def _start_fold(self, plan: StepPlan, entry: AdapterEntry) -> None:
        rows = entry.ref.num_virtual_tokens
        plan.clears += entry.block_ids
        fold = Sequence.fold(entry.ref.digest, rows, entry.block_ids, self._next_arrival())
        self.slots.move(entry, Residency.FOLDING)
        entry.pins += 1
        self.running.append(fold)

    def _note_blocked(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.WAITING:
            self._passed_over.setdefault(sequence.adapter_digest, 0)

    def _start(self, plan: StepPlan, sequence: Sequence, budget: Budget) -> None:
        size = sequence.next_chunk(self.limits.prefill_chunk)
        need = self._num_missing(sequence, sequence.num_computed + size)
        self._take_blocks(plan, sequence, need)
        self.prefix_query_tokens += sequence.num_tokens
        self.prefix_hit_tokens += sequence.num_computed
        sequence.to(SequenceState.RUNNING)
        self.running.append(sequence)
        plan.joined = True
        entry = self._entry_of(sequence)
        if entry is not None:
            entry.pins += 1
        self._take(plan, sequence, size, budget)

    def _start_preloads(self, plan: StepPlan) -> None:
        for entry in list(self._preloads):
            if entry.residency is Residency.DEVICE or self._make_resident(plan, entry, None):
                self._preloads.remove(entry)

    # --- accounting -----------------------------------------------------------------

    def _entry_of(self, sequence: Sequence) -> AdapterEntry | None:
        digest = sequence.adapter_digest
        return None if digest is None else self.slots.entries[digest]

    def _leave_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []
        entry = self._entry_of(sequence)
        if entry is not None:
            entry.pins -= 1
            if entry.leaves and not entry.pins:
                self.slots.release(entry)

    def _dequeue(self, sequence: Sequence) -> None:
        key = sequence.adapter_digest
        queue = self._queues[key]
        queue.remove(sequence)
        if not queue:
            del self._queues[key]
            self._passed_over.pop(key, None)

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals

    def check_integrity(self) -> None:
        """Audit blocks, slots and pins; RuntimeError names the first thing that is wrong.

        Cheap enough to run whenever the engine is idle and after every step of a test.
        """
        holders: Counter[int] = Counter()
        for sequence in self.running:
            if sequence.request is not None:  # a fold's blocks are its adapter's
                holders.update(sequence.block_ids)
        for entry in self.slots.entries.values():
            holders.update(entry.block_ids)
        everything = sorted([*self.pool.free_ids(), *holders])
        if holders != self.pool.holders() or everything != list(range(self.limits.num_blocks)):
            raise RuntimeError("KV blocks are lost or held twice")
        self._check_slots()
        for sequence in self._preempted + [s for q in self._queues.values() for s in q]:
            if sequence.block_ids:
                raise RuntimeError("a waiting sequence holds KV blocks")
        if len(self.running) > self.limits.max_running:
            raise RuntimeError("more sequences run than may")

    def _check_slots(self) -> None:
        pins: dict[str, int] = {}
        for sequence in self.running:
            digest = sequence.fold_digest or sequence.adapter_digest
            if digest is not None:
                pins[digest] = pins.get(digest, 0) + 1
        for digest, entry in self.slots.entries.items():
            if entry.pins != pins.get(digest, 0):
                raise RuntimeError(
                    f"adapter {digest}: {entry.pins} pins, {pins.get(digest, 0)} users"
                )
            holds = bool(entry.block_ids) or entry.scale_slot > 0
            resident = entry.residency in (Residency.DEVICE, Residency.FOLDING)
            if holds != resident and entry.ref.num_virtual_tokens + entry.ref.uses_scales:
                raise RuntimeError(f"adapter {digest}: slot and residency disagree")
            if entry.pins and not resident:
                raise RuntimeError(f"adapter {digest}: in use but not resident")
        used = [e.scale_slot for e in self.slots.entries.values() if e.scale_slot]
        if len(used) != len(set(used)):
            raise RuntimeError("two adapters share a row of the scale tables")
        if self.slots.num_adapter_blocks > self.limits.max_adapter_blocks:
            raise RuntimeError("adapters hold more KV blocks than they may")
