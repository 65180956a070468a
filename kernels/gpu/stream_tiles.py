"""Device functions that load streams and mixing coefficients, mix streams and differentiate that.

Every function handles a tile of tokens; `token` [tokens] are indices, `live` [tokens] tells which exist. A range of
channels is a whole number of steps, or ends at C: masks compare with C alone, whose divisibility is known, so that
loads stay wide.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import materialize, rounded


@triton.jit
def load_streams(
    streams: tl.tensor, base: tl.tensor, column: tl.tensor, mask: tl.tensor, n: tl.constexpr, width: tl.tensor
) -> tuple:
    """Load all streams of a tile: a tuple of n tiles [tokens, block] in the streams' dtype.

    They are widened where they are used: held as they came, they take half the registers.
    """
    tiles = ()
    for i in tl.static_range(n):
        place = streams + base[:, None] * n + i * width + column[None, :]
        tiles = tiles + (tl.load(place, mask=mask, other=0.0),)
    return tiles


@triton.jit
def load_row(
    post: tl.tensor, res: tl.tensor, token: tl.tensor, live: tl.tensor, stream: tl.tensor, n: tl.constexpr
) -> tuple:
    """Load what makes one stream after a site: res[stream, 0 … n-1], then post[stream], each [tokens]."""
    weights = ()
    token = token.to(tl.int64)
    for i in tl.static_range(n):
        entry = tl.load(res + token * (n * n) + stream * n + i, mask=live, other=0.0)
        weights = weights + (entry.to(tl.float32),)
    entry = tl.load(post + token * n + stream, mask=live, other=0.0)
    return weights + (entry.to(tl.float32),)


@triton.jit
def all_live(token: tl.tensor, live: tl.tensor, n: tl.constexpr) -> tuple:
    """Return tokens to load coefficients of and whether they exist: of many streams all do, token 0 for those that not.

    A mask takes gfx942 a scalar register a load, and for n² + n of them it has too few.
    """
    if n > 4:
        return tl.where(live, token, 0), tl.full(live.shape, 1, tl.int1)
    else:
        return token, live


@triton.jit
def load_mixing(post: tl.tensor, res: tl.tensor, token: tl.tensor, live: tl.tensor, n: tl.constexpr) -> tuple:
    """Load `load_row` of every stream, one after the other: n² + n vectors [tokens]."""
    weights = ()
    for o in tl.static_range(n):
        weights = weights + load_row(post, res, token, live, o, n)
    return weights


@triton.jit
def mix(tiles: tl.tensor, branch: tl.tensor, weights: tl.tensor, first: tl.constexpr, n: tl.constexpr) -> tl.tensor:
    """Make a stream after the site (Eq. 3), in float32, by the row of coefficients that starts at `first`."""
    mixed = weights[first + n][:, None] * branch.to(tl.float32)
    for i in tl.static_range(n):
        mixed += weights[first + i][:, None] * tiles[i].to(tl.float32)
    return mixed


@triton.jit
def mix_stream(
    tiles: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    stream: tl.constexpr,
    n: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Make one stream after the site, rounded as it is stored.

    Its row of coefficients is loaded here, from the first cache: held over a walk, n² + n of them a token would crowd
    the registers.
    """
    weights = load_row(post, res, token, live, stream, n)
    return materialize(rounded(mix(tiles, branch, weights, 0, n), tiles[0].dtype), PRECISION)


@triton.jit
def store_mix_backward(
    grads: tl.tensor,
    weights: tl.tensor,
    grad_streams: tl.tensor,
    grad_branch: tl.tensor,
    base: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    n: tl.constexpr,
    width: tl.tensor,
) -> None:
    """Differentiate `mix`: from gradients of the n streams after a site, write those of the streams and the branch."""
    back = weights[n][:, None] * grads[0]
    for o in tl.static_range(1, n):
        back += weights[o * (n + 1) + n][:, None] * grads[o]
    offsets = base[:, None] + column[None, :]
    tl.store(grad_branch + offsets, rounded(back, grad_branch.dtype.element_ty), mask=mask)
    for i in tl.static_range(n):
        back = weights[i][:, None] * grads[0]
        for o in tl.static_range(1, n):
            back += weights[o * (n + 1) + i][:, None] * grads[o]
        place = grad_streams + base[:, None] * n + i * width + column[None, :]
        tl.store(place, rounded(back, grad_streams.dtype.element_ty), mask=mask)
