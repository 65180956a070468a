"""Tables and figures of `benchmarks.stability`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .figures import Panel, Points, lines
from .terminal import Table


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the gain over depth, and the outcome of training."""
    return [table for table in (_gain_table(result), _training_table(result)) if table.rows]


def _gain_table(result: dict[str, Any]) -> Table:
    rows = [row for row in result["rows"] if row["part"] == "gain"]
    depths = rows[0]["depths"] if rows else []
    groups = dict.fromkeys((row["spread"], row["manifold"]) for row in rows)
    cells = []
    for spread, manifold in groups:
        same = [row for row in rows if (row["spread"], row["manifold"]) == (spread, manifold)]
        gains = [_both(same, index) for index in range(len(depths))]
        cells.append((manifold, f"{spread:g}", *gains))
    return Table(
        "Composite gain, forward / backward, after so many sites",
        ("manifold", "spread of the logits", *(f"{depth} sites" for depth in depths)),
        tuple(cells),
        note="Mixing logits drawn around their start, anew for every site and token; mean over tokens, largest over "
        f"{len({row['seed'] for row in rows})} seeds. A plain residual stream has 1. No training.",
    )


def _both(rows: list[dict[str, Any]], index: int) -> str:
    return " / ".join(_short(max(row[way][index] for row in rows)) for way in ("forward", "backward"))


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _training_table(result: dict[str, Any]) -> Table:
    rows = [row for row in result["rows"] if row["part"] == "training"]
    rates = sorted({row["rate"] for row in rows})
    cells: list[tuple[str, ...]] = []
    best: list[int] = []
    for rate in rates:
        same = [row for row in rows if row["rate"] == rate]
        kinds = list(dict.fromkeys(row["kind"] for row in same))
        group = [[row for row in same if row["kind"] == kind] for kind in kinds]
        for kind, runs in zip(kinds, group, strict=True):
            if all(_beats(runs, others) for others in group if others is not runs) and len(group) > 1:
                best.append(len(cells))
            cells.append((kind, f"{rate:g}", *_outcome(runs)))
    facts = result["facts"]
    return Table(
        f"Training {facts.get('blocks')} residual blocks of width {facts.get('width')} on handwritten digits, "
        f"{facts.get('steps')} steps",
        ("stream", "learning rate", "diverged", "at step", "final loss", "largest gradient norm", "largest gain"),
        tuple(cells),
        frozenset(best),
        "AdamW, no clipping, no warm-up. Diverged: the loss is not finite, or above 3 ln 10 for 5 steps. Final loss: "
        "mean of the last 10 steps, over the seeds that did not diverge, ± their spread. Gain: largest over depth and "
        "steps, forward / backward. The best of a learning rate is marked where it diverges less often "
        "than the others, or its loss is lower by more than the seeds spread.",
    )


def _beats(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether runs diverge less often, or as often and end lower by more than either's seeds spread."""
    ours, theirs = _divergences(runs), _divergences(others)
    if ours != theirs:
        return ours < theirs
    if len(runs) < 2 or ours:
        return False
    finals = [[_final(row) for row in rows] for rows in (runs, others)]
    spread = max(statistics.stdev(values) for values in finals)
    return statistics.fmean(finals[1]) - statistics.fmean(finals[0]) > spread


def _final(row: dict[str, Any]) -> float:
    return float("inf") if row["final_loss"] is None else float(row["final_loss"])


def _divergences(rows: list[dict[str, Any]]) -> int:
    return sum(row["diverged_at"] is not None for row in rows)


def _outcome(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    steps = ", ".join(str(row["diverged_at"]) for row in rows if row["diverged_at"] is not None)
    finals = [_final(row) for row in rows if row["diverged_at"] is None]
    spread = f" ± {statistics.stdev(finals):.3f}" if len(finals) > 1 else ""
    final = f"{statistics.fmean(finals):.3f}{spread}" if finals else "–"
    norm = max((value for row in rows for value in row["gradient_norms"] if value is not None), default=float("nan"))
    gains = [
        max((value for row in rows for value in row[f"{way}_gains"] if value is not None), default=float("nan"))
        for way in ("forward", "backward")
    ]
    return (
        f"{_divergences(rows)} of {len(rows)}",
        steps or "–",
        final,
        f"{norm:.3g}",
        " / ".join(_short(gain) for gain in gains),
    )


def figures(result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Draw the gain against depth, and loss and gain of the training runs of the first seed."""
    drawn = []
    gains = [row for row in result["rows"] if row["part"] == "gain"]
    if gains:
        path = lines(folder / "stability-gain.png", _gain_panels(gains))
        drawn.append((path, "Composite gain against depth, mixing logits perturbed by three spreads."))
    runs = [row for row in result["rows"] if row["part"] == "training"]
    if runs:
        path = lines(folder / "stability-training.png", _training_panels(runs))
        drawn.append((path, "Training loss at each learning rate, and the composite gain meanwhile; first seed."))
    return drawn


def _gain_panels(rows: list[dict[str, Any]]) -> list[tuple[Panel, dict[str, Points]]]:
    panels: list[tuple[Panel, dict[str, Points]]] = []
    for spread in dict.fromkeys(row["spread"] for row in rows):
        same = [row for row in rows if row["spread"] == spread and row["seed"] == rows[0]["seed"]]
        curves: dict[str, Points] = {
            row["manifold"]: list(zip(row["depths"], row["forward"], strict=True)) for row in same
        }
        title = f"spread {spread:g}"
        panels.append((Panel(title, "sites", "composite gain, forward", "y", (1.0, "plain residual")), curves))
    return panels


def _training_panels(rows: list[dict[str, Any]]) -> list[tuple[Panel, dict[str, Points]]]:
    seed = rows[0]["seed"]
    panels: list[tuple[Panel, dict[str, Points]]] = []
    for rate in sorted({row["rate"] for row in rows}):
        same = [row for row in rows if row["rate"] == rate and row["seed"] == seed]
        panels.append((Panel(f"learning rate {rate:g}", "step", "loss", "y"), _curves(same, "losses")))
    top = max(row["rate"] for row in rows)
    last = [row for row in rows if row["rate"] == top and row["seed"] == seed]
    panels.append((Panel(f"learning rate {top:g}", "step", "gain, forward", "y"), _curves(last, "forward_gains")))
    return panels


def _curves(rows: list[dict[str, Any]], key: str) -> dict[str, Points]:
    finite = {row["kind"]: [(step, value) for step, value in enumerate(row[key]) if value is not None] for row in rows}
    return {kind: points for kind, points in finite.items() if points}
