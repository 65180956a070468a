"""Tables and figures of `benchmarks.kernels`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .figures import Panel, bars
from .implementations import INDUCTOR
from .terminal import WRONG, Table, microseconds

Row = dict[str, Any]
PLAIN = "plain PyTorch"
NAMES = {"triton": "Triton kernels", "cpu": "compiled C++", "reference": PLAIN}
_SHAPE = ("operator", "tokens", "n", "width", "dtype")


def tables(result: dict[str, Any]) -> list[Table]:
    """Return one table of all shapes and implementations."""
    if not result["rows"]:
        return []
    facts = result["facts"]
    cells: list[tuple[str, ...]] = []
    best = set()
    for group in _groups(result["rows"]):
        inductor = next((row for row in group if row["implementation"] == INDUCTOR), None)
        for row in group:
            right = [one for one in group if not one.get("problems")]
            if len(group) > 1 and right and row is min(right, key=total):
                best.add(len(cells))
            cells.append(_cells(row, inductor))
    cpu = result["environment"]["device"] == "cpu"
    notes = [
        f"{WRONG}: FAILED its check against float64." if any(row.get("problems") for row in result["rows"]) else "",
        f"Operators run as {facts['implementation']}. `post_pre` is the boundary between two sites. To Inductor:",
        "forward and backward together, over those of `torch.compile` on the plain definition; below 1 is faster.",
    ]
    if cpu:
        notes.append("CPU times say nothing about the kernels: `boundary`, `site` and `paper` are the same code here.")
    if any("graph_forward_seconds" in row for row in result["rows"]):
        notes.append("In brackets: within a CUDA graph.")
    table = Table(
        f"Time, and share of the copy bandwidth ({facts['copy_bytes_per_second'] / 1e9:.0f} GB/s) by least traffic"
        f"{', CPU' if cpu else ''}",
        (
            "operator",
            "implementation",
            "tokens",
            "n",
            "C",
            "dtype",
            "forward",
            "share",
            "backward",
            "share",
            "to Inductor",
        ),
        tuple(cells),
        # Plain PyTorch under three names has no best.
        frozenset(best) if facts["implementation"] != PLAIN else frozenset(),
        " ".join(note for note in notes if note),
    )
    return [table]


def total(row: Row) -> float:
    """Return the seconds of forward and backward."""
    return float(row["forward_seconds"]) + float(row["backward_seconds"])


def _groups(rows: list[Row]) -> list[list[Row]]:
    keys = dict.fromkeys(tuple(row[name] for name in _SHAPE) for row in rows)
    return [[row for row in rows if tuple(row[name] for name in _SHAPE) == key] for key in keys]


def _cells(row: Row, inductor: Row | None) -> tuple[str, ...]:
    in_graph = row.get("graph_forward_seconds")
    return (
        row["operator"],
        row["implementation"] + (f" {WRONG}" if row.get("problems") else ""),
        *(str(row[name]) for name in ("tokens", "n", "width", "dtype")),
        microseconds(row["forward_seconds"]) + (f" ({microseconds(in_graph)})" if in_graph else ""),
        f"{row['forward_share_of_copy']:.0%}",
        microseconds(row["backward_seconds"]),
        f"{row['backward_share_of_copy']:.0%}",
        f"{total(row) / total(inductor):.2f}" if inductor else "–",
    )


def figures(result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Draw the share of the limit of every implementation, for each operator at the first shape that was measured."""
    groups: dict[str, list[Row]] = {}
    for group in _groups(result["rows"]):
        groups.setdefault(group[0]["operator"], group)
    if not groups:
        return []
    passes = ("forward", "backward")
    labels = [f"{operator}\n{one}" for operator in groups for one in passes]
    values: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(row["implementation"] for group in groups.values() for row in group):
        values[name] = []
        for group in groups.values():
            row = next((row for row in group if row["implementation"] == name), None)
            values[name] += [row[f"{direction}_share_of_copy"] if row else None for direction in passes]
    first = next(iter(groups.values()))[0]
    cpu = ", CPU" if result["environment"]["device"] == "cpu" else ""
    title = f"{first['tokens']} tokens, n={first['n']}, C={first['width']}, {first['dtype']}{cpu}"
    panel = Panel(title, "", "share of copy bandwidth", line=(1.0, "copy"))
    path = bars(folder / "kernels-share.png", panel, labels, values)
    return [(path, "Least traffic over time, as a share of the copy bandwidth of the same run.")]
