"""What a training job costs those who are served beside it.

    python -m tests.benchmarks.training_company --base DIR --data FILE [--seconds 30] [--rounds 3]

A real server; eight streams run all the time. Their median time between tokens is taken in three
situations in turn: alone; beside a process that only counts, with the niceness and the number of
threads of a training worker (what sharing the cores costs by itself); and beside a training job of that
server. Prints all three and their ratios. On the way it says how fast the job was in company.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

STREAMS = 8
NEW_TOKENS = 256
NICE = 19
BUSY = "import os; os.nice({nice})\nwhile True: pass"


@contextmanager
def server(base: str, threads: int) -> Iterator[str]:
    """`graftwork serve` on a free port, with an empty data directory."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-c", "from server.cli.main import main; main()", "serve"]
        command += ["--base", base, "--data-dir", data, "--port", "0", "--threads", str(threads)]
        environment = os.environ | {
            "GRAFTWORK_TRAIN_NICE": str(NICE),
            "GRAFTWORK_LOG_LEVEL": "error",
        }
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            for line in process.stderr:
                if "http://" in line:
                    yield "http://" + line.split("http://")[1].split(",")[0].strip()
                    break
        finally:
            process.terminate()
            process.communicate(timeout=60)


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that counts, as nice as a worker."""
    process = subprocess.Popen([sys.executable, "-c", BUSY.format(nice=NICE)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def training_job(url: str, rows: list[dict[str, str]]) -> Iterator[str]:
    """A job of this server, begun and past its first step."""
    body = {
        "adapter": "company",
        "method": "ia3",
        "template": "Tweet text : {text} Label :",
        "target": "label",
        "rows": rows,
        "hyperparameters": {"epochs": 1000},
    }
    reply = httpx.post(f"{url}/train", json=body, timeout=60)
    reply.raise_for_status()
    job = f"{url}/train/{reply.json()['id']}"
    while httpx.get(job).json()["progress"].get("step", 0) < 1:
        time.sleep(0.5)
    try:
        yield job
    finally:
        httpx.post(f"{job}/cancel")
        while httpx.get(job).json()["state"] == "running":
            time.sleep(0.2)


def gaps(url: str, seconds: float) -> list[float]:
    """Seconds between neighbouring tokens of every stream."""
    return asyncio.run(_gaps(url, time.monotonic() + seconds))


async def _gaps(url: str, until: float) -> list[float]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        each = await asyncio.gather(*(_one(client, until, n) for n in range(STREAMS)))
    return [gap for own in each for gap in own]


async def _one(client: httpx.AsyncClient, until: float, number: int) -> list[float]:
    found: list[float] = []
    body = {
        "inputs": f"Tweet text : story number {number} begins Label :",
        "parameters": {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "do_sample": False},
    }
    while time.monotonic() < until:
        before = None
        async with client.stream("POST", "/generate_stream", json=body) as reply:
            async for line in reply.aiter_lines():
                now = time.monotonic()
                if line and before is not None:
                    found.append(now - before)
                before = now if line else before
                if now > until:
                    break
    return found


def main() -> None:
    """See the module's head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the server's engine")
    options = parser.parse_args()
    lines = Path(options.data).read_text(encoding="utf-8").splitlines()[:128]
    rows = [json.loads(line) for line in lines]
    medians: dict[str, list[float]] = {
        "alone": [],
        "beside a busy process": [],
        "beside training": [],
    }
    with server(options.base, options.threads) as url:
        gaps(url, 5.0)
        for _ in range(options.rounds):
            medians["alone"].append(statistics.median(gaps(url, options.seconds)))
            with busy_process():
                medians["beside a busy process"].append(
                    statistics.median(gaps(url, options.seconds))
                )
            with training_job(url, rows) as job:
                medians["beside training"].append(statistics.median(gaps(url, options.seconds)))
                pace = httpx.get(job).json()["progress"]
                print(f"  the job in company: {pace['tokens_per_second']:.0f} tokens a second")
    alone = statistics.median(medians["alone"])
    for name, values in medians.items():
        middle = statistics.median(values)
        each = ", ".join(f"{1000 * value:.1f}" for value in values)
        print(
            f"{name}: {1000 * middle:.1f} ms between tokens ({each}), {middle / alone:.2f} x alone"
        )


if __name__ == "__main__":
    main()
