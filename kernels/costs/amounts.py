"""Amounts that costs are made of: traffic, flops and launches, in symbols of sympy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from sympy import Expr, Integer

TOKENS, STREAMS, WIDTH, SITES, INTERVAL, ELEMENT, ITERS = sympy.symbols(
    "tokens n_streams width sites interval element_size iters", integer=True, positive=True
)
# What a manifold says: rows of phi, multiplications and additions that make a token's matrix, and, each 1 or 0, whether
# streams mix and whether the matrix is made by Sinkhorn's iterations.
ROWS = sympy.Symbol("rows", integer=True, positive=True)
MATRIX_FLOPS = sympy.Symbol("matrix_flops", integer=True, nonnegative=True)
MIXES, ITERATED = sympy.symbols("mixes iterated", integer=True, nonnegative=True)
# Whether the streams are anchored, as rewritten graphs hold them: 1 or 0.
ANCHORED = sympy.Symbol("anchored", integer=True, nonnegative=True)
FLOAT = 4
ZERO = Integer(0)


@dataclass(frozen=True)
class Traffic:
    """What moves between the device's memory and its processors.

    Attributes:
        streams: elements a token, in the streams' dtype.
        coefficients: float32 values a token.
        phi: float32 values a call, of phi and its gradient.
    """

    streams: Expr
    coefficients: Expr = ZERO
    phi: Expr = ZERO

    def __add__(self, other: Traffic) -> Traffic:
        """Return the traffic of both."""
        return Traffic(self.streams + other.streams, self.coefficients + other.coefficients, self.phi + other.phi)

    def __mul__(self, times: Any) -> Traffic:
        """Return the traffic of that many calls."""
        return Traffic(self.streams * times, self.coefficients * times, self.phi * times)

    @property
    def bytes(self) -> Expr:
        """Bytes of a call on `TOKENS` tokens."""
        return TOKENS * (ELEMENT * self.streams + FLOAT * self.coefficients) + FLOAT * self.phi


@dataclass(frozen=True)
class Cost:
    """What one pass costs.

    Attributes:
        least: traffic that no kernel can avoid.
        ours: traffic of the kernels of `gpu`.
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
