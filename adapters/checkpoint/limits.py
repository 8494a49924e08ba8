"""Resource limits on untrusted checkpoints. Plain numbers, independent of file formats."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True)
class CheckpointLimits:
    """Upper bounds, all inclusive, all enforced before the bounded memory is allocated.

    The defaults are far above real adapters (a 100-token prefix for 80 layers of 8 KV heads is
    65 MB) and far below what would harm the server.

    Attributes:
        config_bytes: size of `adapter_config.json`.
        config_depth: nesting of objects and lists in it.
        header_bytes: size of the safetensors header.
        tensors: entries in that header.
        rank: dimensions of one tensor.
        dimension: length of one dimension; also bounds tensors that hold no element at all.
        file_bytes: size of `adapter_model.safetensors`.
        virtual_tokens: positions that an adapter takes before the prompt.
        virtual_tokens_words: what is so about this number, for the refusal.
        archive_members: files and folders in an uploaded archive.
        archive_extra_bytes: bytes that an archive may hold beside the two files.
        archive_ratio: inflated bytes for each compressed byte, once `archive_ratio_from` is passed
            (a fresh IA3 adapter is all ones and shrinks a thousandfold, so small files are free).
        archive_ratio_from: inflated bytes from which `archive_ratio` is enforced.
    """

    config_bytes: int = 1 * MIB
    config_depth: int = 16
    header_bytes: int = 2 * MIB
    tensors: int = 8_192
    rank: int = 8
    dimension: int = 2**31 - 1
    file_bytes: int = 1 * GIB
    virtual_tokens: int = 1_000_000
    virtual_tokens_words: str = "are accepted"
    archive_members: int = 4_096
    archive_extra_bytes: int = 64 * MIB
    archive_ratio: int = 200
    archive_ratio_from: int = 32 * MIB


DEFAULT_LIMITS = CheckpointLimits()
