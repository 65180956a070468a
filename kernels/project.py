"""Device functions that walk over C: mixing streams in registers, the projection by phi, the collapse.

Every function handles a tile of tokens; `token` [tokens] are indices, `live` [tokens] tells which exist. A
range of channels begin … end is a whole number of steps, or ends at C: masks compare with C alone, whose
divisibility is known, so that loads stay wide.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .coefficients import one_weight, slot_rows
from .device import narrow, product_exact_left, settle, total


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
def project(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    fresh_streams: tl.tensor,
    grad_input: tl.tensor,
    phi: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    width: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    stream: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ONE: tl.constexpr,
    MIX: tl.constexpr,
    STORE: tl.constexpr,
    GRADS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple:
    """Accumulate over channels begin … end what a site's coefficients, or their gradients, need.

    With MIX the streams are those after a `post`, made in registers and rounded to the streams' dtype as they
    are stored (otherwise forward and backward would see different streams); with STORE they are written out.
    With ONE, only the share of `stream` is accumulated.

    With ANCHORED the streams are stream 0 and differences from it. Squares are of the streams they stand for, in
    float32. Products are with the tiles as stored, Σ_k phi_k X_k = (Σ_k phi_k) Y_0 + Σ_{k≥1} phi_k Y_k: the streams
    themselves would not be exact in bfloat16. Gates are of the tiles as stored, too.

    Returns:
        products [tokens, Q·N] of the streams with phi, their sums of squares [tokens], and with GRADS a tuple
        of the products [tokens] of each stream with the gradient of the collapsed streams.
    """
    row, used = slot_rows(n, N, Q, GROUPS)
    base = token.to(tl.int64) * width
    products = tl.full([token.shape[0], Q * N], 0.0, tl.float32)
    squares = tl.full([token.shape[0]], 0.0, tl.float32)
    gates = ()
    for _ in tl.static_range((1 if ONE else n) if GRADS else 0):
        gates = gates + (squares,)
    if MIX:
        weights = load_row(post, res, token, live, stream, n) if ONE else load_mixing(post, res, token, live, n)
        if ANCHORED:
            anchor_weights = load_row(post, res, token, live, 0, n) if ONE else weights
    # Of anchored streams the first comes last: its factor is the sum of all.
    first: tl.constexpr = 1 if ANCHORED and not ONE else 0
    for start in range(begin, end, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        mask = live[:, None] & (column < width)[None, :]
        if MIX:
            tiles = load_streams(streams, base, column, mask, n, width)
            written = tl.load(branch + base[:, None] + column[None, :], mask=mask, other=0.0)
        if GRADS:
            grad = tl.load(grad_input + base[:, None] + column[None, :], mask=mask, other=0.0)
        if ANCHORED:
            if MIX:
                anchor = narrow(mix(tiles, written, anchor_weights, 0, n), streams.dtype.element_ty)
                anchor = settle(anchor, PRECISION)
            else:
                anchor = tl.load(streams + base[:, None] * n + column[None, :], mask=mask, other=0.0)
            summed = tl.full([Q * N, BLOCK_WIDTH], 0.0, tl.float32)
        sums = ()
        for step in tl.static_range(1 if ONE else n):
            o = stream if ONE else (first + step) % n
            offsets = base[:, None] * n + o * width + column[None, :]
            if first + step == n:
                fresh = anchor
            elif MIX:
                fresh = settle(
                    narrow(mix(tiles, written, weights, (first + step) * (n + 1), n), streams.dtype.element_ty),
                    PRECISION,
                )
            else:
                fresh = tl.load(streams + offsets, mask=mask, other=0.0)
            if MIX and STORE:
                tl.store(fresh_streams + offsets, fresh, mask=mask)
            inside = used[:, None] & (column < width)[None, :]
            factors = load_factors(phi, row, column, inside, o, n, width)
            if ANCHORED and ONE:
                factors += load_other_factors(phi, row, used, column, stream, n, width)
            elif ANCHORED:
                factors = settle(factors, PRECISION)
                summed += factors
                factors = summed if first + step == n else factors
            products = product_exact_left(fresh, tl.trans(factors), products, PRECISION)
            wide = fresh.to(tl.float32)
            released = wide
            if ANCHORED and ONE:
                released += tl.where(stream > 0, anchor.to(tl.float32), 0.0)
            elif ANCHORED and first + step < n:
                released += anchor.to(tl.float32)
            squares += total(released * released, 1)
            if GRADS:
                sums = sums + (gates[step] + total(wide * grad.to(tl.float32), 1),)
        gates = sums
    if GRADS and first == 1:
        gates = first_from_last(gates, n)
    return products, squares, gates


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
        collapsed = narrow(collapsed, layer_input.dtype.element_ty)
        tl.store(layer_input + base[:, None] + column[None, :], collapsed, mask=mask)
