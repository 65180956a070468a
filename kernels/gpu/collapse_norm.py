"""`collapse_norm`: the normed layer input from coefficients that `measure` computed; see `normed`.

As `collapse`, one pass over the streams, (n + 1)C elements a token, but a program owns whole rows of C: the statistics
need all of a row. A row is held in registers, so the layer input goes nowhere; wider ones are collapsed twice, the
second time from a cache. A token is enough work for a program, so that even one token a call, or a few, are as fast.
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
from .configurations import Geometry, ceil_div, collapse_norm_config
from .launch import empty, geometry_of, launch, warps_for
from .primitives import rounded, total
from .stream_tiles import load_row, load_streams, mix


@triton.jit
def _collapsed(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    fresh_streams: tl.tensor,
    weights: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    base: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    MIX: tl.constexpr,
    STORE: tl.constexpr,
) -> tl.tensor:
    """Collapse a tile, zero beyond C; with MIX the streams are made by a `post` first, and with STORE written."""
    mask = live[:, None] & (column < width)[None, :]
    tiles = load_streams(streams, base, column, mask, n, width)
    if MIX:
        written = tl.load(branch + base[:, None] + column[None, :], mask=mask, other=0.0)
    collapsed = tl.full(mask.shape, 0.0, tl.float32)
    for i in tl.static_range(n):
        if MIX:
            # Not `mix_stream`: nothing here takes it in another layout, and it need not stay in registers.
            stream = rounded(mix(tiles, written, load_row(post, res, token, live, i, n), 0, n), tiles[0].dtype)
            if STORE:
                tl.store(fresh_streams + base[:, None] * n + i * width + column[None, :], stream, mask=mask)
        else:
            stream = tiles[i]
        collapsed += weight_of(weights, i, N)[:, None] * stream.to(tl.float32)
    return collapsed


@triton.jit
def _add_block(
    collapsed: tl.tensor,
    inside: tl.tensor,
    mean: tl.tensor,
    spread: tl.tensor,
    before: tl.tensor,
    count: tl.tensor,
    CENTERED: tl.constexpr,
) -> tuple:
    """Join a block of `count` channels to the statistics of the `before` ones: mean and sum of squares about it."""
    if CENTERED:
        block_mean = total(collapsed, 1) / count
        away = tl.where(inside[None, :], collapsed - block_mean[:, None], 0.0)
        shift = block_mean - mean
        share = count / (before + count)
        spread += total(away * away, 1) + shift * shift * (before * share)
        mean += shift * share
    else:
        spread += total(collapsed * collapsed, 1)
    return mean, spread


@triton.jit
def _store_normed(
    collapsed: tl.tensor,
    mean: tl.tensor,
    inverse_rms: tl.tensor,
    norm_weight: tl.tensor,
    norm_bias: tl.tensor,
    normed: tl.tensor,
    base: tl.tensor,
    column: tl.tensor,
    live: tl.tensor,
    width: tl.tensor,
    CENTERED: tl.constexpr,
) -> None:
    inside = column < width
    gain = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        shift = tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
        value = (collapsed - mean[:, None]) * inverse_rms[:, None] * gain[None, :] + shift[None, :]
    else:
        value = collapsed * inverse_rms[:, None] * gain[None, :]
    place = normed + base[:, None] + column[None, :]
    tl.store(place, rounded(value, normed.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tokens"])
def collapse_norm_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    norm_weight: tl.tensor,
    norm_bias: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    projection: tl.tensor,
    measured_post: tl.tensor,
    measured_res: tl.tensor,
    fresh_streams: tl.tensor,
    normed: tl.tensor,
    statistics: tl.tensor,
    post_copy: tl.tensor,
    res_copy: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    norm_eps: tl.tensor,
    eps: tl.tensor,
    layer_eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    GATED: tl.constexpr,
    CENTERED: tl.constexpr,
    MIX: tl.constexpr,
    COPY: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Write the norm of Σ_i pre_i X_i (Eq. 5) of a tile of tokens, and its statistics.

    With HELD a block covers a row. With MIX the streams are made by a `post` first, and written. With COPY the
    coefficients that were measured are copied.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    token = token.to(tl.int64)
    base = token * width
    weights = collapse_weights(
        projection, scale, bias, token, live, width, norm_eps, eps, n, N, ROWS, ANCHORED, GATED
    )  # fmt: skip
    mean = tl.full([BLOCK_TOKENS], 0.0, tl.float32)
    spread = tl.full([BLOCK_TOKENS], 0.0, tl.float32)
    column = tl.arange(0, BLOCK_WIDTH)
    if HELD:
        held = _collapsed(
            streams, branch, post, res, fresh_streams, weights, token, live, base, column, width, n, N, MIX, MIX
        )  # fmt: skip
        mean, spread = _add_block(held, column < width, mean, spread, 0.0, width * 1.0, CENTERED)
        inverse_rms = tl.rsqrt(spread / width + layer_eps)
        _store_normed(
            held, mean, inverse_rms, norm_weight, norm_bias, normed, base, column, live, width, CENTERED
        )  # fmt: skip
    else:
        for start in range(0, width, BLOCK_WIDTH):
            part = _collapsed(
                streams, branch, post, res, fresh_streams, weights, token, live, base, start + column, width, n, N,
                MIX, MIX,
            )  # fmt: skip
            count = tl.minimum(width - start, BLOCK_WIDTH) * 1.0
            mean, spread = _add_block(part, start + column < width, mean, spread, start * 1.0, count, CENTERED)
        inverse_rms = tl.rsqrt(spread / width + layer_eps)
        for start in range(0, width, BLOCK_WIDTH):
            part = _collapsed(
                streams, branch, post, res, fresh_streams, weights, token, live, base, start + column, width, n, N,
                MIX, False,
            )  # fmt: skip
            _store_normed(
                part, mean, inverse_rms, norm_weight, norm_bias, normed, base, start + column, live, width, CENTERED
            )  # fmt: skip
    tl.store(statistics + 2 * token, mean, mask=live)
    tl.store(statistics + 2 * token + 1, inverse_rms, mask=live)
    if COPY:
        copy_coefficients(measured_post, measured_res, post_copy, res_copy, token, live, n, N)


def collapse_norm_by(
    streams: Tensor,
    norm: tuple[Tensor, Tensor],
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    norm_eps: float,
    eps: Eps,
    layer_eps: float,
    centered: bool,
    gated: bool,
    geometry: Geometry,
    *,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
    fresh_streams: Tensor | None = None,
    measured: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Return the normed layer input [*, C] and its statistics [*, 2], copies of coefficients between the two.

    Args:
        streams: contiguous [*, n, C], as all tensors.
        norm: its weight [C] and bias [C].
        scale: the first is that of pre.
        bias: the first n are those of pre.
        projection: [*, rows + 1].
        norm_eps: as in `normed.pre_norm`.
        eps: as in `normed.pre_norm`.
        layer_eps: as in `normed.pre_norm`.
        centered: as in `normed.pre_norm`.
        gated: as in `Manifold`.
        geometry: of the call.
        mixing: branch [*, C], post [*, n] and res [*, n, n] of a `post` that comes first.
        fresh_streams: [*, n, C], where to write the streams after it.
        measured: post and res, to be returned as copies.
    """
    normed = empty(streams, *streams.shape[:-2], geometry.width, dtype=streams.dtype)
    statistics = empty(streams, *streams.shape[:-2], 2)
    copies = tuple(torch.empty_like(tensor) for tensor in measured or ())
    config = collapse_norm_config(geometry)
    if geometry.tokens:
        nothing = (projection, projection)
        launch(
            collapse_norm_kernel, (ceil_div(geometry.tokens, config.block_tokens),),
            streams, *(mixing or (streams, *nothing)), *norm, scale, bias, projection, *(measured or nothing),
            streams if fresh_streams is None else fresh_streams, normed, statistics, *(copies or nothing),
            geometry.tokens, geometry.width, norm_eps, epsilons(eps).pre, layer_eps,
            GATED=gated, CENTERED=centered, MIX=mixing is not None, COPY=measured is not None, HELD=config.held,
            BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width,
            **warps_for(config.warps), **geometry.coefficients(),
        )  # fmt: skip
    return (normed, *copies, statistics)


def collapse_norm(
    streams: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
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
    layer_eps: float,
    centered: bool,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """Return what `pre_norm` returns, given what `measure` did; see `normed.collapse_norm`, which has the arguments."""
    return collapse_norm_by(
        streams.contiguous(), (norm_weight.contiguous(), norm_bias.contiguous()), scale.contiguous(),
        bias.contiguous(), projection.contiguous(), norm_eps, eps, layer_eps, centered, MANIFOLDS[manifold].gated,
        geometry_of(streams, phi, anchored, layout), measured=(post.contiguous(), res.contiguous()),
    )  # fmt: skip
