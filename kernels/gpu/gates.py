"""The gradient of what collapses the streams: their products with the layer input's gradient, split over C.

The first walk of a backward, (n + 1)C elements a token, (n + 2)C where the streams are made again by a `post`.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configurations import Geometry, ceil_div, chunk_width, gates_config
from .launch import empty, launch, product_options
from .primitives import total
from .stream_tiles import load_streams, mix_stream


@triton.jit(do_not_specialize=["tokens"])
def gates_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    grad_input: tl.tensor,
    parts: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    chunk: tl.tensor,
    n: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write parts [splits, n, tokens]: products of the streams as stored with the gradient."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    base = token.to(tl.int64) * width
    sums = ()
    for _ in tl.static_range(n):
        sums = sums + (tl.full([BLOCK_TOKENS, BLOCK_WIDTH // VECTOR], 0.0, tl.float32),)
    begin = tl.program_id(1) * chunk
    for start in range(begin, tl.minimum(begin + chunk, width), BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        mask = live[:, None] & (column < width)[None, :]
        tiles = load_streams(streams, base, column, mask, n, width)
        grad = tl.load(grad_input + base[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if MIX:
            written = tl.load(branch + base[:, None] + column[None, :], mask=mask, other=0.0)
        grown = ()
        for o in tl.static_range(n):
            stream = mix_stream(tiles, written, post, res, token, live, o, n, PRECISION) if MIX else tiles[o]
            share = tl.reshape(stream.to(tl.float32) * grad, [BLOCK_TOKENS, BLOCK_WIDTH // VECTOR, VECTOR])
            grown = grown + (sums[o] + total(share, 2),)
        sums = grown
    place = parts + tl.program_id(1).to(tl.int64) * n * tokens + token
    for o in tl.static_range(n):
        tl.store(place + o * tokens.to(tl.int64), total(sums[o], 1), mask=live)


def gates(
    streams: Tensor,
    grad_input: Tensor,
    geometry: Geometry,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Return [splits, n, tokens] parts of the gradient of the streams' weights.

    Args:
        streams: contiguous [tokens, n, C].
        grad_input: contiguous [tokens, C] gradient of the collapsed streams.
        geometry: of the call.
        mixing: (branch, post, res) of a `post` that makes the streams first.
    """
    config = gates_config(geometry)
    chunk = chunk_width(geometry.width, config.splits, config.block_width)
    splits = ceil_div(geometry.width, chunk)
    parts = empty(streams, splits, geometry.n, geometry.tokens)
    launch(
        gates_kernel, (ceil_div(geometry.tokens, config.block_tokens), splits),
        streams, *(mixing or (streams, parts, parts)), grad_input, parts, geometry.tokens, geometry.width, chunk,
        n=geometry.n, MIX=mixing is not None,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, VECTOR=config.vector,
        num_warps=config.warps, num_stages=1, **product_options(),
    )  # fmt: skip
    return parts
