"""The figure of `benchmarks.overlap`: when each rank computes and sends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COLORS = {"F": "tab:blue", "B": "tab:orange", "I": "tab:green", "W": "tab:olive"}
_NAMES = {"F": "forward", "B": "backward", "I": "input gradients", "W": "weight gradients"}
_SEND = "tab:gray"


def timelines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Draw one panel for each row, below each other on one scale, and return the file.

    Args:
        path: the PNG.
        rows: `model`, `schedule` and, for each rank, spans in milliseconds.
    """
    # Figure, not pyplot: no display, no global state.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10.0, 1.5 * len(rows) + 0.8), layout="constrained")
    axes = list(figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0])
    for ax, row in zip(axes, rows, strict=True):
        ranks = row["ranks"]
        for rank, spans in enumerate(ranks):
            place = len(ranks) - 1 - rank
            for kind, _, _, start, end in spans["computed"]:
                ax.broken_barh([(start, end - start)], (place, 0.55), color=_COLORS[kind], edgecolor="white", lw=0.3)
            ax.broken_barh([(start, end - start) for start, end in spans["sent"]], (place - 0.28, 0.2), color=_SEND)
        names = [f"rank {rank}" for rank in range(len(ranks))]
        ax.set_yticks([len(ranks) - 0.73 - rank for rank in range(len(ranks))], names)
        ax.set_title(f"{row['model']}, {row['schedule']}", fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", alpha=0.25)
    axes[-1].set_xlabel("ms")
    used = {kind for row in rows for spans in row["ranks"] for kind, *_ in spans["computed"]}
    keys = [Patch(color=_COLORS[kind], label=name) for kind, name in _NAMES.items() if kind in used]
    figure.legend(handles=[*keys, Patch(color=_SEND, label="sending")], ncols=5, fontsize=8, loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
