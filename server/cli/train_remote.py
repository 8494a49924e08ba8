"""`graftwork train --url`: a training job of a running server, followed to its end."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from server.cli.options import connect, err, fail, print_json, say, tell

if TYPE_CHECKING:
    from adapters.training.job import TrainingRequest
    from adapters.training.rows import Row
    from server.cli.http_client import RemoteServer

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class RemoteTraining:
    """What is asked of a server.

    Attributes:
        url: of the server.
        request: the job; the adapter's name is where it is published there.
        rows: what to train on.
        out: also download the adapter into this folder; None does not.
        dry_run: only check.
        as_json: print JSON.
    """

    url: str
    request: TrainingRequest
    rows: Sequence[Row]
    out: Path | None
    dry_run: bool
    as_json: bool


def train_remotely(asked: RemoteTraining) -> None:
    """Send the job and its rows, follow it to its end, and tell the result.

    Raises:
        ServerRefused: the server did.
        OSError: the folder cannot be written.
    """

    began = time.monotonic()
    with connect(asked.url) as server:
        job = _send(server, asked)
        if asked.dry_run:
            _tell_preview(job, as_json=asked.as_json)
            return
        say(f"{job['id']} is {job['state']} at {asked.url}")
        job = _follow(server, job["id"], asked.url)
        if job["state"] != "succeeded":
            why = (job["error"] or {}).get("message", "somebody ended it")
            raise fail(f"{job['id']} {job['state']}: {why}")
        name = f"{job['adapter']}@{job['adapter_version']}"
        if asked.out is not None:
            _download(server, name, asked.out)
    result = {
        "out": None if asked.out is None else str(asked.out),
        "registered": {"name": job["adapter"], "version": job["adapter_version"]},
        "job": job,
        "metrics": job["metrics"],
        "seconds": round(time.monotonic() - began, 3),
    }
    if asked.as_json:
        print_json(result)
        return
    tell(f"registered as {name} at {asked.url}")
    if asked.out is not None:
        tell(f"written to {asked.out}")


def _send(server: RemoteServer, asked: RemoteTraining) -> dict[str, Any]:
    job = asked.request.model_dump(mode="json", exclude_none=True)
    with tempfile.TemporaryDirectory(prefix="graftwork-") as work:
        data = Path(work) / "rows.jsonl"
        with data.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in asked.rows)
        _, reply = server.upload(
            "/train",
            {"job": json.dumps(job)},
            [("data", data.name, data)],
            dry_run="true" if asked.dry_run else None,
        )
    received: dict[str, Any] = reply
    return received


def _follow(server: RemoteServer, job_id: str, url: str) -> dict[str, Any]:
    """Show the events of a job until it has ended; the job."""
    from adapters.training.loop import TrainingEvent
    from server.cli.job_backends import RemoteJobs
    from server.cli.training_progress import TrainingProgress

    jobs = RemoteJobs(server)
    try:
        with TrainingProgress(err) as progress:
            for event in jobs.events(job_id, 0, follow=True):
                progress(TrainingEvent(event["kind"], event["data"]))
    except KeyboardInterrupt:
        say(f"{job_id} goes on at {url}. Follow it, or end it, with:")
        say(f"graftwork jobs events {job_id} --follow --url {url}")
        say(f"graftwork jobs cancel {job_id} --url {url}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    return jobs.show(job_id)


def _download(server: RemoteServer, name: str, out: Path) -> None:
    from server.cli.adapter_backends import download_to
    from server.cli.remote_adapters import RunningServer

    download_to(RunningServer(server), name, out)


def _tell_preview(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    tell(f"{plan['num_train']} rows to train on, {plan['num_held_out']} held out")
    for row in plan["preview"]:
        tokens = "|".join("<special>" if text is None else text for text in row["tokens"])
        tell(f"row {row['row']} ({len(row['ids'])} tokens): {tokens}")
