"""What the launches of a site move, counted by the configurations that they would get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
from sympy import Expr, Integer, ceiling

from ..gpu import configurations
from ..gpu.configurations import Geometry
from .amounts import ANCHORED, ELEMENT, MIXES, STREAMS, TOKENS, WIDTH, ZERO, Traffic

_n, _C = STREAMS, WIDTH
MIXING = _n**2 + _n  # what `post` reads: res and post


class _Launched(sympy.Function):
    """A number of the launches that depends on the shape in ways that sympy should not simplify.

    Arguments: its place in `_NUMBERS`, tokens, n, C, rows of phi, bytes of an element, whether a `post` comes first.
    """

    @classmethod
    def eval(cls, *arguments: Expr) -> Expr | None:
        """Return the number, once the arguments are numbers."""
        if not all(argument.is_Integer for argument in arguments):
            return None
        place, tokens, n, width, rows, element, mixes = (int(argument) for argument in arguments)
        # Of the dtypes with two bytes the usual one.
        geometry = Geometry(tokens, n, width, rows, False, element, 2 if element == 2 else 1)
        return Integer(list(_NUMBERS.values())[place](geometry, bool(mixes)))


def _shares(width: int, splits: int, block_width: int) -> int:
    return configurations.ceil_div(width, configurations.chunk_width(width, splits, block_width))


def _projection_splits(geometry: Geometry, mixes: bool) -> int:
    config = configurations.projection_config(geometry, mixes)
    return _shares(geometry.width, config.splits, config.block_width)


def _gate_splits(geometry: Geometry, mixes: bool) -> int:
    config = configurations.gates_config(geometry)
    return _shares(geometry.width, config.splits, config.block_width)


def _token_splits(geometry: Geometry, mixes: bool) -> int:
    config = configurations.stream_gradients_config(geometry)
    return _shares(geometry.tokens, config.splits, config.block_tokens)


def _normed_stream_launches(geometry: Geometry, mixes: bool) -> int:
    return configurations.ceil_div(geometry.n, configurations.stream_gradients_config(geometry, normed=True).streams)


def _programs(geometry: Geometry, mixes: bool) -> int:
    return configurations.ceil_div(geometry.tokens, configurations.coefficients_config(geometry).block_tokens)


_NUMBERS: dict[str, Callable[[Geometry, bool], int]] = {
    "projection_splits": _projection_splits,
    "gate_splits": _gate_splits,
    "token_splits": _token_splits,
    "normed_stream_launches": _normed_stream_launches,
    "programs": _programs,
    "slots": lambda geometry, mixes: geometry.slots,
    "prepared": lambda geometry, mixes: configurations.projection_config(geometry, mixes).prepared,
}


@dataclass(frozen=True)
class SiteLaunches:
    """The launches of a site, by its rows of phi.

    Attributes:
        rows: of phi.
        mixes: a `post` makes its streams first.
        normed: the norm of its layer input is within; RMSNorm is counted, a LayerNorm has some floats a token more.
    """

    rows: Expr
    mixes: bool = False
    normed: bool = False

    def number(self, name: str) -> Expr:
        """Return a number of `_NUMBERS`."""
        return _Launched(list(_NUMBERS).index(name), TOKENS, _n, _C, self.rows, ELEMENT, int(self.mixes))

    @property
    def written(self) -> Expr:
        """Floats a token of post and res; a head has neither."""
        return ZERO if self.rows == _n else MIXING

    @property
    def differentiated(self) -> Expr:
        """Floats a token of the gradients of post and res that are read; of a constant res none."""
        return ZERO if self.rows == _n else _n + MIXES * _n**2

    @property
    def kept(self) -> Expr:
        """Floats a token of the projection."""
        return self.rows + 1

    @property
    def phi(self) -> Expr:
        """Floats of phi."""
        return self.rows * _n * _C

    @property
    def mixing(self) -> Traffic:
        """What making the streams takes beside loading the n that there were."""
        return Traffic(_C, MIXING) if self.mixes else Traffic(ZERO)

    def measure(self, stored: bool) -> Traffic:
        """Return the traffic of preparing phi, projecting and making coefficients; with `stored` it writes streams."""
        phi = self.phi * (1 + 2 * self.number("prepared"))
        sums = 2 * self.number("projection_splits") * self.kept
        streams = 2 * _n * _C if stored else _n * _C
        return self.mixing + Traffic(streams, sums + self.kept + self.written, phi)

    def collapse(self, copied: bool) -> Traffic:
        """Return the traffic of the collapse, which makes and writes the streams if it mixes."""
        written = (2 * _n + 1) * _C if self.mixes else (_n + 1) * _C
        return self.mixing + self.norm + Traffic(written, _n + 1 + (2 * MIXING if copied else 0))

    @property
    def norm(self) -> Traffic:
        """What a norm takes: its statistics and its weight."""
        return Traffic(ZERO, Integer(2), _C) if self.normed else Traffic(ZERO)

    @property
    def stream_launches(self) -> Expr:
        """Launches of the gradients of the streams, some streams each."""
        return self.number("normed_stream_launches") if self.normed else ceiling(_n / 4)

    @property
    def measure_launches(self) -> Expr:
        """Launches of `measure`."""
        return 2 + self.number("prepared")

    def backward(self) -> Traffic:
        """Return the traffic of gates, coefficients, streams and parameters; a `post` differentiated comes after."""
        slopes = self.number("slots") + _n + 1
        parts = 2 * self.number("programs") * 2 * self.rows
        shares = 2 * self.number("token_splits") * self.phi
        gates = Traffic((_n + 1) * _C, 2 * self.number("gate_splits") * (2 * _n + 1 if self.normed else _n))
        coefficients = Traffic(ZERO, self.kept + self.differentiated + slopes, parts)
        again = (Traffic((_n + 1) * _C, slopes) + self.mixing) * self.stream_launches
        # The launch that differentiates an anchored stream 0 loads all of phi: the sum of its columns is stream 0's.
        anchor = ANCHORED * self.rows * (_n - sympy.Min(_n, 4)) * _C
        results = Traffic((2 * _n if self.mixes else _n) * _C, phi=2 * self.phi + shares + anchor)
        if self.normed:
            gates += self.norm + Traffic(ZERO, _n + 1)  # makes the layer input again
            # Of the statistics 1/RMS, and the mean that `coefficient_gradients` leaves.
            coefficients += Traffic(ZERO, Integer(2))
            again += Traffic(ZERO, Integer(2), _C) * self.stream_launches
            results += Traffic(ZERO, phi=2 * _C * (self.number("token_splits") + 1))
        return gates + self.mixing + coefficients + again + results
