"""Check every kernel against float64 on the device.

    python -m benchmarks.checks [--device cuda] [--quick] [--minutes 8] [--only post_pre] [--out DIR]

The layout and the dtype of rewritten graphs come first, then other numbers of streams, dtypes and layouts. Each group
of token counts is a row as soon as it is done; what is wrong with it stands in its row, and the exit status is 1. On a
CPU the compiled C++ is checked, with `MHC_KERNELS=triton TRITON_INTERPRET=1` the Triton kernels in the interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from mhc_compile.kernels import dispatch

from . import kernels_report
from .precompile import precompile
from .problems import Shape, check, shapes_to_check
from .record import OUT_OF_TIME, Benchmark, Options, Record, run_as_script
from .terminal import Table, track


def groups(shapes: list[Shape]) -> list[list[Shape]]:
    """Return shapes that differ in tokens alone together, in the order of the first."""
    found: dict[Shape, list[Shape]] = {}
    for shape in shapes:
        found.setdefault(replace(shape, tokens=0), []).append(shape)
    return list(found.values())


def problems_of(shape: Shape, device: str) -> list[str]:
    """Return what is wrong with an operator; a kernel that does not compile is wrong too."""
    try:
        return check(shape, device)
    except Exception as error:
        return [f"{shape}: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"]


def run(options: Options, record: Record) -> None:
    """Check group by group until the time is over."""
    shapes = [shape for shape in shapes_to_check(options.quick, options.device) if options.wants(shape.operator)]
    wanted = groups(shapes)
    chosen = dispatch.implementation((torch.empty(1, device=options.device),), 4)
    record.fact(
        implementation=kernels_report.NAMES[chosen],
        to_check=len(shapes),
        precompile_seconds=precompile(shapes) if options.device == "cuda" else 0.0,
    )
    for index, group in enumerate(track(wanted, "checking")):
        if options.seconds_left <= 0:
            record.skip(f"{len(wanted) - index} of {len(wanted)} groups of checks", OUT_OF_TIME)
            break
        problems = [problem for shape in group for problem in problems_of(shape, options.device)]
        sizes = {**group[0].to_dict(), "tokens": [shape.tokens for shape in group]}
        record.add(**sizes, problems=problems)
        if problems:
            record.fail(str(replace(group[0], tokens=0)).replace(", 0 tokens", ""), "; ".join(problems))


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the checks that passed, by operator and dtype."""
    rows = result["rows"]
    if not rows:
        return []
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cells = []
    for operator in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == operator]
        by_dtype = [[row for row in mine if row["dtype"] == dtype] for dtype in dtypes]
        cells.append((operator, *(_passed(group) for group in by_dtype)))
    count = sum(len(row["tokens"]) for row in rows)
    wrong = sum(bool(row["problems"]) for row in rows)
    note = (
        f"{count} of {result['facts']['to_check']} checks ran; {f'{wrong} groups FAILED' if wrong else 'none failed'}. "
        f"Operators run as {result['facts']['implementation']}. Outputs and gradients may err by as much as plain "
        "PyTorch's in the same dtype, one rounding of the output's dtype and 128 of float32."
    )
    return [Table("Groups of token counts that agree with float64", ("operator", *dtypes), tuple(cells), note=note)]


def _passed(rows: list[dict[str, Any]]) -> str:
    return f"{sum(not row['problems'] for row in rows)} of {len(rows)}" if rows else "–"


BENCHMARK = Benchmark("checks", "Checks: every kernel against float64", run, tables)

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
