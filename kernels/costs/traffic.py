"""What every operator and fusion choice costs: bytes, flops, launches, and what is saved for the backward.

Expressions of sympy in the symbols below; `evaluate` puts numbers in. Each pass over an operator has two
amounts of traffic with the device's memory:

- `least`: each input read once and each output written once. No kernel moves less, so it is what benchmarks
  divide by.
- `ours`: what the kernels of `gpu` move, each launch by itself: what a launch loads or stores several times counts
  once, what one launch leaves for the next counts twice. `python -m benchmarks.traffic` counts the same from the
  kernels themselves. Of few tokens a cache keeps much of it; their launches cost more than their bytes.

The unit of a stream's traffic is the element, of coefficients and phi the float32. How many rows phi has and what
making a matrix takes are symbols, which `evaluate` reads from the table of manifolds. The backward of a fusion choice
includes adding up the gradients of streams that two operators read.
"""

from __future__ import annotations

from functools import cache

import sympy
from sympy import Expr, Integer, ceiling

from ..fusions import FUSIONS, HALVES, NORMED
from ..manifolds import MANIFOLDS
from .amounts import (
    ELEMENT,
    FLOAT,
    INTERVAL,
    ITERATED,
    ITERS,
    MATRIX_FLOPS,
    ROWS,
    SITES,
    STREAMS,
    WIDTH,
    ZERO,
    Cost,
    Passes,
    Traffic,
)
from .site_launches import MIXING, SiteLaunches

_n, _C = STREAMS, WIDTH
_PHI = ROWS * _n * _C
# pre, post and res.
_COEFFICIENTS = MIXING + _n
_SINKHORN = MANIFOLDS["sinkhorn"].flops(_n, ITERS)
# Squares and their sum, 1/RMS, the weight.
_NORM_FLOPS = 4 * _C


def _pre(rows: Expr, matrix_flops: Expr, normed: bool = False) -> Passes:
    """Return the cost of `pre` with that many rows of phi, or of `head`; `normed` with the norm of its layer input."""
    site = SiteLaunches(rows, normed=normed)
    forward = site.norm + Traffic((_n + 1) * _C, site.written + site.kept, site.phi)
    backward = site.norm * 2 + Traffic((2 * _n + 1) * _C, site.differentiated + site.kept, 2 * site.phi)
    project, collapse = 2 * rows * _n * _C, 2 * _n * _C
    return Passes(
        Cost(
            forward,
            site.measure(stored=False) + site.collapse(copied=False),
            project + 2 * collapse + matrix_flops + (_NORM_FLOPS if normed else 0),
            site.measure_launches + 1,
        ),
        Cost(
            backward,
            site.backward(),
            2 * project + 4 * collapse + 3 * matrix_flops + (3 * _NORM_FLOPS if normed else 0),
            3 + site.stream_launches,
        ),
    )


def _post() -> Passes:
    forward, backward = Traffic((2 * _n + 1) * _C, MIXING), Traffic((3 * _n + 2) * _C, 2 * MIXING)
    flops = 2 * MIXING * _C
    return Passes(
        Cost(forward, forward, flops, Integer(1)),
        Cost(backward, backward, 2 * flops, Integer(1)),
    )


def _post_pre(normed: bool = False) -> Passes:
    site, after = SiteLaunches(ROWS, True, normed), SiteLaunches(ROWS, normed=normed)
    first, second = _post(), _pre(ROWS, MATRIX_FLOPS, normed)
    forward = site.norm + Traffic((2 * _n + 2) * _C, 2 * MIXING + site.kept, _PHI)
    backward = site.norm * 2 + Traffic((3 * _n + 3) * _C, 2 * MIXING + site.differentiated + site.kept, 2 * _PHI)
    return Passes(
        Cost(
            forward,
            site.measure(stored=True) + after.collapse(copied=False),
            first.forward.flops + second.forward.flops,
            site.measure_launches + 1,
        ),
        Cost(
            backward,
            site.backward() + first.backward.ours,
            2 * first.forward.flops + first.backward.flops + second.backward.flops,
            3 + site.stream_launches,
        ),
    )


