"""Every setting of the server: the only place that reads the environment. (OpenTelemetry's own
variables are read by its library; `server.telemetry.tracing` checks whether they are set.)

Each can be given as an environment variable, `GRAFTWORK_` and its name in capitals; the most used also as
an option of `graftwork serve`, which wins. Independent of what the settings are for.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from platformdirs import user_cache_path
from pydantic import (
    AfterValidator,
    BeforeValidator,
    DirectoryPath,
    Field,
    SecretStr,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.base.convert import read_manifest
from server.config.limits import Count, Limits
from server.engine.config import Batching, EngineConfig
from server.jobs.config import WorkerConfig
from server.store.job_limits import Retention

KIB = 1024
MIB = 1024 * 1024
HOME = Path(".graftwork")
# What `base` says for the default base, wherever it lies.
DEFAULT = "default"

Dtype = Literal["bfloat16", "float32", "float16"]

_HOST_NAME = re.compile(r"\*|(\*\.)?[^\s/:*\[\]@]+(:[0-9]+)?|\[[0-9a-f:.]+\](:[0-9]+)?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*,]+")


def _paths(value: Any) -> Any:
    """A list, or a text in the format of PATH."""
    if isinstance(value, str):
        return tuple(part for part in value.split(os.pathsep) if part)
    return tuple(value) if isinstance(value, list) else value


def _words(value: Any) -> Any:
    """A list, or a text with commas."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return tuple(part.strip().lower() for part in value if part.strip())
    return value


def _hosts(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not _HOST_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no host name; expected graft.example, *.example or an address, with a "
                "port or without, and no scheme"
            )
    return names


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin!r} is no origin; expected scheme://name or scheme://name:port, as a browser "
                "sends it, such as https://graft.example"
            )
    return origins


