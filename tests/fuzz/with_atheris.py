"""Coverage-guided fuzz of the readers of strangers' checkpoints and archives. Optional: run by hand.

    pip install atheris
    python -m tests.fuzz.with_atheris header -max_total_time=300
    python -m tests.fuzz.with_atheris archive -max_total_time=300

What stands behind the reader's name are libFuzzer's own options; a folder among them is the corpus that
is read first and added to. Without one the seeds are those of tests/hostile. An input that a reader
answers with anything but a value or one of our errors ends the run, and is written to `crash-*`.
`test_readers` fuzzes the same readers in the gate, without looking at coverage.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

READ_BY = [
    "adapters.checkpoint.archive",
    "adapters.checkpoint.folder",
    "adapters.strict_json",
    "tarfile",
    "zipfile",
]

with atheris.instrument_imports(include=READ_BY):
    from adapters.checkpoint.archive import stage_upload
    from adapters.checkpoint.folder import read_config, read_header
    from adapters.checkpoint.limits import CheckpointLimits
    from adapters.errors import CheckpointError
    from adapters.strict_json import StrictJsonError, parse_object
    from tests.hostile.make_files import corpus, gzip_of, pair, tar_of, zip_of

KEPT = {"adapter_config.json", "adapter_model.safetensors"}
# A shared-memory folder where there is one: each input is a file for a moment.
_SHM = Path("/dev/shm")
FOLDER = _SHM if _SHM.is_dir() else None
LIMITS = CheckpointLimits()


def header(data: bytes) -> None:
    """A safetensors file, and the config that stands beside it."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        for read in (read_header, read_config):
            with contextlib.suppress(CheckpointError):
                read(path)


def archive(data: bytes) -> None:
    """An archive under each name that chooses a reader of its own."""
    for name in ("a.zip", "a.tar", "a.tar.gz"):
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            path, out = Path(folder) / "file", Path(folder) / "out"
            path.write_bytes(data)
            out.mkdir()
            with contextlib.suppress(CheckpointError):
                stage_upload([(name, path)], out, LIMITS)
            # Nothing lies beside the two files, and nothing outside.
            assert {one.name for one in Path(folder).iterdir()} == {"file", "out"}
            assert {one.name for one in out.iterdir()} <= KEPT


def strict_json(data: bytes) -> None:
    """A body or a config, read strictly."""
    with contextlib.suppress(StrictJsonError):
        parse_object(data, 12)


READERS: dict[str, tuple[Callable[[bytes], None], str]] = {
    "header": (header, "tensors/"),
    "archive": (archive, "archives/"),
    "json": (strict_json, "bodies/"),
}


def seeds(folder: str) -> list[bytes]:
    """Sound files of every kind, and the hostile ones that are small."""
    good = pair()
    sound = [*good.values(), zip_of(good), zip_of(good, method=8), tar_of(good)]
    sound.append(gzip_of(tar_of(good)))
    return sound + [
        data for name, data in corpus().items() if name.startswith(folder) and len(data) < 65_536
    ]


def main() -> None:
    """Fuzz the reader that is named."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"name a reader: {', '.join(READERS)}")
    reader, folder = READERS[sys.argv[1]]
    options = sys.argv[2:]
    with tempfile.TemporaryDirectory() as home:
        if not any(not one.startswith("-") for one in options):
            for number, data in enumerate(seeds(folder)):
                (Path(home) / f"seed-{number}").write_bytes(data)
            options.append(home)
        atheris.Setup([sys.argv[0], *options], reader)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
