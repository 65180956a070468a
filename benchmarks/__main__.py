"""`python -m benchmarks all | checks | speed | training | report`: run in time, or rebuild the page of results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .record import add_common, options_from
from .suite import CALL_MINUTES, CALLS, run_all


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    everything = commands.add_parser("all", help="every benchmark within --minutes, the most important first")
    add_common(everything)
    helps = {
        "checks": "every kernel checked against float64",
        "speed": "kernels timed, and those of other packages",
        "training": "training steps timed",
    }
    for call in CALLS:
        one = commands.add_parser(call, help=f"one call of at most {CALL_MINUTES:.0f} minutes: {helps[call]}")
        add_common(one)
        one.set_defaults(minutes=CALL_MINUTES)
    page = commands.add_parser("report", help="rebuild README.md and the figures from results/")
    page.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent, metavar="DIR")
    given = parser.parse_args()
    if given.command == "report":
        from .report import rebuild

        print(rebuild(given.folder))
        return 0
    return run_all(options_from(everything, given), given.command if given.command in CALLS else None)


if __name__ == "__main__":
    sys.exit(main())
