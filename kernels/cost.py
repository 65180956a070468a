"""What every operator and fusion choice costs: bytes, flops, launches, and what is saved for the backward.

Expressions of sympy in the symbols below; `evaluate` puts numbers in. Each pass over an operator has two
amounts of traffic with the device's memory:

- `least`: each input read once and each output written once. No kernel moves less, so it is what benchmarks
  divide by.
- `ours`: what the kernels beside this file move where their second walk over the streams misses the cache.
  Counted once a launch: phi, the coefficients, and what programs that run side by side load together. The
  padding of coefficient tiles is left out.

The unit of a stream's traffic is the element, of coefficients and phi the float32. phi has n² + 2n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import sympy
from sympy import Integer, ceiling

if TYPE_CHECKING:
    from sympy import Expr

TOKENS, STREAMS, WIDTH, SITES, INTERVAL, ELEMENT, ITERS = sympy.symbols(
    "tokens n_streams width sites interval element_size iters", integer=True, positive=True
)
FLOAT = 4

_n, _C = STREAMS, WIDTH
_ROWS = _n**2 + 2 * _n
_MIXING = _n**2 + _n
_PHI = _ROWS * _n * _C
_HEAD_PHI = _n * _n * _C


@dataclass(frozen=True)
class Traffic:
    """What moves between the device's memory and its processors.

    Attributes:
        streams: elements a token, in the streams' dtype.
        coefficients: float32 values a token.
        mapping: float32 values a call, of phi and its gradient.
    """

    streams: Expr
    coefficients: Expr = Integer(0)
    mapping: Expr = Integer(0)

    def __add__(self, other: Traffic) -> Traffic:
        """Return the traffic of both."""
        return Traffic(
            self.streams + other.streams, self.coefficients + other.coefficients, self.mapping + other.mapping
        )

    def __mul__(self, times: Any) -> Traffic:
        """Return the traffic of that many calls."""
        return Traffic(self.streams * times, self.coefficients * times, self.mapping * times)

    @property
    def bytes(self) -> Expr:
        """Bytes of a call on `TOKENS` tokens."""
        return TOKENS * (ELEMENT * self.streams + FLOAT * self.coefficients) + FLOAT * self.mapping


@dataclass(frozen=True)
class Cost:
    """What one pass costs.

    Attributes:
        least: traffic that no kernel can avoid.
        ours: traffic of the kernels beside this file.
        flops: multiplications and additions a token.
        launches: kernels launched by a call.
    """

    least: Traffic
    ours: Traffic
    flops: Expr
    launches: Expr

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of one after the other."""
        return Cost(
            self.least + other.least, self.ours + other.ours, self.flops + other.flops, self.launches + other.launches
        )

    def __mul__(self, times: Any) -> Cost:
        """Return the cost of that many calls."""
        return Cost(self.least * times, self.ours * times, self.flops * times, self.launches * times)


@dataclass(frozen=True)
class Passes:
    """The forward and the backward of an operator, a site or a chain."""

    forward: Cost
    backward: Cost

    def __add__(self, other: Passes) -> Passes:
        """Return both, one after the other."""
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: Any) -> Passes:
        """Return that many of these."""
        return Passes(self.forward * times, self.backward * times)


def recompute_interval(sites: int, n_streams: int) -> int:
    """Return L_r: store the streams every so many sites and replay those between in the backward.

    The minimum over L_r of n·C·ceil(L / L_r) stored and (n + 2)·C·L_r alive during one replay (arXiv 2512.24880,
    Eq. 20, here in sites), near sqrt(n·L / (n + 2)). Of equals, the smallest: it replays the fewest sites.

    Raises:
        ValueError: fewer than one site or stream.
    """
    if sites < 1 or n_streams < 1:
        raise ValueError(f"{sites} sites of {n_streams} streams: at least one of each is needed")

    def held(interval: int) -> int:
        return n_streams * -(-sites // interval) + (n_streams + 2) * interval

    return min(range(1, sites + 1), key=held)
