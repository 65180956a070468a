"""Look at what a model's mixing has learned: matrices, leans, streams and gain over depth; as text, page or picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..api import explain, unwrap
from ..gain import ChainGain, composite_gain, observe
from .static_mixing import static_mixing

# Less than this, in any coefficient, is no movement: rounding, or a learning rate that does not reach the mixing.
STILL = 1e-3


@dataclass(frozen=True)
class InspectedSite:
    """One site, for one input.

    Attributes:
        name: its dotted name.
        pre: [n], how much of each stream its branch reads, at phi = 0.
        post: [n], how much of its branch each stream is written, at phi = 0.
        res: [n, n], `res[out, in]`, mean over the input's tokens.
        similarity: cosine between two different streams before it, mean over pairs and tokens.
        moved: how far its coefficients at phi = 0 are from where `init="preserve"` starts, the largest difference.
        projection: root mean square of phi times |scale|: how much the input decides.
    """

    name: str
    pre: tuple[float, ...]
    post: tuple[float, ...]
    res: tuple[tuple[float, ...], ...]
    similarity: float
    moved: float
    projection: float


@dataclass(frozen=True)
class Inspection:
    """A model's mixing over depth.

    Attributes:
        model: the model's class.
        sites: in the order in which the model runs them.
        gains: the composite gain over depth of each chain.
    """

    model: str
    sites: tuple[InspectedSite, ...]
    gains: tuple[ChainGain, ...]

    @property
    def still(self) -> bool:
        """Whether no coefficient has moved: the model computes what the plain one would."""
        return max(max(site.moved, site.projection) for site in self.sites) < STILL

    def scalars(self) -> dict[str, float]:
        """Return the inspection in five numbers."""
        return {
            "mhc_moved": max(site.moved for site in self.sites),
            "mhc_projection": max(site.projection for site in self.sites),
            "mhc_similarity": statistics.fmean(site.similarity for site in self.sites),
            "mhc_gain_forward": max(gain.forward[-1] for gain in self.gains),
            "mhc_gain_backward": max(gain.backward[-1] for gain in self.gains),
        }

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page and return its path."""
        import jinja2

        loader = jinja2.PackageLoader("mhc_compile", "templates")
        environment = jinja2.Environment(loader=loader, autoescape=True)
        page = environment.get_template("inspection.html").render(found=self, curve=_curve)
        Path(path).write_text(page, encoding="utf-8")
        return Path(path)

    def to_png(self, path: str | Path) -> Path:
        """Draw everything in one picture and return its path; needs matplotlib."""
        from .inspection_figure import draw

        return draw(self, Path(path))

    def headline(self) -> str:
        """Return the scalars in one line, and a second line if nothing has moved."""
        scalars = ", ".join(f"{name} {value:.4g}" for name, value in self.scalars().items())
        still = f"\nnothing has moved by {STILL:g}: the model still computes what the plain one would"
        return f"{self.model}: {len(self.sites)} sites, {scalars}{still if self.still else ''}"

    def __str__(self) -> str:
        """Return a table that a person can read."""
        lines = [self.headline()]
        width = max(len(site.name) for site in self.sites)
        lines.append(f"{'site':<{width}}  reads  writes  kept   similarity  moved")
        for site in self.sites:
            kept = statistics.fmean(site.res[i][i] for i in range(len(site.res)))
            lean, write = max(range(len(site.pre)), key=site.pre.__getitem__), max(site.post)
            lines.append(
                f"{site.name:<{width}}  {site.pre[lean]:.2f}@{lean} {write:<6.3f}  {kept:.3f}  "
                f"{site.similarity:<10.4f}  {site.moved:.4f}"
            )
        return "\n".join(lines)


def inspect(model: nn.Module, *args: Any, **kwargs: Any) -> Inspection:
    """Run a model once on an input and return what its mixing does.

    Args:
        model: an attached model, compiled or not; it is run in the mode (train or eval) that it is in.
        *args: an input.
        **kwargs: the input's keyword arguments.

    Raises:
        NotAttachedError: the model has no mHC parameters.
    """
    seen = observe(model, *args, **kwargs)
    still = {site.name: site for site in static_mixing(unwrap(model))}
    gains = []
    for chain in explain(model, *args, **kwargs).chains:
        names = tuple(site.name for site in chain.sites)
        forward, backward = composite_gain([seen[name].res for name in names])
        gains.append(ChainGain(names, tuple(forward), tuple(backward)))
    sites = tuple(
        InspectedSite(
            name=name,
            pre=_numbers(still[name].pre),
            post=_numbers(still[name].post),
            res=tuple(_numbers(row) for row in one.res.float().flatten(0, -3).mean(0)),
            similarity=one.similarity,
            moved=still[name].moved,
            projection=still[name].projection,
        )
        for name, one in seen.items()
        if name in still
    )
    return Inspection(type(unwrap(model)).__name__, sites, tuple(gains))


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _curve(values: Sequence[float], width: float, height: float, low: float, high: float) -> str:
    """Return the points of a polyline over depth."""
    step = width / max(len(values) - 1, 1)
    span = max(high - low, 1e-9)
    return " ".join(f"{step * at:.1f},{height - height * (value - low) / span:.1f}" for at, value in enumerate(values))
