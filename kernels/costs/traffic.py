"""What every operator and fusion choice costs: bytes, flops, launches, and what is saved for the backward.

Expressions of sympy in the symbols below; `evaluate` puts numbers in. Each pass over an operator has two
amounts of traffic with the device's memory:

- `least`: each input read once and each output written once. No kernel moves less, so it is what benchmarks
  divide by.
- `ours`: what the kernels of `gpu` move where their second walk over the streams misses the cache.
  Counted once a launch: phi, the coefficients, and what programs that run side by side load together. The
  padding of coefficient tiles is left out.

The unit of a stream's traffic is the element, of coefficients and phi the float32. phi has n² + 2n rows, and
the backward of a fusion choice includes adding up the gradients of streams that two operators read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
from sympy import Expr, Integer, Piecewise, ceiling

from ..fusions import FUSIONS
from ..manifolds import MANIFOLDS

TOKENS, STREAMS, WIDTH, SITES, INTERVAL, ELEMENT, ITERS = sympy.symbols(
    "tokens n_streams width sites interval element_size iters", integer=True, positive=True
)
FLOAT = 4

_n, _C, _ZERO = STREAMS, WIDTH, Integer(0)
# The manifold that is counted throughout: it does all that any does.
_SINKHORN = MANIFOLDS["sinkhorn"]
_ROWS = _SINKHORN.rows(_n)
_MIXING = _n**2 + _n  # what `post` reads: res and post
_PHI = _ROWS * _n * _C
_PROJECTION = _SINKHORN.flops(_n, ITERS)
# The streams of 64 tokens stay in any of the caches meant here: 2 MB at n = 4, C = 4096.
_FEW = TOKENS <= 64
# n tiles and n² coefficients a token fit the registers.
_NARROW = _n <= 4


@dataclass(frozen=True)
class Traffic:
    """What moves between the device's memory and its processors.

    Attributes:
        streams: elements a token, in the streams' dtype.
        coefficients: float32 values a token.
        phi: float32 values a call, of phi and its gradient.
    """

    streams: Expr
    coefficients: Expr = _ZERO
    phi: Expr = _ZERO

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


class _Splits(sympy.Function):
    """Shares of the tokens that each hold partial sums of phi's gradient: `token_splits` of the kernels, for bfloat16.

    A function that waits for numbers: sympy 1.14 reduces Min(ceiling(1024 / (n * ceiling(C / 32))), 64) to 64.
    """

    @classmethod
    def eval(cls, tokens: Expr, n: Expr, width: Expr) -> Expr | None:
        """Return the number, once the arguments are numbers."""
        if not all(argument.is_Integer for argument in (tokens, n, width)):
            return None
        blocks = n * ceiling(width / 32)
        return max(Integer(1), min(ceiling(1024 / blocks), ceiling(tokens / 32), Integer(64)))


_SPLITS = _Splits(TOKENS, _n, _C)


def _again(elements: Expr) -> Expr:
    """Return what is read again where the cache has lost it: many tokens lose it, few do not."""
    return Piecewise((_ZERO, _FEW), (elements, True))


def _pre(rows: Expr, written: Expr, matrix_flops: Expr) -> Passes:
    """Return the cost of `pre` with that many rows of phi, which writes that many coefficients (`head`: none)."""
    phi = rows * _n * _C
    sums, gates = rows + 1, rows + 1 + _n
    split = sympy.Or(_FEW, sympy.Not(_NARROW))
    forward = Traffic((_n + 1) * _C, written, phi)
    backward = Traffic((2 * _n + 1) * _C, written, 2 * phi)
    project, collapse = 2 * rows * _n * _C, 2 * _n * _C
    # From 5 streams on, one program a stream projects: each loads the gradient of the layer input.
    again_backward = (_n + 1 + Piecewise((0, _NARROW), (_n - 1, True))) * _C
    return Passes(
        Cost(
            forward,
            # The collapse walks over the streams once more; a split launch leaves its sums for the next.
            forward + Traffic(_again(_n * _C), Piecewise((2 * sums, split), (_ZERO, True))),
            project + 2 * collapse + matrix_flops,
            Piecewise((2, split), (1, True)),
        ),
        Cost(
            backward,
            # Projections and streams' gradients are two walks, joined by sums, then by gradients of the products;
            # phi's gradient leaves the second as partials.
            backward + Traffic(_again(again_backward), 4 * gates, phi + 2 * _SPLITS * phi),
            3 * project + 4 * collapse + 3 * matrix_flops,
            Integer(4),
        ),
    )


def _post() -> Passes:
    forward, backward = Traffic((2 * _n + 1) * _C, _MIXING), Traffic((3 * _n + 2) * _C, 2 * _MIXING)
    flops = 2 * _MIXING * _C
    return Passes(
        Cost(forward, forward, flops, Integer(1)),
        Cost(backward, backward, 2 * flops, Integer(1)),
    )


def _post_pre() -> Passes:
    first, second = _post(), _pre(_ROWS, _MIXING, _PROJECTION)
    forward = Traffic((2 * _n + 2) * _C, 2 * _MIXING, _PHI)
    backward = Traffic((3 * _n + 3) * _C, 3 * _MIXING, 2 * _PHI)
    # From 5 streams on, one program a stream mixes: each loads all n, and the backward writes a gradient between.
    again = Piecewise((_n, _NARROW), (_n**2 + _n - 1, True)) * _C
    again_backward = Piecewise((2 * _n + 3, _NARROW), (_n**2 + 5 * _n + 1, True)) * _C
    # Each block of 16 channels leaves its share of the gradients of post and res.
    shares = Piecewise((2 * ceiling(_C / 16) * _MIXING, _NARROW), (_ZERO, True))
    scratch = second.forward.ours.coefficients - second.forward.least.coefficients
    sums = second.backward.ours.coefficients - second.backward.least.coefficients
    phi_reads = Piecewise((2, _NARROW), (1, True)) * _PHI
    return Passes(
        Cost(
            forward,
            forward + Traffic(_again(again), scratch),
            first.forward.flops + second.forward.flops,
            second.forward.launches,
        ),
        Cost(
            backward,
            backward + Traffic(_again(again_backward), sums + shares, phi_reads + 2 * _SPLITS * _PHI),
            first.forward.flops + first.backward.flops + second.backward.flops,
            Piecewise((6, _NARROW), (5, True)),
        ),
    )


def _simple(forward: Traffic, backward: Traffic, flops: Expr, flops_backward: Expr) -> Passes:
    """Return the cost of an operator that is one launch each way and moves the least."""
    return Passes(Cost(forward, forward, flops, Integer(1)), Cost(backward, backward, flops_backward, Integer(1)))


_SPREAD = Traffic((_n + 1) * _C)

OPERATORS: dict[str, Passes] = {
    "sinkhorn": _simple(Traffic(_ZERO, 2 * _n**2), Traffic(_ZERO, 3 * _n**2), _PROJECTION, 3 * _PROJECTION),
    "pre": _pre(_ROWS, _MIXING, _PROJECTION),
    "post": _post(),
    "post_pre": _post_pre(),
    "head": _pre(_n, _ZERO, _ZERO),
    "expand": _simple(_SPREAD, _SPREAD, _ZERO, _n * _C),
    "collapse": _simple(_SPREAD, _SPREAD, _n * _C, _C),
}

# The residual add, and in the backward the sum of the skip's and the branch's gradient.
PLAIN = _simple(Traffic(3 * _C), Traffic(3 * _C), _C, _C)
# The gradients of streams that two operators read, added up.
_MEET = Cost(Traffic(3 * _n * _C), Traffic(3 * _n * _C), _n * _C, Integer(1))


def _unfused() -> Passes:
    """Return hyper-connections with each step a kernel (arXiv 2512.24880, Table 2).

    The paper counts the forward: coefficients, pre, post and res applied, merge. The backward here is counted in
    the same way: the merge hands its gradient on; res applied (3n), post applied (n + 2), pre applied (2n + 1)
    and coefficients (2n) are differentiated each on its own; the streams' three gradients are added up (6n).
    """
    site = _site()
    reads, writes = Traffic((5 * _n + 1) * _C, _ROWS), Traffic((3 * _n + 1) * _C, _ROWS)
    forward = reads + writes + Traffic(_ZERO, _ZERO, _PHI)
    backward = Traffic((14 * _n + 3) * _C, 4 * _ROWS, 2 * _PHI)
    return Passes(
        Cost(forward, forward, site.forward.flops, Integer(5)),
        Cost(backward, backward, site.backward.flops, Integer(6)),
    )


def _paper() -> Passes:
    """Return the paper's fused kernels: coefficients (n), pre applied (n + 1), post with res and merge (2n + 1).

    Their coefficients go through device memory: sums, gates, logits, matrices. The backward is that of `site`.
    """
    site = _site()
    coefficients = 2 * (_ROWS + 1) + 3 * _n + 3 * _n**2 + _MIXING
    forward = Traffic((4 * _n + 2) * _C, coefficients, _PHI)
    return Passes(Cost(forward, forward, site.forward.flops, Integer(5)), site.backward)


def _site() -> Passes:
    both = OPERATORS["post"] + OPERATORS["pre"]
    return Passes(both.forward, both.backward + _MEET)


# One site within a long chain, by the key `cost` of a fusion choice.
SITE_COSTS: dict[str, Passes] = {
    "unfused": _unfused(),
    "paper": _paper(),
    "site": _site(),
    "boundary": OPERATORS["post_pre"],
}
# The same by the name of the fusion choice, in the order of its table.
PER_SITE: dict[str, Passes] = {fusion.name: SITE_COSTS[fusion.cost] for fusion in FUSIONS.values()}


@cache
def chain(fusion: str) -> Passes:
    """Return the cost of a whole chain of `SITES` sites, from the expansion to the mean.

    A chain whose sites are joined begins with a `pre` and ends with a `post`, which share streams with their
    neighbors.

    Raises:
        KeyError: no such fusion choice.
    """
    ends = OPERATORS["expand"] + OPERATORS["collapse"]
    if FUSIONS[fusion].post_pre is not None:
        return ends + SITE_COSTS["site"] + PER_SITE[fusion] * (SITES - 1)
    return ends + PER_SITE[fusion] * SITES


def evaluate(expression: Expr, **values: int) -> float:
    """Put numbers in: tokens, n_streams, width, sites, interval, element_size, iters.

    Raises:
        ValueError: a symbol of the expression has no value; the message names it.
    """
    names = {str(symbol): symbol for symbol in sympy.sympify(expression).free_symbols}
    missing = sorted(names.keys() - values.keys())
    if missing:
        raise ValueError(f"the cost depends on {', '.join(missing)}: pass a number for each")
    return float(sympy.sympify(expression).subs({names[name]: values[name] for name in names}))


def recompute_interval(sites: int, n_streams: int) -> int:
    """Return L_r: store the streams every so many sites and replay those between in the backward.

    The minimum over L_r of n·C·ceil(L / L_r) stored and (n + 2)·C·L_r alive during one replay (arXiv 2512.24880,
    section 4.3.2), near sqrt(n·L / (n + 2)). Of equals, the smallest: it replays the fewest sites.

    Raises:
        ValueError: fewer than one site or stream.
    """
    if sites < 1 or n_streams < 1:
        raise ValueError(f"{sites} sites of {n_streams} streams: at least one of each is needed")

    def held(interval: int) -> int:
        return n_streams * -(-sites // interval) + (n_streams + 2) * interval

    return min(range(1, sites + 1), key=held)


def held_elements(recomputed: bool) -> Expr:
    """Return the elements a token that a chain of `SITES` sites keeps for the backward beside its branches.

    Stored, each site keeps its streams n·C and its branch's output C. Recomputed, the streams are kept every
    `INTERVAL` sites, and while one interval is replayed its streams, layer inputs and their norms, (n + 2)·C a
    site, are alive. Not counted: the layer input C, which the branch's norm keeps in place of the plain stream.
    """
    if recomputed:
        return _n * _C * ceiling(SITES / INTERVAL) + SITES * _C + (_n + 2) * _C * INTERVAL
    return SITES * (_n + 1) * _C


def saved_bytes_per_token(
    sites: int, n_streams: int, width: int, element_size: int, interval: int | None = None
) -> int:
    """Return the bytes a token that a chain keeps for the backward beside what its branches keep.

    Args:
        sites: L.
        n_streams: n.
        width: C.
        element_size: bytes of a stream's element.
        interval: sites between stored streams; None stores all. Then see `held_elements`; the float32
            coefficients post and res, n² + n a site, are kept with the streams or replayed with them.
    """
    values = {
        "sites": sites,
        "n_streams": n_streams,
        "width": width,
        "element_size": element_size,
        "interval": interval or 1,
    }
    coefficients = FLOAT * _MIXING * (SITES if interval is None else INTERVAL)
    return int(evaluate(ELEMENT * held_elements(interval is not None) + coefficients, **values))
