"""Tables and figures of `benchmarks.training_step`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .figures import Panel, Points, bars, lines
from .llama import PLAIN
from .terminal import WRONG, Table, mebibytes, microseconds

# arXiv 2512.24880, section 4.3: n = 4 with fused kernels, recomputation and overlap.
PUBLISHED_OVERHEAD = 0.067
_SIZES = ("width", "layers", "batch", "length", "dtype")

Row = dict[str, Any]


def tables(result: dict[str, Any]) -> list[Table]:
    """Return one table for each setting, and one of saved bytes against depth."""
    steps = [row for row in result["rows"] if row["part"] == "step"]
    found = [_step_table(result, group) for group in _groups(steps)]
    depth = [row for row in result["rows"] if row["part"] == "depth"]
    return [*found, *([_depth_table(depth)] if depth else [])]


def _groups(rows: list[Row]) -> list[list[Row]]:
    """Split rows by setting, in order; a setting without its plain model has nothing to compare with."""
    keys = list(dict.fromkeys(tuple(row[size] for size in _SIZES) for row in rows))
    groups = [[row for row in rows if tuple(row[size] for size in _SIZES) == key] for key in keys]
    return [group for group in groups if any(row["fusion"] == PLAIN for row in group)]


def baseline(group: list[Row]) -> Row:
    """Return the plain model's row, its time the mean of the measurements before and after the others."""
    plain = [row for row in group if row["fusion"] == PLAIN]
    return {**plain[0], "step_seconds": statistics.fmean(row["step_seconds"] for row in plain)}


def overhead(row: Row, plain: Row) -> float:
    """Return the step time beyond the plain model's, as a share of it."""
    return float(row["step_seconds"]) / float(plain["step_seconds"]) - 1.0


def _step_table(result: dict[str, Any], group: list[Row]) -> Table:
    plain = baseline(group)
    ours = [row for row in group if row["fusion"] != PLAIN]
    cpu = result["environment"]["device"] == "cpu"
    memory = "saved_bytes" if cpu else "peak_bytes"
    cells = [_step_cells(plain, plain, memory), *(_step_cells(row, plain, memory) for row in ours)]
    right = [index for index, row in enumerate(ours) if not row.get("problems")]
    fastest = min(right, key=lambda index: ours[index]["step_seconds"], default=None)
    drift = [row["step_seconds"] for row in group if row["fusion"] == PLAIN]
    note = (
        f'Plain: `backend="{plain["inner"]}"`, measured before and after the others'
        + (f" ({max(drift) / min(drift) - 1.0:.1%} apart)" if len(drift) > 1 else "")
        + ". "
    )
    note += (
        "CPU: saved bytes are what the backward keeps; times say nothing about a GPU."
        if cpu
        else f"To compare: arXiv 2512.24880 reports {PUBLISHED_OVERHEAD:.1%} of step time at n = 4."
    )
    if len(right) < len(ours):
        note += f" {WRONG}: another function, or compiled while it was timed; see what failed."
    return Table(
        f"Training step, C={plain['width']}, {plain['layers']} layers, {plain['tokens']} tokens, {plain['dtype']}"
        f"{', CPU' if cpu else ''}",
        ("fusion", "recompute", "step", "overhead", "tokens/s", "saved" if cpu else "peak memory", "ratio"),
        tuple(cells),
        frozenset() if fastest is None else frozenset((fastest + 1,)),
        note,
    )


def _step_cells(row: Row, plain: Row, memory: str) -> tuple[str, ...]:
    is_plain = row["fusion"] == PLAIN
    return (
        row["fusion"] + (f" {WRONG}" if row.get("problems") else ""),
        "–" if is_plain else str(row["recompute"]),
        microseconds(row["step_seconds"]),
        "–" if is_plain else f"{overhead(row, plain):+.1%}",
        f"{row['tokens'] / row['step_seconds']:,.0f}",
        mebibytes(row[memory]),
        f"{row[memory] / plain[memory]:.2f}",
    )


def _depth_table(rows: list[Row]) -> Table:
    layers = sorted({row["layers"] for row in rows})
    cells = []
    for name, points in _depth_curves(rows).items():
        by_layers = dict(points)
        cells.append((name, *(mebibytes(by_layers[count]) if count in by_layers else "–" for count in layers)))
    return Table(
        f"Bytes saved for the backward against depth, C={rows[0]['width']}, {rows[0]['tokens']} tokens, "
        f"{rows[0]['dtype']}",
        ("recompute", *(f"{count} layers" for count in layers)),
        tuple(cells),
        note="Counted, so the same on any machine: every tensor that the compiled forward keeps, parameters left out.",
    )


def _depth_curves(rows: list[Row]) -> dict[str, Points]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = "plain model" if row["fusion"] == PLAIN else f"recompute={row['recompute']}"
        curves.setdefault(name, []).append((row["layers"], row["saved_bytes"]))
    return {name: sorted(points) for name, points in curves.items()}


def figures(result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Draw overhead by case, overhead against tokens, and saved bytes against depth."""
    drawn = []
    groups = _groups([row for row in result["rows"] if row["part"] == "step"])
    if groups:
        first = groups[0]
        ours = [row for row in first if row["fusion"] != PLAIN]
        plain = baseline(first)
        recomputes = list(dict.fromkeys(str(row["recompute"]) for row in ours))
        fusions = list(dict.fromkeys(row["fusion"] for row in ours))
        heights = {(row["fusion"], str(row["recompute"])): overhead(row, plain) for row in ours}
        values = {f"recompute={way}": [heights.get((fusion, way)) for fusion in fusions] for way in recomputes}
        title = f"C={plain['width']}, {plain['tokens']} tokens, {plain['layers']} layers"
        cpu = result["environment"]["device"] == "cpu"
        line = None if cpu else (PUBLISHED_OVERHEAD, "arXiv 2512.24880")
        panel = Panel(title + (", CPU" if cpu else ""), "fusion", "step time beyond plain, share", line=line)
        path = bars(folder / "training-overhead.png", panel, fusions, values)
        drawn.append((path, "Step time beyond the plain model's, as a share of it."))
    against = _tokens_curves(groups)
    if any(len(points) > 1 for points in against.values()):
        panel = Panel("overhead against tokens", "tokens in a step", "share", "x", (PUBLISHED_OVERHEAD, "published"))
        path = lines(folder / "training-tokens.png", [(panel, against)])
        drawn.append((path, "Overhead against the number of tokens in a step, at one width."))
    depth = [row for row in result["rows"] if row["part"] == "depth"]
    if depth:
        in_mib = {name: [(x, y / 2**20) for x, y in points] for name, points in _depth_curves(depth).items()}
        panel = Panel("saved for the backward", "layers", "MiB")
        drawn.append((lines(folder / "training-depth.png", [(panel, in_mib)]), "Memory against depth."))
    return drawn


def _tokens_curves(groups: list[list[Row]]) -> dict[str, Points]:
    """Return overhead against tokens for each case, at the width and depth of the first setting."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        plain = baseline(group)
        if (plain["width"], plain["layers"]) != (groups[0][0]["width"], groups[0][0]["layers"]):
            continue
        for row in group:
            if row["fusion"] != PLAIN:
                name = f"{row['fusion']}/{row['recompute']}"
                curves.setdefault(name, []).append((row["tokens"], overhead(row, plain)))
    return {name: sorted(points) for name, points in curves.items()}