class _OwnSettings(BaseSettings):
    """The settings that are not limits on requests."""

    model_config = SettingsConfigDict(env_prefix="GRAFTWORK_", extra="ignore")

    base: str = Field(
        DEFAULT,
        description="Base model: a Hugging Face directory, or a hub id together with a revision. "
        "The default base is made on first use, from a model that ships as a Python package.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Directory of the default base. Left out: .graftwork in the working directory "
        "where the base is there, else the user's cache (~/.cache/graftwork, XDG_CACHE_HOME).",
    )
    revision: str | None = Field(
        None, description="Revision of a hub id: a commit hash. Unused for a directory."
    )
    base_name: str | None = Field(
        None,
        description="Name of the base for clients; adapters cannot have it. "
        "Left out, it follows from the directory or the hub id.",
    )
    data_dir: Path = Field(
        HOME / "data", description="Directory of adapters and their database; survives restarts."
    )
    adapter_dir: DirectoryPath | None = Field(
        None,
        description="Watched directory: every PEFT folder directly in it is served as an adapter "
        "of the folder's name. Left out, none is.",
    )
    adapter_dir_seconds: float = Field(
        5.0, gt=0, description="Seconds between two scans of the watched directory."
    )
    load_dirs: Annotated[tuple[DirectoryPath, ...], NoDecode, BeforeValidator(_paths)] = Field(
        (),
        description="Directories that /v1/load_lora_adapter may load from, separated by colons. "
        "Left out, none.",
    )
    url: str | None = Field(
        None,
        description="URL of a running server for commands, such as http://127.0.0.1:8000. Left "
        "out, they use the data directory.",
    )
    api_key: SecretStr | None = Field(
        None, description="API key that commands send to a running server."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    require_keys: bool | None = Field(
        None,
        description="Require an API key for every request, see `graftwork keys`. Left out: only "
        "if the server listens on an address that is not loopback.",
    )
    allowed_hosts: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_words), AfterValidator(_hosts)
    ] = Field(
        (),
        description="Names by which clients reach the server, with commas between them: graft.example, "
        "*.example or *. A request with another Host is refused (403); localhost, 127.0.0.1 and [::1] "
        "always pass. Left out: only these on loopback, any name on other addresses.",
    )
    allowed_origins: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_words), AfterValidator(_origins)
    ] = Field(
        (),
        description="Origins of other sites, such as https://tools.example, with commas between them, "
        "whose web pages may use the server (CORS). Left out: none, and what their pages send is "
        "refused (403).",
    )
    metrics_public: bool = Field(
        False, description="Serve /metrics without a key even if keys are required."
    )
    dtype: Dtype | None = Field(
        None,
        description="Number format of the weights. Left out: bfloat16 if the hardware computes "
        "in it, else float32.",
    )
    device: str = Field("cpu", description="Device of the base: cpu, cuda, cuda:1.")
    threads: Count | None = Field(
        None, description="Threads of one operation. Left out: one per core."
    )
    max_running: Count = Field(64, description="Maximum sequences that decode together.")
    max_step_tokens: Count = Field(512, description="Maximum tokens computed in one step.")
    batching: Batching = Field(
        "mixed",
        description="What a step computes: mixed, rows of all adapters; per-adapter, rows of one "
        "adapter at a time, in turns weighted by tokens.",
    )
    kv_mib: Count = Field(
        1024, description="Memory for keys and values in MiB, adapters' prefixes included."
    )
    host_mib: Count = Field(
        1024, description="Memory in MiB for adapters that are loaded but not on the device."
    )
    engine_silence_seconds: float = Field(
        60.0,
        ge=2,
        description="Seconds without a sign of life after which the engine is restarted; must "
        "exceed its longest step.",
    )
    engine_restarts: int = Field(
        5,
        ge=0,
        description="Restarts in a row of an engine that ended, with growing pauses; after the "
        "last one /livez is 503. Ten minutes of service reset the count.",
    )
    scale_slots: Count = Field(32, description="IA3 adapters on the device at once.")
    prefix_caching: bool = Field(
        True, description="Reuse the keys and values of equal prompt prefixes."
    )
    max_connections: Count = Field(
        1024, description="Maximum open connections; more are refused (503)."
    )
    max_url_kib: Count = Field(8, description="Maximum length of a URL in KiB.")
    max_header_kib: Count = Field(
        32, description="Maximum size of a request's line and headers together in KiB."
    )
    max_headers: Count = Field(100, description="Maximum headers of a request.")
    header_seconds: float = Field(
        10.0, gt=0, description="Seconds within which a request's line and headers must arrive."
    )
    body_idle_seconds: float = Field(
        30.0,
        gt=0,
        description="Longest pause in a body in seconds; also added to its allowed time.",
    )
    stream_send_seconds: float = Field(
        30.0, gt=0, description="Seconds within which a client must read what was sent."
    )
    client_kib_per_second: float = Field(
        8.0,
        gt=0,
        description="Minimum rate of a client in KiB per second, for bodies and for reading replies.",
    )
    keep_alive_seconds: float = Field(
        75.0,
        gt=0,
        description="Seconds that an idle connection stays open; set it above the proxy's.",
    )
    metrics_adapters: int = Field(
        32,
        ge=0,
        le=1000,
        description="Adapters that /metrics lists by name, the busiest; the others share one row.",
    )
    shutdown_seconds: Count = Field(
        30, description="Seconds for running streams to end at shutdown."
    )
    train_workers: int = Field(
        1,
        ge=0,
        le=64,
        description="Training jobs that run at once, each in its own process; with 0 they "
        "wait for a `graftwork worker` on the same data directory.",
    )
    train_threads: Count | None = Field(
        None,
        description="Threads of one operation of a training job. Left out: half the cores.",
    )
    train_nice: int = Field(
        19,
        ge=0,
        le=19,
        description="Niceness of a training job. At 19 it uses what serving leaves; at 10 it was "
        "three times as fast beside eight streams, whose tokens took 1.7 times as long.",
    )
    train_dtype: Dtype | None = Field(
        None,
        description="Number format of the frozen weights in training. Left out: as served. In "
        "the format that they are stored in, they take no additional memory.",
    )
    train_memory_mib: Count | None = Field(
        None,
        description="Maximum private memory of a training job in MiB; a job that needs more "
        "fails. Left out: no limit.",
    )
    ended_job_days: Count = Field(
        30,
        description="Days that a training job is kept after its end, with its rows, log and events; "
        "its adapter stays.",
    )
    ended_jobs: Count = Field(
        1000, description="Ended training jobs that are kept of one caller; the oldest go first."
    )
    ended_jobs_mib: Count = Field(
        2048, description="Size in MiB of one caller's ended training jobs; the oldest go first."
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="Log lines for people (console) or machines (json)."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum level of log lines."
    )

    @model_validator(mode="after")
    def _locate_default_base(self) -> Self:
        if self.base == DEFAULT:
            self.base = str(self.default_base)
        return self

    @property
    def default_base(self) -> Path:
        """Where the default base lies, or will."""
        here = HOME / "base"
        if self.cache_dir is not None:
            return self.cache_dir.expanduser() / "base"
        if read_manifest(here) is not None:
            return here
        return user_cache_path("graftwork", appauthor=False) / "base"

    @property
    def is_default_base(self) -> bool:
        """Whether the base is one that is made where it is not there yet."""
        return Path(self.base) in (self.default_base, HOME / "base")

    @property
    def blobs_dir(self) -> Path:
        """Folder of adapters' bytes, one subfolder per digest."""
        return self.data_dir / "blobs"

    @property
    def keys_required(self) -> bool:
        """Whether requests need a key."""
        return not self.is_local if self.require_keys is None else self.require_keys

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
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
    """All settings of one server."""

    @property
    def queued_per_adapter(self) -> int:
        """Requests for one adapter that may run or wait."""
        if self.max_queued_per_adapter is not None:
            return self.max_queued_per_adapter
        return self.max_running + (self.max_queued + 1) // 2

    def engine_config(self) -> EngineConfig:
        """The engine's configuration."""
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

    def retention(self) -> Retention:
        """How long training jobs that have ended are kept."""
        return Retention(self.ended_job_days, self.ended_jobs, self.ended_jobs_mib * MIB)

    def worker_config(self, base_name: str) -> WorkerConfig:
        """The training workers' configuration; `base_name` is the base's name for clients."""
        limit = self.train_memory_mib
        return WorkerConfig(
            data_dir=str(self.data_dir),
            base=self.base,
            base_name=base_name,
            revision=self.revision,
            dtype=self.train_dtype or self.dtype,
            device=self.device,
            threads=self.train_threads or max(1, num_cores() // 2),
            nice=self.train_nice,
            memory_bytes=None if limit is None else limit * MIB,
        )


def is_loopback(host: str) -> bool:
    """Whether an address is loopback; names other than localhost are not resolved."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def num_cores() -> int:
    """Cores that this process may use, if the system reports it; else those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
