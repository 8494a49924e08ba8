"""Ten minutes of everything against a real server: `python -m tests.soak.run --seconds 600`.

A `graftwork serve` of its own on a loopback port gets requests as a Poisson process at 1.5 times what
it was measured to take: all protocols, adapters of all methods, streams and whole replies, clients that
leave; while adapters come, change, add up, move and go, and jobs train. Then everything ends, and:

    every request    ended in tokens, in 429, in a clean refusal, or its client left
    every answer     to a greedy ask of an adapter that did not change is the one it got alone
    memory           is within 3 % of what it was after the first minute (--memory-share)
    queue, blocks    are at zero, as are threads, descriptors and processes where they were
    /metrics         counted what the clients saw
    the disk         has nothing staged or half written

The exit status is 1 where one of these is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.soak import figures
from tests.soak.adapters_made import make_changing, make_stable
from tests.soak.asks import Asks
from tests.soak.changes import NAMES, Gardener
from tests.soak.clients import Clients, new_client
from tests.soak.figures import Snapshot
from tests.soak.server_process import BASE_NAME, serving
from tests.soak.tally import Tally
from tests.soak.verdict import judge

_SETTLE_SECONDS = 20.0
# Fewer than the server's places and queue would never see a 429.
_CALIBRATION_CLIENTS = 12


@dataclass(frozen=True)
class Plan:
    """A soak.

    Attributes:
        seconds: of load, without what comes before and after.
        base: a directory; None makes the tiny one.
        data: where the server and its adapters lie.
        seed: of everything random.
        overload: times the measured capacity.
        calibration_seconds: for which the capacity is measured.
        memory_after_seconds: when memory is first looked at.
        memory_share: by which it may differ in the end; None judges nothing.
        change_seconds: between two changes on average.
        train_seconds: between two jobs; the first comes at once.
    """

    seconds: float
    base: Path | None
    data: Path
    seed: int = 0
    overload: float = 1.5
    calibration_seconds: float = 10.0
    memory_after_seconds: float = 60.0
    memory_share: float | None = 0.03
    change_seconds: float = 0.5
    train_seconds: float = 60.0


@dataclass
class Outcome:
    """What came of a soak; `faults` is empty where all is well."""

    tally: Tally
    capacity: float = 0.0
    seconds: float = 0.0
    memory: list[Snapshot] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Soak:
    """One run against a server that serves already."""

    plan: Plan
    pid: int
    engine_pid: int
    data_dir: Path
    clients: Clients
    asks: Asks
    gardener: Gardener
    outcome: Outcome
    began: float = 0.0

    @property
    def tally(self) -> Tally:
        """The clients' books."""
        return self.outcome.tally

    async def run(self) -> None:
        """Warm up, measure, load, settle, judge."""
        _say("learning what each answers alone")
        for ask in self.asks.pool:
            await self.clients.learn(ask)
        _say("every change once")
        await self.gardener.each_once()
        await self._calibrate()
        _say(f"{self.outcome.capacity:.1f} requests a second; a first job")
        await self.gardener.train(0)  # its worker's ways are known before memory is looked at
        before = self._snapshot()
        processes = figures.children(self.pid)
        self.began = time.monotonic()
        _say(f"{self.plan.seconds:.0f} s of load")
        await self._load()
        self.outcome.seconds = time.monotonic() - self.began
        _say("settling")
        await self._settle()
        samples = await figures.metrics(self.clients.http)
        self.outcome.memory.append(self._snapshot())
        judge(self.outcome, self.plan, before, samples)
        self._judge_leftovers(processes)

    async def _calibrate(self) -> None:
        """Requests a second that are answered while a few clients ask one after the other."""
        self.clients.leave_share = 0.0
        end, answered = time.monotonic() + self.plan.calibration_seconds, 0

        async def ask_on() -> None:
            nonlocal answered
            while time.monotonic() < end:
                await self.clients.send(self.asks.next())
                answered += 1

        began = time.monotonic()
        await asyncio.gather(*(ask_on() for _ in range(_CALIBRATION_CLIENTS)))
        self.outcome.capacity = answered / (time.monotonic() - began)

    async def _load(self) -> None:
        self.clients.leave_share = 0.12
        end = self.began + self.plan.seconds
        looking = asyncio.create_task(self._look(end))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._arrivals(group, end))
            group.create_task(self._changes(group, end))
            group.create_task(self._jobs(end))
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking

    async def _arrivals(self, group: asyncio.TaskGroup, end: float) -> None:
        draw, due = random.Random(self.plan.seed + 1), time.monotonic()
        rate = self.plan.overload * self.outcome.capacity
        while due < end:
            # From due time to due time: what is late does not slow the rest.
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(self.clients.send(self.asks.next()))
            due += draw.expovariate(rate)

    async def _changes(self, group: asyncio.TaskGroup, end: float) -> None:
        draw, due = random.Random(self.plan.seed + 2), time.monotonic()
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(self.gardener.change())
            due += draw.expovariate(1 / self.plan.change_seconds)

    async def _jobs(self, end: float) -> None:
        number = 0
        while time.monotonic() < end:
            number += 1
            next_at = time.monotonic() + self.plan.train_seconds
            await self.gardener.train(number)
            await asyncio.sleep(max(0.0, min(next_at, end) - time.monotonic()))

    async def _look(self, end: float) -> None:
        """Memory after the first minute, and then now and again."""
        due = self.began + self.plan.memory_after_seconds
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self.outcome.memory.append(self._snapshot())
            due += max(5.0, self.plan.memory_after_seconds / 2)

    async def _settle(self) -> None:
        """Nobody asks any more: until nothing runs and nothing holds a block."""
        await self.gardener.unload_all()
        await self.gardener.delete_all()
        end = time.monotonic() + _SETTLE_SECONDS
        while time.monotonic() < end:
            samples = await figures.metrics(self.clients.http)
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
            names += ("vllm:kv_cache_usage_perc", "graftwork_adapter_requests_in_flight")
            if not any(figures.total(samples, name) for name in names):
                break
            await asyncio.sleep(0.5)
        await asyncio.sleep(3)  # connections of the pool end, threads without work too

    def _snapshot(self) -> Snapshot:
        seconds = time.monotonic() - self.began if self.began else 0.0
        return Snapshot(seconds, figures.held(self.pid), figures.held(self.engine_pid))

    def _judge_leftovers(self, processes: dict[int, str]) -> None:
        faults = self.outcome.faults
        if left := figures.temporary_files(self.data_dir):
            faults.append(f"left on the disk: {left}")
        now = {pid: words for pid, words in figures.children(self.pid).items() if words}
        if len(now) > len(processes):
            faults.append(f"processes: {processes} before, {now} after")


