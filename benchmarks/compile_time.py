"""Measure how long compilation takes against plain Inductor, cold and warm, and our passes' share of it.

    python -m benchmarks.compile_time [--device cuda] [--quick] [--minutes 8] [--out DIR]

Each case compiles a small Llama in a process of its own with an empty cache, then again in another with the cache that
the first one left. `--only plain`, `--only site/16`, `--only site/16/generation`: cases by fusion, layers and work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .compile_child import BY_BLOCK, GENERATION, STEP
from .figures import Panel, lines
from .llama import PLAIN, Setting, missing
from .record import OUT_OF_TIME, Benchmark, Options, Record, in_time, run_as_script
from .terminal import Table, track

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """A fusion, or the plain model, at a depth, and what it is compiled for: one of `compile_child.WORKS`."""

    fusion: str
    layers: int
    work: str = STEP

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return f"{self.fusion}/{self.layers}{'' if self.work == STEP else '/' + self.work.replace(' ', '-')}"

    @property
    def label(self) -> str:
        """What tables and figures call it."""
        return self.fusion if self.work == STEP else f"{self.fusion}, {self.work.removeprefix('step ')}"


def cases(quick: bool) -> list[Case]:
    """Return the cases, the most important first.

    Plain ATen is compiled at the smallest depth only: 20 Sinkhorn iterations at each site, fused one by one, take
    longer than all the rest.
    """
    if quick:
        return [Case(PLAIN, 2), Case("site", 2, BY_BLOCK)]
    by_block = [Case(fusion, layers, BY_BLOCK) for layers in (4, 32) for fusion in (PLAIN, "site")]
    generation = [Case(fusion, 16, GENERATION) for fusion in (PLAIN, "site")]
    depths = [Case(fusion, layers) for layers in (4, 16, 32) for fusion in (PLAIN, "site")]
    return [*depths[:2], Case("boundary", 4), *depths[2:4], *by_block, *generation, Case("inductor", 4), *depths[4:]]


def compile_in_process(case: Case, setting: Setting, inner: str, options: Options, cache: str) -> dict[str, Any]:
    """Return the seconds that `compile_child` prints, with the wall time of the process.

    Raises:
        RuntimeError: the process failed; the message is its last line.
        subprocess.TimeoutExpired: the time is up.
    """
    sizes = {key: value for key, value in asdict(setting).items() if key != "tokens"}
    command = [
        sys.executable, "-m", "benchmarks.compile_child", "--setting", json.dumps(sizes),
        "--fusion", case.fusion, "--inner", inner, "--device", options.device, "--work", case.work,
    ]  # fmt: skip
    # Both caches: Inductor's own, and Triton's for the kernels.
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
    limit = None if options.seconds_left == float("inf") else max(options.seconds_left, 1.0)
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "process_seconds": time.perf_counter() - begin}


def run(options: Options, record: Record) -> None:
    """Compile every case, cold and warm."""
    why = missing()
    if why is not None:
        record.skip("everything", why)
        return
    # Without generated code there is nothing to keep: a quick run shows the passes, not Inductor.
    inner = "aot_eager" if options.quick else "inductor"
    record.fact(inner=inner)
    for case in track([case for case in cases(options.quick) if _wanted(case, options)], "compiling"):
        dtype = "bfloat16" if options.device == "cuda" else "float32"
        setting = Setting(64, case.layers, 2, 64, vocabulary=256, dtype=dtype)
        with tempfile.TemporaryDirectory() as cache:
            for start in ("cold",) if options.quick else ("cold", "warm"):
                where = f"{case.name}, {start}"
                if not in_time(options, record, where, needs=10.0):
                    break
                try:
                    found = compile_in_process(case, setting, inner, options, cache)
                except subprocess.TimeoutExpired:
                    record.skip(where, OUT_OF_TIME)
                    break
                except RuntimeError as error:
                    record.fail(where, str(error))
                    break
                record.add(fusion=case.label, layers=case.layers, start=start, work=case.work, **found)


def _wanted(case: Case, options: Options) -> bool:
    return options.wants(case.name) or options.wants(case.fusion)


def total(row: dict[str, Any]) -> float:
    """Return the seconds of attaching and compiling together."""
    return float(row["compile_seconds"]) + float(row["attach_seconds"])


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a row shares with the plain model's that it is compared with."""
    return row["layers"], row["start"], row["work"]


def tables(result: dict[str, Any]) -> list[Table]:
    """Return one table: seconds and ratios by depth, start and fusion."""
    rows = result["rows"]
    plain = {_setting(row): row for row in rows if row["fusion"].startswith(PLAIN)}
    cells, best = [], set()
    order = sorted(rows, key=lambda row: (row["layers"], row["start"]))
    for index, row in enumerate(order):
        same = [other for other in order if _setting(other) == _setting(row)]
        ours = [other for other in same if not other["fusion"].startswith(PLAIN)]
        if row in ours and len(ours) > 1 and row == min(ours, key=total):
            best.add(index)
        reference = plain.get(_setting(row))
        is_plain = row["fusion"].startswith(PLAIN)
        share = (row["passes_seconds"] + row["attach_seconds"]) / total(row)
        cells.append(
            (
                f"{row['layers']} layers, {row['start']}",
                row["fusion"],
                f"{total(row):.1f} s",
                f"{total(row) / total(reference):.2f}" if reference and not is_plain else "–",
                "–" if is_plain else f"{row['attach_seconds']:.2f} s",
                "–" if is_plain else f"{row['passes_seconds']:.2f} s",
                "–" if is_plain else f"{share:.0%}",
            )
        )
    inner = result["facts"].get("inner", "inductor")
    table = Table(
        f"Compile time of a training step and of generation, inner compiler {inner}",
        ("model", "fusion", "attach + compile", "to plain", "attach", "passes", "share of both"),
        tuple(cells),
        frozenset(best),
        "Cold: no cache. Warm: another process with the cache of the first. Passes: the backend's time beside the "
        "inner compiler. Attach traces the model once more than the plain one needs. Two sites a layer. "
        "Generation: the first two prompts, 5 and 9 tokens, with a dynamic cache.",
    )
    return [table] if cells else []


def figures(result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Draw compile time against depth, cold and warm."""
    starts = list(dict.fromkeys(row["start"] for row in result["rows"]))
    panels = []
    for start in starts:
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(result["rows"], key=lambda row: row["layers"]):
            if row["start"] == start:
                curves.setdefault(row["fusion"], []).append((row["layers"], total(row)))
        panels.append((Panel(start, "layers", "attach + compile, s"), curves))
    if not panels:
        return []
    path = lines(folder / "compile-time.png", panels)
    return [(path, "Compile time against depth, with no cache and with a warm one.")]


BENCHMARK = Benchmark("compile_time", "Compile time against plain Inductor", run, tables, figures)

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
