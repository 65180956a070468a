"""Figures as PNG, drawn from rows of results; needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COLORS = ("tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        xlabel: with the unit.
        ylabel: with the unit.
        log: which axes are logarithmic: "", "x", "y" or "xy".
        line: a horizontal line to compare with, and what it is.
    """

    title: str
    xlabel: str
    ylabel: str
    log: str = ""
    line: tuple[float, str] | None = None


Points = Sequence[tuple[float, float]]


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def lines(path: Path, panels: Sequence[tuple[Panel, Mapping[str, Points]]]) -> Path:
    """Draw panels of named curves side by side and return the file.

    Args:
        path: the PNG.
        panels: each with its curves, (x, y) points by name; a name has one color in all panels.
    """
    figure, axes = _canvas(len(panels))
    names = list(dict.fromkeys(name for _, curves in panels for name in curves))
    for ax, (panel, curves) in zip(axes, panels, strict=True):
        for name, points in curves.items():
            # Where colors come round again, lines are dashed.
            again, color = divmod(names.index(name), len(_COLORS))
            looks = {"color": _COLORS[color], "linestyle": "--" if again else "-", "linewidth": 1.4}
            marker = "o" if len(points) < 12 else None
            ax.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=name, **looks)
        _dress(ax, panel)
    return _save(figure, path)


def bars(path: Path, panel: Panel, groups: Sequence[str], values: Mapping[str, Sequence[float | None]]) -> Path:
    """Draw groups of bars, one bar in each group for every name, and return the file.

    Args:
        path: the PNG.
        panel: titles and a line to compare with.
        groups: labels along x.
        values: by name, one value for each group; None leaves a gap.
    """
    figure, (ax,) = _canvas(1, width=max(6.0, 0.9 * len(groups) + 2.0))
    width = 0.8 / max(len(values), 1)
    for index, (name, heights) in enumerate(values.items()):
        places = [(group + (index + 0.5) * width - 0.4, height) for group, height in enumerate(heights)]
        drawn = [(place, height) for place, height in places if height is not None]
        if drawn:
            ax.bar(*zip(*drawn, strict=True), width=width, color=_COLORS[index % len(_COLORS)], label=name)
    ax.set_xticks(range(len(groups)), groups, fontsize=8)
    _dress(ax, panel)
    return _save(figure, path)


def _canvas(panels: int, width: float = 0.0) -> tuple[Any, list[Any]]:
    # Figure, not pyplot: no display, no global state.
    from matplotlib.figure import Figure

    width = width or max(3.4, min(5.0, 15.0 / panels))
    figure = Figure(figsize=(width * panels, 3.8), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _dress(ax: Any, panel: Panel) -> None:
    ax.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    if "x" in panel.log:
        ax.set_xscale("log")
    if "y" in panel.log:
        ax.set_yscale("log")
    if panel.line is not None:
        ax.axhline(panel.line[0], color="black", linestyle=":", linewidth=1.0, label=panel.line[1])
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8)
    ax.grid(alpha=0.25)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib: drawing the same figures anew leaves the file as it was.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
