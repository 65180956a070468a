"""A long run: batches of random programs, each batch from another seed, and what failed, shrunk to a program."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from .checking import check, options
from .programs import programs


def main() -> int:
    """Run the batches; exit status 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=100, help="programs a batch; a batch ends at its first failure")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--inner", default="eager", help="the Dynamo backend that compiles the result")
    parser.add_argument("--no-shrink", action="store_true", help="show failures as drawn: shrinking takes minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    phases = (Phase.generate,) if arguments.no_shrink else (Phase.generate, Phase.shrink)
    failed, started = 0, time.time()
    for batch in range(-(-arguments.programs // arguments.batch)):

        @seed(arguments.seed + batch)
        @settings(
            max_examples=arguments.batch, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            print_blob=False, report_multiple_bugs=False, phases=phases,
        )  # fmt: skip
        @given(programs(), options(arguments.inner))
        def run(program, chosen):
            check(program, chosen)

        try:
            run()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failed += 1
            print(f"batch {arguments.seed + batch}: {error}\n", flush=True)
        print(f"{batch + 1} batches, {failed} failed, {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
