"""The entry point: `graftwork`, and `python -m server`.

If a required package is missing, or another package has the name of one of ours, the command line cannot
be imported. Then the checks of `graftwork doctor` report it, instead of a traceback.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from server.cli.main import app
    except ImportError as error:
        sys.stderr.write(f"graftwork: {error}\n")
        from server.cli.doctor.report import broken_installation

        broken_installation()
        sys.exit(1)
    app()


if __name__ == "__main__":
    main()
