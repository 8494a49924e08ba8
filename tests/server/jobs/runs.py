"""Training jobs with real worker processes on a tiny base, and what their tests ask about them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from adapters.training.job import TrainingRequest
from adapters.training.plan import Plan, make_plan
from server.base.load import load_base
from server.base.tokenizer import load_tokenizer
from server.jobs.config import WorkerConfig
from server.jobs.supervisor import Supervisor
from server.store.jobs import JobRecord, JobStore
from server.store.registry import Registry
from server.text.tokenizer import TextTokenizer

BASE_NAME = "tiny-base"
ROWS: list[dict[str, Any]] = [
    {"text": f"{word} {number}", "label": label}
    for number in range(8)
    for word, label in (("lovely", "no complaint"), ("broken", "complaint"))
]
# More steps than any test waits for.
ENDLESS = 5_000_000


@dataclass(frozen=True)
class Home:
    """A data directory with its stores, and what its workers are started with."""

    config: WorkerConfig
    store: JobStore
    registry: Registry

    def add(self, *, adapter: str = "mine", steps: int = 12, **changes: Any) -> JobRecord:
        """Queue a job; `changes` are fields of the request, `job` fields of the resolved job."""
        job_changes = changes.pop("job", {})
        made = make_plan_of(self.config, ROWS, adapter=adapter, steps=steps, **changes)
        return self.store.create(made.job.model_copy(update=job_changes), made.examples)

    def state(self, record: JobRecord) -> str:
        return self.store.get(record.id).state

    def kinds(self, record: JobRecord) -> list[str]:
        """Kinds of the job's events, the first thousand."""
        return [event.kind for event in self.store.events(record.id)]

    def log(self, record: JobRecord) -> str:
        path = self.store.directory(record.id) / "log.txt"
        return path.read_text() if path.exists() else ""

    def wait_for_state(self, record: JobRecord, state: str, seconds: float = 90) -> JobRecord:
        wait_for(lambda: self.state(record) in (state, "failed", "cancelled"), seconds)
        after = self.store.get(record.id)
        assert after.state == state, (after.error, self.log(record))
        return after

    def tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        digest = self.registry.resolve(adapter).digest
        return load_file(self.registry.blob_path(digest) / "adapter_model.safetensors")


@contextmanager
def home(base: Path, data_dir: Path, **changes: Any) -> Iterator[Home]:
    """A data directory for jobs on a base; `changes` are fields of `WorkerConfig`."""
    data_dir.mkdir(parents=True, exist_ok=True)
    config = WorkerConfig(
        data_dir=str(data_dir),
        base=str(base),
        base_name=BASE_NAME,
        dtype="float32",
        checkpoint_seconds=0.2,
        nice=1,  # the tests wait for it, and the machine may be busy
    )
    registry = Registry(data_dir, reserved=(BASE_NAME,))
    store = JobStore(data_dir)
    try:
        yield Home(replace(config, **changes), store, registry)
    finally:
        store.close()
        registry.close()


@contextmanager
def supervised(
    home: Home, *, workers: int = 1, base_digest: str | None = None, **options: Any
) -> Iterator[Supervisor]:
    """A supervisor that runs the home's jobs for as long as the block does."""
    supervisor = Supervisor(home.store, home.registry, home.config, workers=workers, **options)
    supervisor.start(base_digest)
    try:
        yield supervisor
    finally:
        supervisor.stop()


def make_plan_of(
    worker: WorkerConfig, rows: list[dict[str, Any]], *, adapter: str, steps: int, **changes: Any
) -> Plan:
    """The plan of a prompt-tuning job that takes its time or does not."""
    hyperparameters = {"max_steps": steps, "batch_size": 4, **changes.pop("hyperparameters", {})}
    request = TrainingRequest.model_validate(
        {
            "adapter": adapter,
            "method": "prompt_tuning",
            "template": "{text} Label :",
            "target": "label",
            "labels": ["complaint", "no complaint"],
            "config": {"num_virtual_tokens": 4},
            "hyperparameters": hyperparameters,
            **changes,
        }
    )
    base, tokenizer = _loaded(worker.base)
    return make_plan(request, rows, tokenizer, base, base_name=BASE_NAME)


@cache
def _loaded(base: str) -> tuple[Any, Any]:
    loaded = load_base(base, dtype="float32")
    return loaded.spec, TextTokenizer(load_tokenizer(loaded.tokenizer_dir))


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Poll until something is so.

    Raises:
        TimeoutError: it never was.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {seconds} s")
        time.sleep(0.02)


def has_trained(home: Home, record: JobRecord) -> bool:
    """Whether a job that runs has done a step."""
    return "step" in home.store.get(record.id).progress


def has_checkpoint(home: Home, record: JobRecord) -> bool:
    """Whether a job that runs has written a checkpoint."""
    return "checkpoint" in home.kinds(record)
