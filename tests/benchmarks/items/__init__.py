"""The items of the benchmark, a module each; what they share stands here.

An item is a function of a `Bench`; it puts its measures into the book.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.engine.config import EngineConfig
from server.engine.request import AdapterRef
from tests.benchmarks.adapters import BenchAdapter, of_the_workload
from tests.benchmarks.book import Book
from tests.benchmarks.own import Ask, Own, OwnOptions, plain_changes
from tests.benchmarks.paired import Bar, Contestant, take_turns
from tests.benchmarks.server_process import ServerProcess, serving
from tests.benchmarks.workload import NEW_TOKENS, prompts


@dataclass
class Bench:
    """What an item works with.

    Attributes:
        engine: how our engine is started.
        book: where measures go.
        scratch: a directory that ends with the item.
        peers: where `make bench-peers` has put the others.
        rounds: of every comparison.
        threads: of every contestant.
        concurrency: of W where the item says 32; smaller only to try the benchmark out.
    """

    engine: OwnOptions
    book: Book
    scratch: Path
    peers: Path
    rounds: int
    threads: int
    concurrency: int = 32
    _adapters: list[BenchAdapter] = field(default_factory=list)

    def adapters(self, own: Own | None = None) -> list[BenchAdapter]:
        """The eight of W, made once."""
        if not self._adapters:
            spec = own.spec if own is not None else spec_of(self.engine)
            self._adapters = of_the_workload(self.scratch / "adapters", spec)
        return self._adapters

    def folders(self) -> dict[str, Path]:
        """The eight of W, by digest."""
        return {adapter.name: adapter.directory for adapter in self.adapters()}

    def own(self, folders: Mapping[str, Path] | None = None, **config: Any) -> Own:
        """A new engine of ours; without `folders` it can find the eight of W."""
        return Own(self.engine, self.folders() if folders is None else folders, **config)

    def can_serve(self) -> bool:
        """Whether `graftwork serve` starts the engine that is asked for; says so where it does not."""
        if self.engine.changes:
            told = "the server has its own settings: left out with --plain and --engine"
            print(f"   {told}", file=sys.stderr)
        return not self.engine.changes

    def serving(
        self, name: str, environment: Mapping[str, str] | None = None, **settings: object
    ) -> AbstractContextManager[ServerProcess]:
        """A server of the base, with its data under `name`."""
        given = {"threads": self.threads, "dtype": self.engine.dtype, **settings}
        return serving(self.engine.base, self.scratch / name, environment, **given)

    def is_done(self, item: int, measure: str, rounds: int | None = None) -> bool:
        """Whether the book has it already."""
        return self.book.is_done(item, measure, self.rounds if rounds is None else rounds)

    def compare(
        self,
        item: int,
        measure: str,
        contestants: Mapping[str, Contestant],
        bars: Sequence[Bar],
        *,
        unit: str = "tokens/s",
        rounds: int | None = None,
        facts: Sequence[dict[str, Any]] = (),
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        """Let contestants take turns; the book has every round as soon as it is over."""

        def keep(result: dict[str, Any]) -> None:
            more = {"facts": list(facts), "left out": dict(left_out or {})}
            self.book.put(item, measure, {**result, **more})

        rounds = self.rounds if rounds is None else rounds
        take_turns(contestants, bars, rounds=rounds, unit=unit, keep=keep)


def spec_of(options: OwnOptions) -> Any:
    """The base's dimensions."""
    from server.base.load import load_base

    return load_base(options.base, dtype=options.dtype, device="cpu").spec


def w_asks(
    own: Own,
    concurrency: int,
    refs: Sequence[AdapterRef | None],
    sampling: Mapping[str, Any] | None = None,
    first: int = 0,
) -> list[Ask]:
    """W(c): the adapters in turn, beginning with the one that `first` says."""
    asked = prompts(concurrency, own.spec.vocab_size)
    return [
        Ask(prompt, NEW_TOKENS, refs[(first + index) % len(refs)], sampling or {})
        for index, prompt in enumerate(asked)
    ]


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what base is served and how."""
    parser.add_argument("--base", default=".graftwork/base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="ours without its fast paths")
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of EngineConfig, such as block_size=32; may be repeated",
    )


def engine_options(options: argparse.Namespace) -> OwnOptions:
    """What `add_engine_options` was told."""
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    changes = plain_changes() if options.plain else {}
    for change in options.engine:
        name, _, value = change.partition("=")
        if name not in known:
            raise SystemExit(f"--engine {change}: EngineConfig has no field {name!r}")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    return OwnOptions(options.base, options.dtype, changes)
