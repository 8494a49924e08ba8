"""Which blobs were checked already, by the sizes and times of their files: a start need not read them.

One line a blob in `checked.txt` of the data directory: its digest, and a stamp that changes with every
write to its files. Lines are appended when a blob is placed; of two for a digest the later counts. The file
is a cache: without it, or with lines missing, blobs are read once more. Independent of what a check is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

_FILE = "checked.txt"


class CheckedBlobs:
    """The stamps of one root. Safe between processes: at worst a line is lost.

    Args:
        root: the data directory.
        names: of the files of a blob.
    """

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self._path = root / _FILE
        self._names = sorted(names)

    def stamp(self, directory: Path) -> str | None:
        """What changes whenever the files of a blob do; None if they are not what they must be."""
        try:
            folder = os.lstat(directory)
            files = [os.lstat(f"{directory}/{name}") for name in self._names]
        except OSError:
            return None
        if not stat.S_ISDIR(folder.st_mode) or not all(stat.S_ISREG(f.st_mode) for f in files):
            return None
        parts = [folder.st_mtime_ns]  # of files that were added or renamed
        for file in files:
            parts += [file.st_size, file.st_mtime_ns, file.st_ctime_ns]
        return ",".join(map(str, parts))

    def load(self) -> dict[str, str]:
        """The stamps of all blobs that were intact, by digest."""
        try:
            lines = self._path.read_text("ascii", "replace").splitlines()
        except OSError:
            return {}
        return dict(line.split(" ") for line in lines if line.count(" ") == 1)

    def add(self, digest: str, directory: Path) -> None:
        """Record a blob that is intact."""
        stamp = self.stamp(directory)
        # A full disk costs the next start a read.
        with suppress(OSError), self._path.open("a", encoding="ascii") as file:
            file.write(f"{digest} {stamp}\n")

    def replace(self, stamps: Mapping[str, str]) -> None:
        """Record these and no others."""
        scratch = self._path.with_suffix(f".{os.getpid()}.tmp")
        with suppress(OSError):
            scratch.write_text("".join(f"{d} {s}\n" for d, s in stamps.items()), "ascii")
            scratch.replace(self._path)
