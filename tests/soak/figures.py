"""What a server holds: memory, threads, descriptors and files, and what its `/metrics` say.

Reads /proc and the data directory. Knows nothing of the load.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(frozen=True)
class Held:
    """What one process holds; memory in KiB."""

    rss: int
    pss: int
    anonymous: int
    threads: int
    descriptors: int


def held(pid: int) -> Held:
    """What a process holds now."""
    process = Path("/proc") / str(pid)
    sizes = {}
    for line in (process / "smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0])
    return Held(
        sizes["Rss"],
        sizes["Pss"],
        sizes["Anonymous"],
        len(list((process / "task").iterdir())),
        len(list((process / "fd").iterdir())),
    )


def children(pid: int) -> dict[int, str]:
    """Child processes and their command lines."""
    found = {}
    for task in (Path("/proc") / str(pid) / "task").iterdir():
        try:
            for child in (task / "children").read_text().split():
                words = (Path("/proc") / child / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(child)] = words.decode(errors="replace").strip()
        except FileNotFoundError:  # it has just ended
            continue
    return found


def engine_of(pid: int) -> int:
    """The engine's process: the largest child of a server that has no job yet."""
    return max((child for child, words in children(pid).items() if words), key=_rss)


def _rss(pid: int) -> int:
    return held(pid).rss


@dataclass(frozen=True)
class Snapshot:
    """What server and engine hold at one moment."""

    seconds: float
    server: Held
    engine: Held

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    def total(self, field: str) -> int:
        """Of both, in KiB."""
        return int(getattr(self.server, field) + getattr(self.engine, field))


def temporary_files(data_dir: Path) -> list[str]:
    """What is staged or half written."""
    staged = list((data_dir / "staging").iterdir()) if (data_dir / "staging").exists() else []
    halves = list(data_dir.rglob("*.tmp"))
    return sorted(str(path.relative_to(data_dir)) for path in [*staged, *halves])


async def metrics(client: httpx.AsyncClient) -> Samples:
    """All samples of `/metrics`."""
    text = (await client.get("/metrics")).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of a metric over all labels that are not given."""
    wanted = set(labels.items())
    return sum(value for (known, at), value in samples.items() if known == name and wanted <= at)


def replies(samples: Samples) -> Counter[tuple[str, str, int]]:
    """Replies by method, route and status, as the server counted them."""
    counted: Counter[tuple[str, str, int]] = Counter()
    for (name, at), value in samples.items():
        if name == "graftwork_http_requests_total":
            labels = dict(at)
            counted[labels["method"], labels["route"], int(labels["status"])] += int(value)
    return counted
