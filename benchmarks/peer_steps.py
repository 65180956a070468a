"""Measure a training step with mHC as others write it, under plain Inductor, beside ours, on a CPU.

    python -m benchmarks.peer_steps [--quick] [--minutes 20] [--only hyper-connections] [--out DIR]

The same small transformer, its residual stream written in each way of `hand_written`; all take turns, step by step,
so that whatever else the machine does slows all alike. Two are the same function as another, and are checked against
it first. `pip install hyper-connections` for that package; what is not installed is named and left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mhc_compile

from .hand_written import PLAIN, WRITINGS, Writing
from .record import Benchmark, Options, Record, in_time, run_as_script
from .terminal import WRONG, Table, track
from .timing import compilations

_LAYERS, _BATCH, _LENGTH = 4, 8, 128
# Float32 over some layers; another function is off by much more.
_TOLERANCE = 1e-4
_MOST_ROUNDS = 6


@dataclass
class Runner:
    """A compiled model.

    Attributes:
        writing: how its stream is written.
        step: runs forward and backward on a batch and returns the output's mean square.
        first_seconds: of its first step, which compiles.
        output: of that step.
        seconds: of the timed steps.
    """

    writing: Writing
    step: Callable[[Tensor], float]
    first_seconds: float
    output: float
    seconds: list[float]


def start(writing: Writing, width: int, layers: int, inner: str, batch: Tensor) -> Runner:
    """Build, compile and run one step."""
    torch.manual_seed(0)
    model = writing.build(width, layers)
    if writing.attached:
        mhc_compile.attach(model, batch)
    if writing.fusion is None:
        compiled = torch.compile(model, backend=inner, dynamic=False)
    else:
        options = {"fusion": writing.fusion, "inner": inner}
        compiled = torch.compile(model, backend="mhc", options=options, dynamic=False)

    def step(x: Tensor) -> float:
        loss: Tensor = compiled(x).square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    begin = time.perf_counter()
    output = step(batch)
    return Runner(writing, step, time.perf_counter() - begin, output, [])


def settle(runners: dict[str, Runner], batch: Tensor) -> None:
    """Run steps until none compiles: einops has Dynamo compile again when other tensors have passed it."""
    for _ in range(_MOST_ROUNDS):
        before = compilations()
        for runner in runners.values():
            runner.step(batch)
        if compilations() == before:
            return


def measure_width(width: int, writings: Sequence[Writing], options: Options, record: Record) -> None:
    """Add a row for each writing at a width."""
    inner, layers, rounds = ("aot_eager", 1, 2) if options.quick else ("inductor", _LAYERS, 12)
    sizes = (2, 16) if options.quick else (_BATCH, _LENGTH)
    batch = torch.randn(*sizes, width, generator=torch.Generator().manual_seed(1))
    runners: dict[str, Runner] = {}
    for writing in track([one for one in writings if one.name == PLAIN or options.wants(one.name)], f"C={width}"):
        where = f"{writing.name}, C={width}"
        if not writing.installed:
            record.skip(where, f"not installed (pip install {writing.module.replace('_', '-')})")
        elif in_time(options, record, where, needs=60.0):
            try:
                runners[writing.name] = start(writing, width, layers, inner, batch)
            except Exception as error:
                record.fail(where, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
    settle(runners, batch)
    before = compilations()
    for _ in range(rounds):
        for runner in runners.values():
            begin = time.perf_counter()
            runner.step(batch)
            runner.seconds.append(time.perf_counter() - begin)
    if compilations() != before:
        record.fail(f"C={width}", "something was compiled in the steps that were timed")
    for name, runner in runners.items():
        problems = problems_of(runner, runners)
        for problem in problems:
            record.fail(f"{name}, C={width}", problem)
        ratios = [ours / plain for ours, plain in zip(runner.seconds, runners[PLAIN].seconds, strict=True)]
        record.add(
            writing=name,
            width=width,
            layers=layers,
            tokens=batch.shape[0] * batch.shape[1],
            step_seconds=statistics.median(runner.seconds),
            to_plain=statistics.median(ratios),
            first_step_seconds=runner.first_seconds,
            problems=problems,
        )


def problems_of(runner: Runner, runners: dict[str, Runner]) -> list[str]:
    """Return what is wrong with a model that should compute what another computes."""
    other = runners.get(runner.writing.same_as or "")
    if other is None or abs(runner.output - other.output) <= _TOLERANCE * abs(other.output):
        return []
    return [f"its first output is {runner.output:.6g}, that of {other.writing.name} {other.output:.6g}"]


def run(options: Options, record: Record) -> None:
    """Measure every width."""
    if options.device != "cpu":
        record.skip("everything", "peers on a GPU are compared by operator: python -m benchmarks.peers")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for width in (16,) if options.quick else (64, 512):
            # A quick run shows that it works; the others would compile for most of its time.
            measure_width(width, WRITINGS[:3] if options.quick else WRITINGS, options, record)
    finally:
        torch.set_num_threads(threads)


def tables(result: dict[str, Any]) -> list[Table]:
    """Return one table: step and first step of each writing, by width."""
    rows = result["rows"]
    cells, best = [], set()
    for index, row in enumerate(rows):
        written = [other for other in rows if other["width"] == row["width"] and other["writing"] != PLAIN]
        right = [other for other in written if not other["problems"]]
        if right and row is min(right, key=lambda other: other["to_plain"]):
            best.add(index)
        cells.append(
            (
                str(row["width"]),
                row["writing"] + (f" {WRONG}" if row["problems"] else ""),
                f"{1e3 * row['step_seconds']:.1f} ms",
                "–" if row["writing"] == PLAIN else f"{row['to_plain']:.2f}",
                f"{row['first_step_seconds']:.0f} s",
            )
        )
    if not cells:
        return []
    table = Table(
        f"A step of {rows[0]['layers']} layers, {rows[0]['tokens']} tokens, 4 streams, one thread",
        ("C", "mHC by", "step", "to plain", "first step"),
        tuple(cells),
        frozenset(best),
        "Forward and backward, float32. To plain: median over rounds in which all took a step in turn. First step: "
        "with compilation, from an empty cache where the run began with one. All but `ours` are compiled by Inductor "
        "alone. hyper-connections norms and projects each stream alone, another function of as "
        "many streams; ours starts as the plain model, and DeepSeek-V4's mixers under ours as under Inductor, each "
        "checked first.",
    )
    return [table]


def figures(result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Draw nothing: the table is short."""
    return []


BENCHMARK = Benchmark("peer_steps", "Training step: mHC as others write it, on a CPU", run, tables, figures)

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
