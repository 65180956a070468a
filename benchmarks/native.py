"""Measure models that carry streams already: compile time, size of the graph, launches and step, against Inductor.

    python -m benchmarks.native [--device cuda] [--quick] [--minutes 8] [--out DIR]

The model is transformers' DeepSeek-V4 mixers (20 Sinkhorn iterations) around small feed-forward branches, and its head:
what is measured is the streams, not attention or experts. Each case compiles in a process of its own with an empty
cache. `--only inductor/4`: cases by compiler and number of layers, two sites each; what was measured of others at the
same commit is kept.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .llama import missing
from .record import OUT_OF_TIME, Benchmark, Options, Record, in_time, run_as_script, run_child
from .terminal import Table, track

INDUCTOR = "inductor"
# Seconds that one case may take; where Inductor alone compiles many unrolled Sinkhorns, more than this is what there is
# to know.
_LONGEST, _LONGEST_ALONE = 280.0, 150.0


@dataclass(frozen=True)
class Case:
    """A compiler and a depth: plain Inductor, or the backend with a fusion."""

    compiler: str
    layers: int

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return f"{self.compiler}/{self.layers}"

    @property
    def limit(self) -> float:
        """Seconds after which it is stopped."""
        return _LONGEST_ALONE if self.compiler == INDUCTOR and self.layers > 4 else _LONGEST


def cases(quick: bool) -> list[Case]:
    """Return the cases, the most important first."""
    if quick:
        return [Case("boundary", 1), Case(INDUCTOR, 1)]
    return [Case(compiler, layers) for layers in (4, 16, 43) for compiler in ("site", "boundary", INDUCTOR)]


def compile_in_process(case: Case, inner: str, options: Options, cache: str) -> dict[str, Any]:
    """Return what `native_child` prints; raises as `run_child` does."""
    return run_child(
        "benchmarks.native_child", "--compiler", case.compiler, "--layers", str(case.layers), "--inner", inner,
        "--device", options.device, limit=min(case.limit, options.seconds_left), cache=cache,
    )  # fmt: skip


def _measured_before(options: Options, record: Record) -> list[dict[str, Any]]:
    """Return the rows, of the same commit, that `--only` leaves out: the cases can be measured a few at a time."""
    if not options.only or not record.path.exists():
        return []
    before = json.loads(record.path.read_text())
    if before["environment"]["commit"] != record.content["environment"]["commit"]:
        return []
    return [row for row in before["rows"] if not options.wants(Case(row["compiler"], row["layers"]).name)]


def run(options: Options, record: Record) -> None:
    """Compile every case, cold."""
    why = missing()
    if why is not None:
        record.skip("everything", why)
        return
    inner = "aot_eager" if options.quick else "inductor"
    for row in _measured_before(options, record):
        record.add(**row)
    record.fact(inner=inner)
    for case in track([case for case in cases(options.quick) if options.wants(case.name)], "compiling"):
        if not in_time(options, record, case.name, needs=20.0):
            break
        with tempfile.TemporaryDirectory() as cache:
            try:
                found = compile_in_process(case, inner, options, cache)
            except subprocess.TimeoutExpired as error:
                if error.timeout < case.limit:
                    record.skip(case.name, OUT_OF_TIME)
                else:
                    record.add(compiler=case.compiler, layers=case.layers, more_than_seconds=case.limit)
                continue
            except RuntimeError as error:
                record.fail(case.name, str(error))
                continue
        record.add(compiler=case.compiler, layers=case.layers, **found)


def tables(result: dict[str, Any]) -> list[Table]:
    """Return one table: a row for each compiler and depth."""
    rows = sorted(result["rows"], key=lambda row: row["layers"])
    done = [row for row in rows if "more_than_seconds" not in row]
    plain = {row["layers"]: row for row in done if row["compiler"] == INDUCTOR}
    cells = []
    for row in rows:
        if "more_than_seconds" in row:
            late = f"> {row['more_than_seconds']:.0f} s"
            cells.append((f"{row['layers']} layers", row["compiler"], late, *("–",) * 7))
            continue
        reference = plain.get(row["layers"])
        ratio = row["step_seconds"] / reference["step_seconds"] if reference else None
        launches = row["launches_per_site"]
        cells.append(
            (
                f"{row['layers']} layers",
                row["compiler"],
                f"{row['compile_seconds']:.1f} s",
                f"{row['analyze_seconds']:.2f} s" if row["analyze_seconds"] is not None else "–",
                f"{row['graph_nodes']:,}",
                f"{row['aten_nodes']:,}",
                f"{launches:.1f}" if launches is not None else "–",
                f"{1e3 * row['step_seconds']:.1f} ms",
                f"{ratio:.2f}" if ratio is not None else "–",
                str(row["infinite_gradients"]),
            )
        )
    eager = next((row["eager_launches_per_site"] for row in done), float("nan"))
    table = Table(
        f"DeepSeek-V4's mixers, inner compiler {result['facts'].get('inner', 'inductor')}",
        (
            "model",
            "compiler",
            "compile",
            "search",
            "graph",
            "ATen",
            "launches a site",
            "step",
            "to Inductor",
            "not finite",
        ),
        tuple(cells),
        frozenset(),
        "Cold; stopped where a time has a >. Search: finding, proving and lowering the sites. Graph: nodes that the "
        "inner compiler is given. ATen: "
        "nodes of its forward and backward. Launches: kernels of the generated code and calls of operators in forward "
        f"and backward, of the whole model over its sites; eagerly {eager:.0f} in the forward alone. Not finite: "
        "numbers in the gradients of a loss 1, 1e8 and 1e16 times as large.",
    )
    return [table] if cells else []


def figures(result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Return no figure: three depths are a table."""
    return []


BENCHMARK = Benchmark("native", "Models that carry streams already", run, tables, figures)

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