def soak(plan: Plan) -> Outcome:
    """Run a plan from nothing."""
    base = plan.base or _tiny_base(plan.data / "base")
    stable = make_stable(base, plan.data / "stable")
    changing = make_changing(base, plan.data / "changing")
    outcome = Outcome(Tally())
    with serving(base, plan.data / "data", plan.data / "serve.log") as (process, address):
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as http:
            for name, folder in stable.items():
                _upload(http, folder, name, outcome.tally)
        asyncio.run(_run(plan, process.pid, address, changing, outcome))
    log = (plan.data / "serve.log").read_text(errors="replace")
    if "Traceback" in log:
        outcome.faults.append(f"in the log: {log[log.index('Traceback') :][:1500]}")
    return outcome


async def _run(
    plan: Plan, pid: int, address: str, folders: dict[str, list[Path]], outcome: Outcome
) -> None:
    draw = random.Random(plan.seed)
    async with new_client(address) as http:
        clients = Clients(http, outcome.tally, draw)
        stable = (None, *make_names(folders))
        asks = Asks(BASE_NAME, stable, NAMES, draw)
        gardener = Gardener(http, outcome.tally, random.Random(plan.seed + 3), folders)
        engine_pid = figures.engine_of(pid)
        soaking = Soak(plan, pid, engine_pid, plan.data / "data", clients, asks, gardener, outcome)
        await soaking.run()


def make_names(_folders: dict[str, list[Path]]) -> tuple[str, ...]:
    """Names of the adapters that never change."""
    from tests.soak.adapters_made import METHODS

    return tuple(METHODS)


def _upload(http: httpx.Client, folder: Path, name: str, tally: Tally) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", (name, (folder / name).read_bytes())) for name in names]
    reply = http.post("/adapters", data={"name": name}, files=files)
    tally.sent["POST", "/adapters"] += 1
    tally.replies["POST", "/adapters", reply.status_code] += 1
    reply.raise_for_status()


def _tiny_base(directory: Path) -> Path:
    from tests.server.api.generation.openai.conftest import save_chatting_base

    return save_chatting_base(directory)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def report(outcome: Outcome) -> str:
    """For people."""
    tally = outcome.tally
    lines = [
        f"{outcome.seconds:.0f} s at {outcome.capacity:.1f} requests a second times the overload; "
        f"{sum(tally.sent.values())} requests, {tally.compared} answers compared",
        *tally.table(),
        "  seconds  server MiB rss/pss/anon  engine MiB rss/pss/anon  threads  descriptors",
    ]
    for at in outcome.memory:
        memory = "  ".join(
            "/".join(f"{kib / 1024:7.1f}" for kib in (one.rss, one.pss, one.anonymous))
            for one in (at.server, at.engine)
        )
        threads = f"{at.server.threads}+{at.engine.threads}"
        descriptors = f"{at.server.descriptors}+{at.engine.descriptors}"
        lines.append(f"  {at.seconds:7.0f}  {memory}  {threads}  {descriptors}")
    lines += [f"{name}: {value}" for name, value in outcome.notes.items()]
    lines += [f"FAULT {fault}" for fault in (*tally.faults, *outcome.faults)]
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="tests.soak.run")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--base", type=Path, help="a Hugging Face directory; left out: a tiny one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overload", type=float, default=1.5)
    parser.add_argument("--memory-share", type=float, default=0.03)
    parser.add_argument("--json", type=Path, help="where the figures go")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        plan = Plan(
            given.seconds,
            given.base,
            Path(home),
            given.seed,
            given.overload,
            memory_after_seconds=min(60.0, given.seconds / 3),
            memory_share=given.memory_share,
        )
        outcome = soak(plan)
    print(report(outcome))
    if given.json is not None:
        given.json.write_text(json.dumps(_as_json(outcome), indent=1))
    return 1 if outcome.faults or outcome.tally.num_faults else 0


def _as_json(outcome: Outcome) -> dict[str, Any]:
    tally = outcome.tally
    return {
        "seconds": outcome.seconds,
        "capacity": outcome.capacity,
        "requests": sum(tally.sent.values()),
        "compared": tally.compared,
        "outcomes": {f"{kind}: {how}": n for (kind, how), n in sorted(tally.outcomes.items())},
        "memory": [at.as_json() for at in outcome.memory],
        "notes": outcome.notes,
        "faults": [*tally.faults, *outcome.faults],
    }


if __name__ == "__main__":
    sys.exit(main())
