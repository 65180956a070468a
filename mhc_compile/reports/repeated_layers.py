"""Fold equal layers into one row: "model.layers.0–31.mhc.mlp", not thirty-two of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..passes.residual import Site

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@dataclass(frozen=True)
class SiteRow:
    """One site, or the same site of a run of layers.

    Attributes:
        site: the first of them.
        first: number of the first layer; None for a site that is not folded.
        last: number of the last layer.
    """

    site: Site
    first: int | None = None
    last: int | None = None

    @property
    def name(self) -> str:
        """The site's name, with the range of layers in the place of its first number."""
        if self.first is None or self.last is None or self.first == self.last:
            return self.site.name
        return _NUMBER.sub(f"{self.first}–{self.last}", self.site.name, count=1)

    @property
    def count(self) -> int:
        """Number of sites that the row stands for."""
        return 1 if self.first is None or self.last is None else self.last - self.first + 1


def folded(sites: Sequence[Site]) -> list[SiteRow]:
    """Fold the sites of consecutive layers that differ in the first number of their names alone.

    A layer is the run of sites that share that number; layers fold if their sites are alike in all else that is shown.
    """
    layers: list[tuple[int | None, list[Site]]] = []
    for site in sites:
        number = _number(site)
        if layers and number is not None and layers[-1][0] == number:
            layers[-1][1].append(site)
        else:
            layers.append((number, [site]))
    rows: list[list[SiteRow]] = []
    shown: tuple[object, ...] | None = None
    for number, layer in layers:
        alike = tuple(_shown(site) for site in layer)
        if rows and number is not None and alike == shown and rows[-1][0].last == number - 1:
            rows[-1] = [replace(row, last=number) for row in rows[-1]]
        else:
            rows.append([SiteRow(site, number, number) for site in layer])
        shown = alike
    return [row for group in rows for row in group]


def _number(site: Site) -> int | None:
    found = _NUMBER.search(site.name)
    return int(found.group()) if found is not None else None


def _shown(site: Site) -> tuple[object, ...]:
    return _NUMBER.sub("#", site.name, count=1), site.norm, site.shape, site.dtype, site.location
