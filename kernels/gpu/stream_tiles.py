"""Device functions that load streams, phi and mixing coefficients, mix streams and collapse them.

Every function handles a tile of tokens; `token` [tokens] are indices, `live` [tokens] tells which exist. A
range of channels begin … end is a whole number of steps, or ends at C: masks compare with C alone, whose
divisibility is known, so that loads stay wide.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .coefficients import one_weight
from .primitives import rounded


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
def first_from_last(values: tl.tensor, n: tl.constexpr) -> tuple:
    """Move the last of a tuple of n to its beginning."""
    ordered = (values[n - 1],)
    for i in tl.static_range(n - 1):
        ordered = ordered + (values[i],)
    return ordered


@triton.jit
def load_factors(
    phi: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    mask: tl.tensor,
    stream: tl.tensor,
    n: tl.constexpr,
    width: tl.tensor,
) -> tl.tensor:
    """Load the columns of phi that belong to a block of C of one stream: [Q·N, block], float32."""
    place = phi + row[:, None] * (n * width) + stream * width + column[None, :]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_other_factors(
    phi: tl.tensor,
    row: tl.tensor,
    used: tl.tensor,
    column: tl.tensor,
    stream: tl.tensor,
    n: tl.constexpr,
    width: tl.tensor,
) -> tl.tensor:
    """Add up `load_factors` of the streams after stream 0, if `stream` is 0; nothing otherwise."""
    mask = used[:, None] & (column < width)[None, :]
    factors = tl.full([row.shape[0], column.shape[0]], 0.0, tl.float32)
    for i in range(1, tl.where(stream == 0, n, 1)):
        factors += load_factors(phi, row, column, mask, i, n, width)
    return factors


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


@triton.jit
def collapse(
    streams: tl.tensor,
    weights: tl.tensor,
    layer_input: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    width: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Write Σ_i pre_i X_i over channels begin … end (Eq. 5).

    Walks backwards: the channels that the projection touched last are still in the cache.
    """
    pre = ()
    for i in tl.static_range(n):
        pre = pre + (one_weight(weights, 0, i, N, Q),)
    base = token.to(tl.int64) * width
    blocks = (end - begin + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    for block in range(blocks):
        column = begin + (blocks - 1 - block) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        mask = live[:, None] & (column < width)[None, :]
        tiles = load_streams(streams, base, column, mask, n, width)
        collapsed = pre[0][:, None] * tiles[0].to(tl.float32)
        for i in tl.static_range(1, n):
            collapsed += pre[i][:, None] * tiles[i].to(tl.float32)
        collapsed = rounded(collapsed, layer_input.dtype.element_ty)
        tl.store(layer_input + base[:, None] + column[None, :], collapsed, mask=mask)
