"""The first walk of a backward through a norm: the sums over C that its gradient needs, and those of `gates`.

The norm's gradient is r (g w − m₁ − m₂ x̂), x̂ = (h − mean) r, where the means m₁ of g w and m₂ of g w x̂ need a whole
row. It is linear in them, so the gradients of the gates need no second walk: beside Σ g w X_i, the sums Σ x̂ X_i and
Σ X_i are taken, and `coefficient_gradients` puts them together. The layer input h is made again in registers. C is
split as in `gates`, (n + 1)C elements a token.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803, N806, RUF005

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..epsilons import Eps, epsilons
from .collapse_weights import collapse_weights, weight_of
from .configurations import Geometry, ceil_div, chunk_width, gates_config
from .launch import empty, launch, product_options
from .primitives import total
from .stream_tiles import load_streams, mix_stream


class Norm(NamedTuple):
    """What a backward knows of the norm of a layer input.

    Attributes:
        weight: [C].
        bias: [C].
        statistics: [*, 2] that the forward returned: mean and 1/RMS.
        centered: it is a LayerNorm.
    """

    weight: Tensor
    bias: Tensor
    statistics: Tensor
    centered: bool

    def contiguous(self) -> Norm:
        """Return the same, each tensor contiguous."""
        weight, bias, statistics = (tensor.contiguous() for tensor in (self.weight, self.bias, self.statistics))
        return Norm(weight, bias, statistics, self.centered)


@triton.jit
def _folded(values: tl.tensor, VECTOR: tl.constexpr) -> tl.tensor:
    """Add up the VECTOR neighbors that a thread holds."""
    return total(tl.reshape(values, [values.shape[0], values.shape[1] // VECTOR, VECTOR]), 2)


@triton.jit(do_not_specialize=["tokens"])
def norm_gates_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    grad_normed: tl.tensor,
    norm_weight: tl.tensor,
    statistics: tl.tensor,
    projection: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    parts: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    chunk: tl.tensor,
    norm_eps: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    GATED: tl.constexpr,
    CENTERED: tl.constexpr,
    MIX: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write parts [splits, sums, tokens], of the streams as stored.

    Sums: Σ g w X_i and Σ x̂ X_i of the n streams, Σ g w x̂; with CENTERED also Σ X_i and Σ g w.
    """
    SUMS: tl.constexpr = 3 * n + 2 if CENTERED else 2 * n + 1
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    far = token.to(tl.int64)
    base = far * width
    weights = collapse_weights(
        projection, scale, bias, far, live, width, norm_eps, eps, n, N, ROWS, ANCHORED, GATED
    )  # fmt: skip
    mean = tl.load(statistics + 2 * far, mask=live, other=0.0)
    inverse_rms = tl.load(statistics + 2 * far + 1, mask=live, other=0.0)
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.full([BLOCK_TOKENS, BLOCK_WIDTH // VECTOR], 0.0, tl.float32),)
    begin = tl.program_id(1) * chunk
    for start in range(begin, tl.minimum(begin + chunk, width), BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        mask = live[:, None] & (column < width)[None, :]
        tiles = load_streams(streams, base, column, mask, n, width)
        gain = tl.load(norm_weight + column, mask=column < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed + base[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = grad * gain[None, :]
        if MIX:
            written = tl.load(branch + base[:, None] + column[None, :], mask=mask, other=0.0)
            fresh = ()
            for o in tl.static_range(n):
                fresh = fresh + (mix_stream(tiles, written, post, res, token, live, o, n, PRECISION),)
            tiles = fresh
        normed = tl.full([BLOCK_TOKENS, BLOCK_WIDTH], 0.0, tl.float32)
        for i in tl.static_range(n):
            normed += weight_of(weights, i, N)[:, None] * tiles[i].to(tl.float32)
        normed = (normed - mean[:, None]) * inverse_rms[:, None]
        grown = ()
        for i in tl.static_range(n):
            grown = grown + (sums[i] + _folded(tiles[i].to(tl.float32) * grad, VECTOR),)
        for i in tl.static_range(n):
            grown = grown + (sums[n + i] + _folded(tiles[i].to(tl.float32) * normed, VECTOR),)
        grown = grown + (sums[2 * n] + _folded(grad * normed, VECTOR),)
        if CENTERED:
            for i in tl.static_range(n):
                grown = grown + (sums[2 * n + 1 + i] + _folded(tiles[i].to(tl.float32), VECTOR),)
            grown = grown + (sums[3 * n + 1] + _folded(grad, VECTOR),)
        sums = grown
    place = parts + tl.program_id(1).to(tl.int64) * SUMS * tokens + token
    for row in tl.static_range(SUMS):
        tl.store(place + row * tokens.to(tl.int64), total(sums[row], 1), mask=live)


def norm_gates(
    streams: Tensor,
    grad_normed: Tensor,
    norm: Norm,
    projection: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: Eps,
    gated: bool,
    geometry: Geometry,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Return [splits, sums, tokens] parts of what the gradients of the gates are put together from.

    Args:
        streams: contiguous [tokens, n, C], as all tensors.
        grad_normed: [tokens, C] gradient of the normed layer input.
        norm: of the layer input.
        projection: [tokens, rows + 1].
        scale: the first is that of pre.
        bias: the first n are those of pre.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        gated: as in `Manifold`.
        geometry: of the call.
        mixing: (branch, post, res) of a `post` that makes the streams first.
    """
    config = gates_config(geometry)
    chunk = chunk_width(geometry.width, config.splits, config.block_width)
    splits = ceil_div(geometry.width, chunk)
    parts = empty(streams, splits, 3 * geometry.n + 2 if norm.centered else 2 * geometry.n + 1, geometry.tokens)
    launch(
        norm_gates_kernel, (ceil_div(geometry.tokens, config.block_tokens), splits),
        streams, *(mixing or (streams, parts, parts)), grad_normed, norm.weight, norm.statistics, projection, scale,
        bias, parts, geometry.tokens, geometry.width, chunk, norm_eps, epsilons(eps).pre,
        GATED=gated, CENTERED=norm.centered, MIX=mixing is not None,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, VECTOR=config.vector,
        num_warps=config.warps, num_stages=1, **geometry.coefficients(), **product_options(),
    )  # fmt: skip
    return parts
