"""`collapse`: the layer input from coefficients that `measure` computed, also for `post_collapse`.

One pass over the streams: (n + 1)C elements a token, (2n + 2)C behind a `post`, which a replay in the backward costs.
Of the projection only the gates of pre are read.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..epsilons import Eps, epsilons
from ..manifolds import MANIFOLDS
from ..orientation import ROWS_FIRST, PhiLayout
from .collapse_weights import collapse_weights, copy_coefficients, weight_of
from .configurations import Geometry, ceil_div, collapse_config
from .launch import empty, geometry_of, launch, product_options, register_limit
from .primitives import rounded
from .stream_tiles import all_live, load_streams, mix_stream


@triton.jit(do_not_specialize=["tokens"])
def collapse_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    projection: tl.tensor,
    measured_post: tl.tensor,
    measured_res: tl.tensor,
    fresh_streams: tl.tensor,
    layer_input: tl.tensor,
    post_copy: tl.tensor,
    res_copy: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    norm_eps: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    GATED: tl.constexpr,
    MIX: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write Σ_i pre_i X_i (Eq. 5) of a tile; with MIX the streams are made by a `post` first, and written.

    With COPY the first program of a tile's tokens copies the coefficients that were measured.
    """
    blocks = (width + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    token = (tl.program_id(0) // blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = (tl.program_id(0) % blocks) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = token < tokens
    token = token.to(tl.int64)
    mask = live[:, None] & (column < width)[None, :]
    base = token * width
    tiles = load_streams(streams, base, column, mask, n, width)
    if MIX:
        written = tl.load(branch + base[:, None] + column[None, :], mask=mask, other=0.0)
        read, there = all_live(token, live, n)
    weights = collapse_weights(
        projection, scale, bias, token, live, width, norm_eps, eps, n, N, ROWS, ANCHORED, GATED
    )  # fmt: skip
    collapsed = tl.full([BLOCK_TOKENS, BLOCK_WIDTH], 0.0, tl.float32)
    for i in tl.static_range(n):
        if MIX:
            stream = mix_stream(tiles, written, post, res, read, there, i, n, PRECISION)
            tl.store(fresh_streams + base[:, None] * n + i * width + column[None, :], stream, mask=mask)
        else:
            stream = tiles[i]
        collapsed += weight_of(weights, i, N)[:, None] * stream.to(tl.float32)
    place = layer_input + base[:, None] + column[None, :]
    tl.store(place, rounded(collapsed, layer_input.dtype.element_ty), mask=mask)
    if COPY:
        wanted = token < tl.where(tl.program_id(0) % blocks == 0, tokens, 0)
        copy_coefficients(measured_post, measured_res, post_copy, res_copy, token, wanted, n, N)


def collapse_by(
    streams: Tensor,
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    norm_eps: float,
    eps: Eps,
    gated: bool,
    geometry: Geometry,
    *,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
    fresh_streams: Tensor | None = None,
    measured: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Return the layer input [*, C] of contiguous streams [*, n, C], given their projection [*, rows + 1].

    Args:
        streams: [*, n, C].
        scale: the first is that of pre.
        bias: the first n are those of pre.
        projection: [*, rows + 1].
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        gated: as in `Manifold`.
        geometry: of the call.
        mixing: branch [*, C], post [*, n] and res [*, n, n] of a `post` that comes first.
        fresh_streams: [*, n, C], where to write the streams after it.
        measured: post and res, to be returned as copies behind the layer input.
    """
    layer_input = empty(streams, *streams.shape[:-2], geometry.width, dtype=streams.dtype)
    copies = tuple(torch.empty_like(tensor) for tensor in measured or ())
    config = collapse_config(geometry)
    blocks = ceil_div(geometry.tokens, config.block_tokens) * ceil_div(geometry.width, config.block_width)
    if geometry.tokens:
        nothing = (projection, projection)
        launch(
            collapse_kernel, (blocks,), streams, *(mixing or (streams, *nothing)), scale, bias, projection,
            *(measured or nothing), streams if fresh_streams is None else fresh_streams, layer_input,
            *(copies or nothing), geometry.tokens, geometry.width, norm_eps, epsilons(eps).pre,
            GATED=gated, MIX=mixing is not None, COPY=measured is not None,
            BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, num_warps=config.warps,
            **register_limit(255 if mixing else 64), **geometry.coefficients(), **product_options(),
        )  # fmt: skip
    return (layer_input, *copies)


def collapse(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    post: Tensor,
    res: Tensor,
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """Return `pre`'s layer input, and copies of post and res; see `reference.collapse`, which has the arguments."""
    return collapse_by(
        streams.contiguous(), scale.contiguous(), bias.contiguous(), projection.contiguous(), norm_eps, eps,
        MANIFOLDS[manifold].gated, geometry_of(streams, phi, anchored, layout),
        measured=(post.contiguous(), res.contiguous()),
    )  # fmt: skip
