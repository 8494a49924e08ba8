"""Sizes and limits of one engine, as plain data.

Knows nothing of the environment: `server.config.settings` reads that and fills this in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Batching = Literal["mixed", "per-adapter"]


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is started with.

    Attributes:
        base: local directory of the base model, or a hub id together with `revision`.
        blobs_dir: where adapters lie, one folder a digest.
        revision: pinned revision of a hub id.
        dtype: "bfloat16", "float32", "float16", or None to choose by the hardware.
        device: "cpu", "cuda", "cuda:1", ...
        threads: intra-op threads, None for torch's own choice.
        folds_dir: where folded soft prompts are stored across restarts; None stores them in memory only.
        max_running: sequences that decode together at most.
        max_queued: requests that may wait before new ones are refused.
        max_queued_per_adapter: requests for one adapter, or for the base, that may run or wait; None
            is as many as there is room for.
        max_step_tokens: tokens of one packed step at most; at least max_running + prefill_chunk.
        prefill_chunk: tokens a prompt is prefilled by; chunks end at multiples of it, counted from
            the start of the sequence, so that a row's arithmetic never depends on its neighbours.
            A prompt of more than two gets one a step while a sequence decodes, else as many as there
            is room for.
        prefill_tokens_beside: tokens of prompts that one step computes at most while more sequences
            decode than wait for their prompts, so that prompts do not stall the streams; None sets no such
            bound.
        batching: "mixed", where a step computes rows of all adapters, or "per-adapter", where it
            computes those of one, which take turns by deficit round robin over tokens.
        block_size: tokens a KV block holds.
        kv_bytes: memory for KV blocks, adapters' prefixes included.
        adapter_kv_share: share of the KV blocks that adapters' prefixes may take.
        scale_slots: IA3 adapters resident at once.
        host_bytes: memory for adapters that were read and are not on the device.
        prefix_caching: keep the keys and values of prompts while there is room, for requests that
            begin the same.
        fast_kernels: use the decode kernel where it fits; False runs the plain torch path.
        packed_linears: prepack bf16 linear weights for the CPU.
        silence_seconds: a process that says nothing for so long is ended; more than its longest step.
        max_restarts: times in a row that a process that ended is started again.
    """

    base: str
    blobs_dir: str
    revision: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    folds_dir: str | None = None
    max_running: int = 64
    max_queued: int = 1024
    max_queued_per_adapter: int | None = None
    max_step_tokens: int = 512
    # When it was chosen, a prompt of 2,000 tokens beside 16 streams made gaps of 3.3 times the usual one by
    # 32, 4.0 by 64 and no less by 16: the step costs more than the tokens. Alone it took 1.09 s by 32, 0.96
    # by 64.
    prefill_chunk: int = 32
    prefill_tokens_beside: int | None = 192
    batching: Batching = "mixed"
    block_size: int = 16
    kv_bytes: int = 1 << 30
    adapter_kv_share: float = 0.5
    scale_slots: int = 32
    host_bytes: int = 1 << 30
    prefix_caching: bool = True
    fast_kernels: bool = True
    packed_linears: bool = True
    silence_seconds: float = 60.0
    max_restarts: int = 0

    def __post_init__(self) -> None:
        if self.max_step_tokens < self.max_running + self.prefill_chunk:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens}, expected at least max_running + "
                f"prefill_chunk = {self.max_running + self.prefill_chunk}: every running sequence "
                "must get its token and a prompt its chunk in one step"
            )
        beside = self.prefill_tokens_beside
        if beside is not None and beside < self.prefill_chunk:
            raise ValueError(
                f"prefill_tokens_beside is {beside}, expected at least prefill_chunk = "
                f"{self.prefill_chunk}: beside streams a prompt must get its chunk in one step"
            )
        if not 0.0 < self.adapter_kv_share <= 1.0:
            raise ValueError(
                f"adapter_kv_share is {self.adapter_kv_share}, expected 0 < share <= 1"
            )
