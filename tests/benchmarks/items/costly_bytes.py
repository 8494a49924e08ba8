"""12. Bytes that are costly to parse stall nobody: the largest gap in a stream beside eight who send them.

Chunks of one byte, chunks as small as they may be, chunks that no route reads, a head four bytes a segment,
requests in a row. The same stream alone, in turn. Both take their processor time from the same cores.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.benchmarks.costly_bytes import KINDS
from tests.benchmarks.items import Bench
from tests.benchmarks.paired import Bar, Contestant

ALONE = "alone"
_CONNECTIONS = 8
_TOKENS = 200
# Until they are at it.
_BEFORE_SECONDS = 0.5


def run(bench: Bench) -> None:
    """One stream of the base."""
    if bench.is_done(12, "costly bytes") or not bench.can_serve():
        return
    with bench.serving("data") as server:
        largest_gap_ms(server.port)
        contestants: dict[str, Contestant] = {ALONE: lambda _number: largest_gap_ms(server.port)}
        for kind in KINDS:
            contestants[f"beside {kind}"] = lambda _number, kind=kind: gap_beside(  # type: ignore[misc]
                kind, server.port
            )
        bars = [Bar(name, ALONE, 3.0, "at most") for name in contestants if name != ALONE]
        bench.compare(12, "costly bytes", contestants, bars, unit="ms")


def gap_beside(kind: str, port: int) -> float:
    """Milliseconds of the largest gap while eight connections send such bytes."""
    with _sending(kind, port):
        time.sleep(_BEFORE_SECONDS)
        return largest_gap_ms(port)


@contextmanager
def _sending(kind: str, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.benchmarks.costly_bytes", kind, str(port)]
    process = subprocess.Popen([*command, str(_CONNECTIONS)], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def largest_gap_ms(port: int) -> float:
    """Milliseconds between two tokens of a stream, the largest of all."""
    return 1000 * max(asyncio.run(gaps(port, _TOKENS)))


async def gaps(port: int, tokens: int) -> list[float]:
    """Seconds between the frames of one stream."""
    parameters = {"max_new_tokens": tokens, "ignore_eos": True}
    content = json.dumps({"inputs": "a", "parameters": parameters}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /generate_stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    found, last, whole = [], None, b""
    while data := await reader.read(1 << 16):
        now = time.perf_counter()
        if b"data:" in data and last is not None:
            found.append(now - last)
        last, whole = now, whole + data
    writer.close()
    if b'"generated_text":"' not in whole:
        raise RuntimeError(f"expected a stream to its end, came {whole[-600:]!r}")
    return found