def _halves(mixes: bool) -> dict[str, Passes]:
    """Return the costs of the halves of `pre`, or of `post_pre`, and of those with a norm; backward as the whole."""
    site, prefix = SiteLaunches(ROWS, mixes), "post_" if mixes else ""
    post = _post().forward.flops if mixes else ZERO
    read = site.mixing + Traffic(_n * _C)
    collapsed = site.mixing + Traffic((2 * _n + 1) * _C if mixes else (_n + 1) * _C, _n + 1 + 2 * MIXING)
    nothing = Cost(Traffic(ZERO), Traffic(ZERO), ZERO, ZERO)
    projecting = 2 * ROWS * _n * _C + 2 * _n * _C + MATRIX_FLOPS
    return {
        f"{prefix}measure": Passes(
            Cost(
                read + Traffic(ZERO, MIXING + site.kept, _PHI),
                site.measure(stored=False),
                post + projecting,
                site.measure_launches,
            ),
            nothing,
        ),
        **{
            f"{prefix}collapse{suffix}": Passes(
                Cost(
                    collapsed + one.norm,
                    one.collapse(copied=True),
                    post + 2 * _n * _C + (_NORM_FLOPS if one.normed else 0),
                    Integer(1),
                ),
                (_post_pre(one.normed) if mixes else _pre(ROWS, MATRIX_FLOPS, one.normed)).backward,
            )
            for suffix, one in (("", site), ("_norm", SiteLaunches(ROWS, mixes, normed=True)))
        },
    }


def _simple(forward: Traffic, backward: Traffic, flops: Expr, flops_backward: Expr) -> Passes:
    """Return the cost of an operator that is one launch each way and moves the least."""
    return Passes(Cost(forward, forward, flops, Integer(1)), Cost(backward, backward, flops_backward, Integer(1)))


_SPREAD = Traffic((_n + 1) * _C)

OPERATORS: dict[str, Passes] = {
    "sinkhorn": _simple(Traffic(ZERO, 2 * _n**2), Traffic(ZERO, 3 * _n**2), _SINKHORN, 3 * _SINKHORN),
    "pre": _pre(ROWS, MATRIX_FLOPS),
    "post": _post(),
    "post_pre": _post_pre(),
    "pre_norm": _pre(ROWS, MATRIX_FLOPS, normed=True),
    "post_pre_norm": _post_pre(normed=True),
    "head": _pre(_n, ZERO),
    **_halves(mixes=False),
    **_halves(mixes=True),
    "expand": _simple(_SPREAD, _SPREAD, ZERO, _n * _C),
    "mean": _simple(_SPREAD, _SPREAD, _n * _C, _C),
}

# A norm that is a kernel of its own; its backward reads what it read and a gradient.
NORM = _simple(Traffic(2 * _C), Traffic(3 * _C), _NORM_FLOPS, 3 * _NORM_FLOPS)
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
    reads, writes = Traffic((5 * _n + 1) * _C, _COEFFICIENTS), Traffic((3 * _n + 1) * _C, _COEFFICIENTS)
    forward = reads + writes + Traffic(ZERO, ZERO, _PHI)
    backward = Traffic((14 * _n + 3) * _C, 4 * _COEFFICIENTS, 2 * _PHI)
    return Passes(
        Cost(forward, forward, site.forward.flops, Integer(5)),
        Cost(backward, backward, site.backward.flops, Integer(6)),
    )


def _paper() -> Passes:
    """Return the paper's fused kernels: coefficients (n), pre applied (n + 1), post with res and merge (2n + 1).

    Their coefficients go through device memory: sums, gates, logits, matrices. The backward is that of `site`.
    """
    one, site = SiteLaunches(ROWS), _site()
    # The affine kernel leaves Sinkhorn's logits, which its own reads and writes over; other matrices are made by it.
    matrix = Traffic(ZERO, 2 * ITERATED * _n**2)
    ours = one.measure(stored=False) + matrix + one.collapse(copied=False) + _post().forward.ours
    least = Traffic((4 * _n + 2) * _C, 2 * MIXING + one.kept + 4 * ITERATED * _n**2, _PHI)
    return Passes(Cost(least, ours, site.forward.flops, one.measure_launches + 2 + ITERATED), site.backward)


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


def _replayed(whole: str, *again: str) -> Cost:
    """Return what operators that run again cost, and that the forward of `whole` ran in halves."""
    measure, collapse = HALVES[whole]
    halves = OPERATORS[measure].forward + OPERATORS[collapse].forward + OPERATORS[whole].forward * -1
    replay = Cost(Traffic(ZERO), Traffic(ZERO), ZERO, ZERO)
    for name in again:
        replay += OPERATORS[name].forward
    return Cost(replay.least, replay.ours + halves.ours, replay.flops + halves.flops, replay.launches + halves.launches)


