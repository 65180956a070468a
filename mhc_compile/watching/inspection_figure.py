"""The picture of an inspection: matrices, leans, similarity and gain over depth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MHCError

if TYPE_CHECKING:
    from .inspection import Inspection


def draw(found: Inspection, path: Path) -> Path:
    """Draw an inspection and return the path.

    Raises:
        MHCError: matplotlib is missing or broken.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MHCError(f"the picture needs matplotlib, which cannot be imported: {error}") from error
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    depth = range(1, len(found.sites) + 1)
    n = len(found.sites[0].pre)
    _heat(axes[0, 0], [[v for row in site.res for v in row] for site in found.sites], "res, out × in", 0, 1)
    _heat(axes[0, 1], [site.pre for site in found.sites], "pre: what the branch reads", 0, 1)
    _heat(axes[0, 2], [site.post for site in found.sites], "post: where the branch goes", 0, 2)
    axes[0, 0].set_xticks(range(0, n * n, n))
    for axis in axes[0, 1:]:
        axis.set_xticks(range(n))
    axes[1, 0].plot(depth, [site.similarity for site in found.sites])
    axes[1, 0].set_title("cosine between streams")
    for gain in found.gains:
        axes[1, 1].plot(range(1, len(gain.forward) + 1), gain.forward, label="forward")
        axes[1, 1].plot(range(1, len(gain.backward) + 1), gain.backward, label="backward")
    axes[1, 1].set_title("composite gain")
    axes[1, 1].legend(frameon=False)
    axes[1, 2].bar(depth, [site.moved for site in found.sites], label="biases")
    axes[1, 2].plot(depth, [site.projection for site in found.sites], "k.", label="phi × scale")
    axes[1, 2].set_title("distance from the start")
    axes[1, 2].legend(frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("site")
    figure.suptitle(f"{found.model}: mixing over depth")
    figure.savefig(path, dpi=110)
    return path


def _heat(axis: Any, rows: list[Any], title: str, low: float, high: float) -> None:
    image = axis.imshow(rows, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axis.set_title(title)
    axis.set_ylabel("site")
    axis.figure.colorbar(image, ax=axis)
