"""`python -m benchmarks all | report`: run everything within a given time, or rebuild the page of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .record import add_common, options_from


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    everything = commands.add_parser("all", help="every benchmark within --minutes, the most important first")
    add_common(everything)
    page = commands.add_parser("report", help="rebuild README.md and the figures from results/")
    page.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent, metavar="DIR")
    given = parser.parse_args()
    if given.command == "report":
        from .report import rebuild

        print(rebuild(given.folder))
        return 0
    from .suite import run_all

    return run_all(options_from(everything, given))


if __name__ == "__main__":
    sys.exit(main())