# What it costs a step more that a site is replayed, by the key `cost` of a fusion choice.
REPLAYED: dict[str, Cost] = {
    "unfused": SITE_COSTS["unfused"].forward,
    "paper": SITE_COSTS["paper"].forward,
    "site": _replayed("pre", "post", "collapse"),
    "boundary": _replayed("post_pre", "post_collapse"),
}


def _folding(operator: str) -> Passes:
    """Return what it costs more that an operator does the norm behind it, too; what the norm moved is saved."""
    return OPERATORS[NORMED[operator]] + (OPERATORS[operator] + NORM) * -1


@cache
def site(fusion: str, normed: bool = False) -> Passes:
    """Return the cost of one site within a long chain; `normed` less its norm, where the fusion choice folds that in.

    Raises:
        KeyError: no such fusion choice.
    """
    joined = FUSIONS[fusion].post_pre
    return PER_SITE[fusion] + _folding(joined) if normed and joined is not None else PER_SITE[fusion]


@cache
def chain(fusion: str, normed: int = 0) -> Passes:
    """Return the cost of a whole chain of `SITES` sites, from the expansion to the mean.

    A chain whose sites are joined begins with a `pre` and ends with a `post`, which share streams with their
    neighbors. The norms of `normed` of its sites, the first among them, are then folded in: what they moved is saved.

    Raises:
        KeyError: no such fusion choice.
    """
    ends, choice = OPERATORS["expand"] + OPERATORS["mean"], FUSIONS[fusion]
    if choice.post_pre is None:
        return ends + PER_SITE[fusion] * SITES
    plain = ends + SITE_COSTS["site"] + PER_SITE[fusion] * (SITES - 1)
    return plain + _folding(choice.pre) + _folding(choice.post_pre) * (normed - 1) if normed else plain


def evaluate(expression: Expr, manifold: str = "sinkhorn", **values: int) -> float:
    """Put numbers in: tokens, n_streams, width, sites, interval, element_size, iters; anchored is 1 if left out.

    Raises:
        ValueError: a symbol of the expression has no value; the message names it.
    """
    names = {str(symbol): symbol for symbol in sympy.sympify(expression).free_symbols}
    values = {"anchored": 1, **_counts_of(manifold, **values), **values}
    missing = sorted({_COUNTED_FROM.get(name, name) for name in names.keys() - values.keys()})
    if missing:
        raise ValueError(f"the cost depends on {', '.join(missing)}: pass a number for each")
    return float(sympy.sympify(expression).subs({names[name]: values[name] for name in names}))


# Which number the symbols of a manifold lack where they have no value.
_COUNTED_FROM = {"rows": "n_streams", "matrix_flops": "iters"}


def _counts_of(manifold: str, n_streams: int | None = None, iters: int | None = None, **_: int) -> dict[str, int]:
    """Return the symbols that a manifold gives a value to, as far as these numbers say."""
    family = MANIFOLDS[manifold]
    counts = {"mixes": int(family.mixes), "iterated": int(family.kernel_matrix == "sinkhorn")}
    if n_streams is not None:
        counts["rows"] = family.rows(n_streams)
        if iters is not None:
            counts["matrix_flops"] = family.flops(n_streams, iters)
    return counts


def recompute_interval(sites: int, n_streams: int) -> int:
    """Return L_r: store the streams every so many sites and replay those between in the backward.

    The minimum over L_r of n·C·ceil(L / L_r) stored and (n + 2)·C·L_r alive during one replay (arXiv 2512.24880,
    section 4.3.2), near sqrt(n·L / (n + 2)), whatever the manifold: coefficients are stored always. Of equals, the
    smallest: it replays the fewest sites.

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
    sites: int,
    n_streams: int,
    width: int,
    element_size: int,
    interval: int | None = None,
    manifold: str = "sinkhorn",
) -> int:
    """Return the bytes a token that a chain keeps for the backward beside what its branches keep.

    Args:
        sites: L.
        n_streams: n.
        width: C.
        element_size: bytes of a stream's element.
        interval: sites between stored streams; None stores all. Then see `held_elements`. The float32 coefficients
            post and res, n² + n a site, and the projection, a float more than phi has rows, are kept either way.
        manifold: a name of `MANIFOLDS`.
    """
    values = {
        "sites": sites,
        "n_streams": n_streams,
        "width": width,
        "element_size": element_size,
        "interval": interval or 1,
    }
    coefficients = FLOAT * (MIXING + ROWS + 1) * SITES
    return int(evaluate(ELEMENT * held_elements(interval is not None) + coefficients, manifold, **values))
