"""7. The server costs little: its processor time a token, streaming over HTTP, over the engine's own.

The same prompts go to both, new ones each round. The server is as `graftwork serve` starts it, with access
log, kept prompts and a worker for training, which waits. The client's time is not the server's, but it
takes its share of the cores; that is why the wall ratio is printed and the bar is on processor time.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from server.engine.request import AdapterRef
from tests.benchmarks.adapters import BenchAdapter
from tests.benchmarks.items import Bench
from tests.benchmarks.own import Ask, Own
from tests.benchmarks.paired import Bar, Contestant
from tests.benchmarks.server_process import ServerProcess
from tests.benchmarks.workload import NEW_TOKENS, PROMPT_TOKENS, prompt

# Two engines that are alike differ by some 2 % of processor time, by where their memory lies: the server is
# not judged by one of each.
_PAIRS = 3
HTTP, ENGINE = "server, streaming over HTTP", "engine in process"


def run(bench: Bench) -> None:
    """W on servers and on engines here, in turn."""
    if bench.is_done(7, "processor time") and bench.is_done(7, "wall time"):
        return
    if not bench.can_serve():
        return
    with ExitStack() as stack:
        pairs = []
        for number in range(_PAIRS):
            own = bench.own(prefix_caching=True)
            stack.callback(own.close)
            adapters = bench.adapters(own)
            server = stack.enter_context(bench.serving(f"data-{number}", log_level="info"))
            _upload(server, adapters)
            refs = [adapter.ref for adapter in adapters]
            pairs.append(Sides(own, server, refs, bench.concurrency))
            pairs[-1].http(-1)
            pairs[-1].engine(-1)
        cpu: dict[str, Contestant] = {
            HTTP: lambda number: pairs[number % _PAIRS].http(number),
            ENGINE: lambda number: pairs[number % _PAIRS].engine(number),
        }
        unit = "ms of processor time a token"
        bench.compare(7, "processor time", cpu, [Bar(HTTP, ENGINE, 1.07, "at most")], unit=unit)
        walls: dict[str, Contestant] = {
            name: lambda number, name=name: pairs[number % _PAIRS].walls[name][number]  # type: ignore[misc]
            for name in cpu
        }
        bench.compare(7, "wall time", walls, [Bar(HTTP, ENGINE)], unit="tokens/s")


class Sides:
    """Both sides of the comparison.

    Attributes:
        walls: tokens a second, by side and round.
    """

    def __init__(self, own: Own, server: ServerProcess, refs: list[AdapterRef], c: int) -> None:
        self._own, self._server, self._refs, self._c = own, server, refs, c
        self.walls: dict[str, dict[int, float]] = {HTTP: {}, ENGINE: {}}

    def http(self, number: int) -> float:
        """Milliseconds of the server's processes a token."""
        bodies = [_body(ask) for ask in self._asks(number)]
        cpu, began = self._server.cpu_seconds(), time.perf_counter()
        tokens = asyncio.run(_stream_all(self._server.port, bodies))
        seconds = time.perf_counter() - began
        cpu = self._server.cpu_seconds() - cpu
        self.walls[HTTP][number] = tokens / seconds
        return 1000 * cpu / tokens

    def engine(self, number: int) -> float:
        """Milliseconds of this process a token."""
        done = self._own.run(self._asks(number))
        self.walls[ENGINE][number] = done.rate
        return 1000 * done.cpu_seconds / done.tokens

    def _asks(self, number: int) -> list[Ask]:
        vocabulary = self._own.spec.vocab_size
        return [
            Ask(
                prompt(PROMPT_TOKENS, vocabulary, (number, index)),
                NEW_TOKENS,
                self._refs[index % len(self._refs)],
            )
            for index in range(self._c)
        ]


def _upload(server: ServerProcess, adapters: list[BenchAdapter]) -> None:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        for adapter in adapters:
            paths: list[Path] = sorted(adapter.directory.iterdir())
            files = [("files", (path.name, path.read_bytes())) for path in paths]
            client.post("/adapters", data={"name": adapter.name}, files=files).raise_for_status()


def _body(ask: Ask) -> bytes:
    assert ask.adapter is not None
    return json.dumps(
        {
            "model": ask.adapter.digest,  # the workload's digests are its names
            "prompt": list(ask.prompt),
            "max_tokens": ask.new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def _stream_all(port: int, bodies: list[bytes]) -> int:
    return sum(await asyncio.gather(*(_stream(port, body) for body in bodies)))


async def _stream(port: int, body: bytes) -> int:
    """One streamed completion; the number of tokens. Written by hand, so that the client costs little."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    reply = await reader.read(-1)
    writer.close()
    lines = reply.split(b"\n")
    usages = [
        line for line in lines if line.startswith(b"data:") and b'"completion_tokens"' in line
    ]
    if not reply.startswith(b"HTTP/1.1 200") or not usages:
        raise RuntimeError(f"expected a stream to its end, came {reply[-600:]!r}")
    usage = json.loads(usages[-1].removeprefix(b"data:"))["usage"]
    return int(usage["completion_tokens"])
