"""What the engine does around a scheduler, on plain numbers: loads, host memory, KV cells, tokens.

KV memory is simulated cell by cell: every cell says which adapter's it is and all the tokens that it
depends on. A step writes its cells and then checks that each row finds exactly its adapter's prefix and its
own tokens there, which is what the forward pass would read. No torch here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.adapter_slots import AdapterEntry, Residency
from server.engine.blocks import blocks_for
from server.engine.request import AdapterRef, GenerationRequest, SamplingParams
from server.engine.scheduler import WHOLE_CHUNKS, Scheduler, SchedulerLimits
from server.engine.sequence import Sequence, SequenceState
from server.engine.step_plan import Chunk, StepPlan

# What stands in the cell of a token.
Contents = Callable[[int], tuple[str, int | tuple[int, ...]]]

LIMITS = SchedulerLimits(
    num_blocks=12,
    block_size=4,
    max_running=4,
    max_step_tokens=12,
    prefill_chunk=8,
    max_adapter_blocks=6,
    num_scale_slots=1,
)


def kv_adapter(digest: str, num_virtual_tokens: int = 5) -> AdapterRef:
    """An adapter whose host form is keys and values."""
    return AdapterRef(f"kv-{digest}", num_virtual_tokens, uses_scales=False)


def soft_adapter(digest: str, num_virtual_tokens: int = 5) -> AdapterRef:
    """An adapter whose host form must be folded."""
    return AdapterRef(f"soft-{digest}", num_virtual_tokens, uses_scales=False)


def scales_adapter(digest: str) -> AdapterRef:
    """An IA3 adapter."""
    return AdapterRef(f"scales-{digest}", 0, uses_scales=True)


@dataclass
class Simulation:
    """One engine's worth of bookkeeping around a scheduler.

    Attributes:
        host_slots: adapters that host memory keeps; the newest one always stays.
        auto_load: loads end by themselves before the next step; else `finish_load` ends them.
        keep_folds: a folded adapter is read from disk as keys and values ever after.
    """

    limits: SchedulerLimits = LIMITS
    host_slots: int = 100
    auto_load: bool = True
    keep_folds: bool = True
    loading: list[str] = field(default_factory=list)
    emitted: dict[str, list[int]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    live: dict[str, Sequence] = field(default_factory=dict)
    num_folds: dict[str, int] = field(default_factory=dict)
    num_steps: int = 0
    oldest_waits: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)
        self._host: OrderedDict[str, bool] = OrderedDict()  # digest -> needs fold
        self._folded: set[str] = set()
        self._told: dict[str, Residency] = {}
        self._cells: dict[tuple[int, int], tuple[str, int | tuple[int, ...]]] = {}
        self._scale_rows: dict[int, str] = {}
        self._num_requests = 0

    # --- what comes in ---------------------------------------------------------------------

    def add(
        self,
        adapter: AdapterRef | None = None,
        num_prompt: int = 3,
        max_new_tokens: int = 3,
        *,
        num_shared: int = 0,
    ) -> str | None:
        """Queue a request whose first tokens all requests share; None when it is refused."""
        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        own = 1000 * self._num_requests
        request = GenerationRequest(
            request_id,
            tuple(i if i < num_shared else own + i for i in range(num_prompt)),
            SamplingParams(max_new_tokens=max_new_tokens),
            adapter,
        )
        if self.scheduler.refusal(request) is not None:
            return None
        self.live[request_id] = self.scheduler.add(request)
        self.emitted[request_id] = []
        return request_id

    def abort(self, request_id: str) -> None:
        """The client is gone."""
        self.scheduler.abort(request_id)
        self.live.pop(request_id, None)

    def finish_load(self, index: int = 0) -> None:
        """A load ends well."""
        digest = self.loading.pop(index)
        needs_fold = digest.startswith("soft") and digest not in self._folded
        self._put_on_host(digest, needs_fold)
        self.scheduler.adapter_loaded(digest, needs_fold=needs_fold)

    def fail_load(self, index: int = 0) -> None:
        """A load ends badly: its requests fail."""
        for sequence in self.scheduler.adapter_failed(self.loading.pop(index)):
            assert sequence.request is not None
            self.live.pop(sequence.request.request_id)
            self.failed.append(sequence.request.request_id)

    def _put_on_host(self, digest: str, needs_fold: bool) -> None:
        self._host.pop(digest, None)
        self._host[digest] = needs_fold
        while len(self._host) > self.host_slots and len(self._host) > 1:
            dropped, _ = self._host.popitem(last=False)
            self.scheduler.adapter_dropped(dropped)

    # --- the step --------------------------------------------------------------------------

    def step(self, *, fails: bool = False) -> StepPlan:
        """One step as `Engine.step` takes it; with `fails`, its forward pass does."""
        self.num_steps += 1
        while self.auto_load and self.loading:
            self.finish_load()
        oldest, (streams, prompts) = self._oldest_running(), self._streams_and_prompts()
        before = {id(sequence): sequence.state for sequence in self.live.values()}
        plan = self.scheduler.schedule()
        self._check_plan(plan, oldest)
        self._check_prompts(plan, streams, prompts)
        self._check_order(plan, before)
        for digest in plan.loads:
            self._start_load(digest)
        for source, target, num_tokens in plan.copies:
            for place in range(self.limits.block_size):
                self._cells.pop((target, place), None)
                if place < num_tokens:
                    self._cells[target, place] = self._cells[source, place]
        for entry in plan.installs:
            if entry.residency is Residency.DEVICE:
                self._install(entry)
        if fails:
            self._fail(plan)
        elif plan.chunks:
            self._compute(plan)
        self.scheduler.check_integrity()
        self._check_told()
        return plan

    def _check_told(self) -> None:
        """Who listens only to moves knows where everybody is."""
        slots = self.scheduler.slots
        self._told |= {entry.ref.digest: entry.residency for entry in slots.take_moved()}
        for digest, entry in slots.entries.items():
            assert self._told.get(digest, Residency.DISK) is entry.residency

    def run(self, max_steps: int = 10_000) -> int:
        """Step until nothing is left; the number of steps."""
        for step in range(max_steps):
            if not self.scheduler.has_work:
                return step
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps: {list(self.live)}")

    def _start_load(self, digest: str) -> None:
        if digest in self._host:
            self.scheduler.adapter_loaded(digest, needs_fold=self._host[digest])
        else:
            assert digest not in self.loading, "asked for twice"
            self.loading.append(digest)

    def _install(self, entry: AdapterEntry) -> None:
        digest = entry.ref.digest
        assert digest in self._host, "installed without a host form"
        assert not self._host[digest], "installed without a fold"
        self._host.move_to_end(digest)
        if entry.ref.uses_scales:
            self._scale_rows[entry.scale_slot] = digest
        self._write(entry.block_ids, 0, entry.ref.num_virtual_tokens, _prefix(digest))

    def _compute(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            contents = _contents(chunk.sequence)
            self._write(chunk.sequence.block_ids, chunk.start, chunk.num_tokens, contents)
        for chunk in plan.chunks:
            self._check_reads(chunk)
        self.scheduler.complete(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                self._emit(chunk.sequence)
        for chunk in plan.chunks:
            fold = chunk.sequence
            if fold.request is None and fold.num_computed == fold.num_tokens:
                entry = self.scheduler.fold_finished(fold)
                digest = entry.ref.digest
                self.num_folds[digest] = self.num_folds.get(digest, 0) + 1
                if self.keep_folds:
                    self._folded.add(digest)
                self._put_on_host(digest, False)

    def _fail(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.request is None:
                self.scheduler.fold_failed(sequence)
                continue
            self.scheduler.finish(sequence)
            self.live.pop(sequence.request.request_id)
            self.failed.append(sequence.request.request_id)

    def _emit(self, sequence: Sequence) -> None:
        request = sequence.request
        assert request is not None
        emitted = self.emitted[request.request_id]
        token = len(request.prompt_token_ids) + len(emitted)
        assert sequence.num_tokens == token, "a token was lost or emitted twice"
        self.scheduler.append_token(sequence, token)
        emitted.append(token)
        if len(emitted) == request.sampling.max_new_tokens:
            self.scheduler.finish(sequence)
            self.live.pop(request.request_id)
            self.finished.append(request.request_id)

    # --- KV cells --------------------------------------------------------------------------

    def _write(self, block_ids: list[int], start: int, count: int, contents: Contents) -> None:
        size = self.limits.block_size
        for index in range(start, start + count):
            self._cells[block_ids[index // size], index % size] = contents(index)

    def _check_reads(self, chunk: Chunk) -> None:
        """The chunk sees its adapter's whole prefix and its own tokens, nobody else's."""
        sequence = chunk.sequence
        end = chunk.start + chunk.num_tokens
        self._check_cells(sequence.block_ids, end, _contents(sequence))
        if sequence.adapter_digest is None:
            return
        entry = self.scheduler.slots.entries[sequence.adapter_digest]
        assert entry.residency is Residency.DEVICE, "computed without its adapter"
        contents = _prefix(entry.ref.digest)
        self._check_cells(entry.block_ids, entry.ref.num_virtual_tokens, contents)
        if entry.ref.uses_scales:
            assert self._scale_rows[entry.scale_slot] == entry.ref.digest

    def _check_cells(self, block_ids: list[int], count: int, contents: Contents) -> None:
        size = self.limits.block_size
        for index in range(count):
            cell = self._cells.get((block_ids[index // size], index % size))
            assert cell == contents(index), f"expected {contents(index)}, reads {cell}"

    # --- what a plan must keep -------------------------------------------------------------

    def _oldest_running(self) -> Sequence | None:
        requests = [s for s in self.scheduler.running if s.request is not None]
        return min(requests, key=lambda s: s.arrival, default=None)

    def _check_plan(self, plan: StepPlan, oldest: Sequence | None) -> None:
        limits = self.limits
        assert plan.num_tokens <= limits.max_step_tokens
        assert len(self.scheduler.running) <= limits.max_running
        slots = [e.scale_slot for e in self.scheduler.slots.entries.values() if e.scale_slot]
        assert all(slot <= limits.num_scale_slots for slot in slots)
        assert len(plan.loads) == len(set(plan.loads))
        planned = [chunk.sequence for chunk in plan.chunks]
        assert len(planned) == len({id(sequence) for sequence in planned})
        digests = [s.adapter_digest or "" for s in planned]
        runs = [d for i, d in enumerate(digests) if i == 0 or digests[i - 1] != d]
        assert len(runs) == len(set(runs)), "rows of one adapter do not stand together"
        for chunk in plan.chunks:
            self._check_chunk(chunk)
        folding = any(s.request is None for s in self.scheduler.running)
        if oldest is None or folding or oldest in planned:
            self.oldest_waits = 0
        else:
            self.oldest_waits += 1
        # Where prompts share a part of the step it moves once in a round of their adapters; between two
        # of its steps there may be one for those whom it crowds.
        most = 1 if limits.prefill_tokens_beside is None else limits.max_running + 1
        if limits.per_adapter:
            users = {s.fold_digest or s.adapter_digest for s in planned}
            assert len(users) <= 1, "rows of several adapters in one step"
            keys = {
                s.adapter_digest for s in self.live.values()
            } | self.scheduler.slots.entries.keys()
            most = (len(keys) + 1) * (limits.max_step_tokens // limits.max_running + 2)
        assert self.oldest_waits <= most, "the oldest sequence did not move"

    def _streams_and_prompts(self) -> tuple[int, int]:
        """How many sequences decode, and how many of those with a place wait for their prompts."""
        running = self.scheduler.running
        decodes = [s for s in running if s.num_tokens - s.num_computed == 1]
        free = self.limits.max_running - len(running)
        prompts = len(running) - len(decodes) + min(free, self.scheduler.num_waiting)
        return sum(s.request is not None for s in decodes), prompts

    def _check_prompts(self, plan: StepPlan, streams: int, prompts: int) -> None:
        """Beside more sequences that decode, prompts get their share of the step and no more."""
        beside = self.limits.prefill_tokens_beside
        if beside is None or self.limits.per_adapter:
            return
        if streams > prompts:
            sizes = [chunk.num_tokens for chunk in plan.chunks if chunk.num_tokens > 1]
            assert sum(sizes) <= beside, "prompts took more than their share of the step"
        if streams:
            for chunk in plan.chunks:
                most = _most_of_one(chunk.start, self.limits.prefill_chunk)
                short = chunk.sequence.num_tokens <= WHOLE_CHUNKS * self.limits.prefill_chunk
                assert short or chunk.num_tokens <= most, "a long prompt took several chunks"

    def _check_order(self, plan: StepPlan, before: dict[int, SequenceState]) -> None:
        """Who was preempted comes back before anybody new, oldest first."""
        waits = [s.arrival for s in self.live.values() if s.state is SequenceState.PREEMPTED]
        for chunk in plan.chunks:
            state = before.get(id(chunk.sequence))
            if state is SequenceState.WAITING:
                assert not waits, "somebody new was admitted before a preempted sequence"
            elif state is SequenceState.PREEMPTED:
                assert chunk.sequence.arrival < min(waits, default=1 << 60)

    def _check_chunk(self, chunk: Chunk) -> None:
        sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
        assert sequence.state is SequenceState.RUNNING
        assert sequence in self.scheduler.running
        assert chunk.num_tokens > 0
        assert chunk.start == sequence.num_computed
        assert end == sequence.num_tokens or end % self.limits.prefill_chunk == 0
        assert chunk.samples == (sequence.request is not None and end == sequence.num_tokens)
        assert len(sequence.block_ids) >= blocks_for(end, self.limits.block_size)


def _most_of_one(start: int, prefill_chunk: int) -> int:
    """Tokens of one chunk at most."""
    return prefill_chunk - start % prefill_chunk


def _prefix(digest: str) -> Contents:
    """What an adapter's own cells hold: its virtual tokens."""
    return lambda index: (digest, index)


def _contents(sequence: Sequence) -> Contents:
    """What a sequence's cells hold: its tokens up to there and its adapter; a fold's, the adapter's own."""
    if sequence.request is None:
        assert sequence.fold_digest is not None
        return _prefix(sequence.fold_digest)
    digest = sequence.adapter_digest or "base"
    return lambda index: (digest, tuple(sequence.token_ids[: index + 1]))
