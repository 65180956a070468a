"""The projection of streams by phi: partial products and sums of squares, split over C.

A program walks over a chunk of C for a tile of tokens and leaves rows + 1 floats a token. C is split until about a
thousand programs run, whatever the number of tokens; `coefficients` adds the parts up.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configurations import Geometry, ceil_div, chunk_width, projection_config
from .launch import empty, launch, product_options, register_limit
from .phi import load_phi, prepare_phi
from .primitives import stream_product, total
from .stream_tiles import load_streams, mix_stream


@triton.jit(do_not_specialize=["tokens"])
def projection_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    fresh_streams: tl.tensor,
    phi: tl.tensor,
    sums: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    chunk: tl.tensor,
    n: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    PREPARED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MIX: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write sums [splits, ROWS + 1, tokens]: products with phi, then the sum of squares.

    With MIX the streams are those after a `post`, made in registers and rounded as they are stored (otherwise forward
    and backward would see different streams); with STORE they are written out.

    With ANCHORED the streams are stream 0 and differences from it. Squares are of the streams they stand for, in
    float32. Products are with the tiles as stored: the streams themselves would not be exact in bfloat16.

    A step's products start from zero and are added in float32: tensor cores truncate the sums that they chain.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    base = token.to(tl.int64) * width
    slot = tl.arange(0, SLOTS)
    products = tl.full([BLOCK_TOKENS, SLOTS], 0.0, tl.float32)
    squares = tl.full([BLOCK_TOKENS], 0.0, tl.float32)
    begin = tl.program_id(1) * chunk
    for start in range(begin, tl.minimum(begin + chunk, width), BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        mask = live[:, None] & (column < width)[None, :]
        tiles = load_streams(streams, base, column, mask, n, width)
        if MIX:
            written = tl.load(branch + base[:, None] + column[None, :], mask=mask, other=0.0)
        step = tl.full([BLOCK_TOKENS, SLOTS], 0.0, tl.float32)
        wide_square = tl.full([BLOCK_TOKENS, BLOCK_WIDTH], 0.0, tl.float32)
        for o in tl.static_range(n):
            if MIX:
                stream = mix_stream(tiles, written, post, res, token, live, o, n, PRECISION)
                if STORE:
                    place = fresh_streams + base[:, None] * n + o * width + column[None, :]
                    tl.store(place, stream, mask=mask)
            else:
                stream = tiles[o]
            factors = load_phi(
                phi, slot[None, :], column[:, None], o, width, n, ROWS, ANCHORED, PREPARED, PIECES, COLUMNS, TRANSPOSED
            )
            step = stream_product(stream, factors, step, PRECISION)
            released = stream.to(tl.float32)
            if ANCHORED:
                if o == 0:
                    anchor = released
                else:
                    released += anchor
            wide_square += released * released
        products += step
        squares += total(wide_square, 1)
    part = sums + tl.program_id(1).to(tl.int64) * (ROWS + 1) * tokens
    place = part + slot[None, :].to(tl.int64) * tokens + token[:, None]
    tl.store(place, products, mask=live[:, None] & (slot < ROWS)[None, :])
    tl.store(part + tokens.to(tl.int64) * ROWS + token, squares, mask=live)


def project(
    streams: Tensor,
    phi: Tensor,
    geometry: Geometry,
    *,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
    fresh_streams: Tensor | None = None,
) -> Tensor:
    """Launch the partial projections of contiguous [tokens, n, C] streams.

    Args:
        streams: [tokens, n, C].
        phi: [rows, n·C], as the geometry's layout says.
        geometry: of the call.
        mixing: (branch [tokens, C], post [tokens, n], res [tokens, n, n]) of a `post` that comes first; the
            projection is then of the streams after it.
        fresh_streams: [tokens, n, C], where to write the streams after that `post`, or None to keep them in registers.

    Returns:
        [splits, rows + 1, tokens] float32.
    """
    config = projection_config(geometry, mixing is not None)
    chunk = chunk_width(geometry.width, config.splits, config.block_width)
    splits = ceil_div(geometry.width, chunk)
    sums = empty(streams, splits, geometry.rows + 1, geometry.tokens)
    branch, post, res = mixing or (streams, sums, sums)
    launch(
        projection_kernel, (ceil_div(geometry.tokens, config.block_tokens), splits),
        streams, branch, post, res, streams if fresh_streams is None else fresh_streams,
        prepare_phi(phi, geometry) if config.prepared else phi, sums, geometry.tokens, geometry.width, chunk,
        SLOTS=geometry.slots, PIECES=geometry.pieces, PREPARED=config.prepared,
        MIX=mixing is not None, STORE=fresh_streams is not None,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width,
        num_warps=config.warps, num_stages=config.stages,
        **register_limit(255), **geometry.constants(), **geometry.phi(), **product_options(),
    )  # fmt: skip
    return sums
