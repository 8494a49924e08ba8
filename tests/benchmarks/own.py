"""Our engine, stepped in this process, and when every token came.

The engine is the server's own; only its process, its pipe and HTTP are not there.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.checkpoint.folder import load_serving_form
from adapters.checkpoint.limits import CheckpointLimits
from server.base.load import load_base
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.kv_cache import KVBlocks
from server.engine.request import (
    AdapterRef,
    FailedEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)

# Fast paths that `--plain` turns off, as far as the engine has them.
_FAST_PATHS = ("fast_kernels", "packed_linears")


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: token ids.
        new_tokens: exactly so many come.
        adapter: None is the base.
        sampling: fields of SamplingParams other than greedy's.
    """

    prompt: Sequence[int]
    new_tokens: int
    adapter: AdapterRef | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """What came of some requests.

    Attributes:
        began: perf_counter at the first submission.
        ended: at the last token.
        cpu_seconds: of this process in between.
        token_at: of each request, in the order of asking, when its tokens came.
        most_blocks: KV blocks in use at the most.
    """

    began: float
    token_at: list[list[float]]
    ended: float = 0.0
    cpu_seconds: float = 0.0
    most_blocks: int = 0

    @property
    def tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(len(times) for times in self.token_at)

    @property
    def rate(self) -> float:
        """Output tokens a second, prefill included."""
        return self.tokens / (self.ended - self.began)

    @property
    def first_token_seconds(self) -> float:
        """Of the only request."""
        (times,) = self.token_at
        return times[0] - self.began

    @property
    def decode_rate(self) -> float:
        """Tokens a second from when the last request had its first token."""
        start = max(times[0] for times in self.token_at)
        late = sum(at > start for times in self.token_at for at in times)
        return late / (self.ended - start) if self.ended > start else float("nan")


@dataclass(frozen=True)
class OwnOptions:
    """How the engine is started.

    Attributes:
        base: directory of the base model.
        dtype: of its weights.
        changes: fields of EngineConfig, from the command line.
    """

    base: str
    dtype: str
    changes: Mapping[str, Any]


def plain_changes() -> dict[str, Any]:
    """Fields of EngineConfig that turn every fast path off."""
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    return {name: False for name in _FAST_PATHS if name in known}


class Own:
    """An engine and the adapters that it can find.

    Args:
        options: see OwnOptions.
        folders: where the adapter of each digest lies; several digests may lie in one folder.
        config: fields of EngineConfig; without any, one that keeps no prompts.
    """

    def __init__(
        self, options: OwnOptions, folders: Mapping[str, Path] | None = None, **config: Any
    ) -> None:
        loaded = load_base(options.base, dtype=options.dtype, device="cpu")
        self.spec = loaded.spec
        # Rounds send the same prompts again: kept ones would be measured instead of computed ones.
        fields = {"prefix_caching": False, **config, **options.changes}
        self.config = EngineConfig(base=options.base, blobs_dir="", **fields)
        self._folders = dict(folders or {})
        self.engine = Engine(loaded.model, loaded.spec, self.config, self._read)
        dtype = loaded.model.get_input_embeddings().weight.dtype
        self.block_bytes = KVBlocks.bytes_per_block(self.spec, self.config.block_size, dtype)
        self._numbers = itertools.count()

    def _read(self, digest: str) -> Any:
        return load_serving_form(self._folders[digest], self.spec, CheckpointLimits())

    def run(self, asks: Iterable[Ask]) -> Run:
        """All requests at once, to their end."""
        requests = [self.request(ask) for ask in asks]
        times: dict[str, list[float]] = {request.request_id: [] for request in requests}
        run = Run(time.perf_counter(), list(times.values()))
        cpu = cpu_seconds()
        for request in requests:
            self._submit(request)
        while self.engine.has_work:
            for request_id, at in self.step():
                times[request_id].append(at)
            run.most_blocks = max(run.most_blocks, self.engine.scheduler.pool.num_used)
        run.ended = max(at[-1] for at in times.values())
        run.cpu_seconds = cpu_seconds() - cpu
        return run

    def request(self, ask: Ask) -> GenerationRequest:
        """An ask as the engine takes it."""
        sampling = SamplingParams(max_new_tokens=ask.new_tokens, ignore_eos=True, **ask.sampling)
        number = f"{next(self._numbers)}"
        return GenerationRequest(number, tuple(ask.prompt), sampling, ask.adapter)

    def submit(self, ask: Ask) -> str:
        """Queue one request; its id."""
        request = self.request(ask)
        self._submit(request)
        return request.request_id

    def step(self) -> list[tuple[str, float]]:
        """One step: of each token that came, whose it is and when it came."""
        events = self.engine.step()
        now = time.perf_counter()
        for event in events:
            _refuse_failure(event)
        return [(event.request_id, now) for event in events if isinstance(event, TokenEvent)]

    def preload(self, refs: Sequence[AdapterRef]) -> None:
        """Have adapters read, folded and used once, a few at a time."""
        for start in range(0, len(refs), 16):
            self.run([Ask([200], 1, ref) for ref in refs[start : start + 16]])

    def adapter_bytes(self) -> int:
        """KV memory that adapters hold now."""
        entries = self.engine.scheduler.slots.entries.values()
        return sum(len(entry.block_ids) for entry in entries) * self.block_bytes

    def close(self) -> None:
        """Stop its threads."""
        self.engine.close()

    def _submit(self, request: GenerationRequest) -> None:
        for event in self.engine.submit(request):
            _refuse_failure(event)


def cpu_seconds() -> float:
    """User and system time of this process, all threads."""
    times = os.times()
    return times.user + times.system


def _refuse_failure(event: object) -> None:
    if isinstance(event, FailedEvent):
        raise RuntimeError(f"request {event.request_id}: {event.code}: {event.message}")


def rate_of(own: Own, asks: Callable[[int], Sequence[Ask]]) -> Callable[[int], float]:
    """A contestant: tokens a second of the requests that `asks` makes for a round."""
    return lambda number: own.run(asks(number)).rate
