"""The backward of a site's coefficients, between the partial projections and `stream_gradients`.

The coefficients are recomputed from the partial projections, Sinkhorn is replayed in registers, and what the gradients
of the streams and of phi need is left in device memory.
"""

# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .coefficients import logits_tile, matrix_tile_backward, release_grad_pre, release_gradients, sigmoid
from .launch import Geometry, ceil_div, empty, launch
from .primitives import total
from .projection import sum_partials


class CoefficientGradients(NamedTuple):
    """What the coefficients' backward leaves for the gradients of streams, phi, scale and bias; all float32.

    Attributes:
        grad_products: [tokens, Q·N] gradient of the raw products with phi, zero in the padding.
        norm_factor: [tokens] factor of the streams themselves in their gradient, through 1/RMS.
        read_weights: [tokens, n] pre, or what collapses anchored streams.
        bias_parts: [programs, Q·N] partial gradients of bias.
        scale_parts: [programs, Q·N] partial gradients of each slot's scale.
    """

    grad_products: Tensor
    norm_factor: Tensor
    read_weights: Tensor
    bias_parts: Tensor
    scale_parts: Tensor


@dataclass(frozen=True)
class CoefficientGradientsConfig:
    """Launch configuration of the coefficients' backward: tokens of a tile, warps, most programs."""

    block_tokens: int
    warps: int
    programs: int


def coefficient_gradients_config(geometry: Geometry) -> CoefficientGradientsConfig:
    """Choose tiles of about 512 slots; Sinkhorn's replay takes twice the threads, for their registers."""
    return CoefficientGradientsConfig(max(1, 512 // geometry.slots), 4 if geometry.groups <= 2 else 8, 512)


@triton.jit(do_not_specialize=["tokens", "iters", "splits"])
def coefficient_gradients_kernel(
    sums: tl.tensor,
    squares: tl.tensor,
    grad_pre: tl.tensor,
    grad_post: tl.tensor,
    grad_res: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    grad_products: tl.tensor,
    norm_factor: tl.tensor,
    read_weights: tl.tensor,
    bias_parts: tl.tensor,
    scale_parts: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    iters: tl.tensor,
    norm_eps: tl.tensor,
    eps: tl.tensor,
    splits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    GATED: tl.constexpr,
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Recompute the coefficients of tiles of tokens and differentiate them."""
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    used = (q < GROUPS) & (j < n)
    slot = tl.arange(0, Q * N)
    bias_sum = tl.full([Q * N], 0.0, tl.float32)
    scale_sum = tl.full([Q * N], 0.0, tl.float32)
    for tile in range(tl.program_id(0), (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS, tl.num_programs(0)):
        token = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        live = token < tokens
        summed, square, read_grad = sum_partials(sums, squares, grad_pre, token, live, tokens, splits, n, N, Q, True)
        logits, raw, inverse_rms, scales = logits_tile(summed, square, scale, bias, width, norm_eps, n, N, Q, GROUPS)
        if ANCHORED:
            read_grad = release_grad_pre(read_grad, n, N)
        grad = tl.where(q == 0, read_grad[:, None, :], 0.0)
        deep = token.to(tl.int64)[:, None, None]
        alive = live[:, None, None] & used
        if GROUPS > 1:
            grad += tl.load(grad_post + deep * n + j + 0 * q, mask=alive & (q == 1), other=0.0).to(tl.float32)
        if GROUPS > 2:
            place = grad_res + deep * (n * n) + (q - 2) * n + j
            wanted = alive & (q >= 2)
            if ANCHORED and EXACT_ROWS:
                # Column 0 of the anchored matrix is a constant.
                wanted = wanted & (j > 0)
            grad += tl.load(place, mask=wanted, other=0.0).to(tl.float32)
        if ANCHORED:
            grad = release_gradients(grad, n, N, Q, GROUPS, EXACT_ROWS)
        weights = logits
        if GATED:
            opened = sigmoid(logits)
            weights = opened + eps
            gated = grad * (tl.where(q == 0, 1.0, 2.0) * opened * (1.0 - opened))
        else:
            gated = grad
        if GROUPS > 2:
            matrix = matrix_tile_backward(grad, logits, iters, eps, n, N, Q, MATRIX, HAS_EPS)
            gated = tl.where(q >= 2, matrix, gated)
        grad = tl.where(alive, gated, 0.0)
        normed = grad * scales[None, :, None]
        grad_inverse = total(total(normed * raw, 2), 1)
        cube = inverse_rms * inverse_rms * inverse_rms
        tl.store(norm_factor + token, -grad_inverse * cube / (n * width), mask=live)
        flat = tl.reshape(normed * inverse_rms[:, None, None], [BLOCK_TOKENS, Q * N])
        place = grad_products + token.to(tl.int64)[:, None] * (Q * N) + slot[None, :]
        tl.store(place, flat, mask=live[:, None])
        if ANCHORED:
            weights = tl.where(j == 0, total(tl.where(j < n, weights, 0.0), 2)[:, :, None], weights)
        tl.store(read_weights + deep * n + j + 0 * q, weights, mask=live[:, None, None] & (q == 0) & (j < n))
        bias_sum += total(tl.reshape(grad, [BLOCK_TOKENS, Q * N]), 0)
        through = grad * raw * inverse_rms[:, None, None]
        scale_sum += total(tl.reshape(through, [BLOCK_TOKENS, Q * N]), 0)
    tl.store(bias_parts + tl.program_id(0) * (Q * N) + slot, bias_sum)
    tl.store(scale_parts + tl.program_id(0) * (Q * N) + slot, scale_sum)


def coefficient_gradients(
    sums: Tensor,
    squares: Tensor,
    grad_pre: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    geometry: Geometry,
    constants: dict[str, Any],
) -> CoefficientGradients:
    """Differentiate a site's coefficients, given the partial projections of its streams.

    Args:
        sums: [splits, tokens, Q·N], from `partial_projections`.
        squares: [splits, tokens], from `partial_projections`.
        grad_pre: [splits, tokens, n], from `partial_projections`.
        grad_post: [tokens, n]; not read for a head.
        grad_res: [tokens, n, n]; read only where streams mix.
        scale: [3], [2], or [1] for a head.
        bias: [rows].
        iters: Sinkhorn iterations.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        geometry: of the call.
        constants: as from `manifold_constants`.
    """
    config = coefficient_gradients_config(geometry)
    tokens, slots = geometry.tokens, geometry.slots
    programs = min(config.programs, ceil_div(tokens, config.block_tokens))
    coefficient_grads = CoefficientGradients(
        grad_products=empty(sums, tokens, slots),
        norm_factor=empty(sums, tokens),
        read_weights=empty(sums, tokens, geometry.n),
        bias_parts=empty(sums, programs, slots),
        scale_parts=empty(sums, programs, slots),
    )
    launch(
        coefficient_gradients_kernel, (programs,),
        sums, squares, grad_pre, grad_post, grad_res, scale, bias, *coefficient_grads,
        tokens, geometry.width, iters, norm_eps, eps, sums.shape[0],
        BLOCK_TOKENS=config.block_tokens, num_warps=config.warps, **geometry.constants(), **constants,
    )  # fmt: skip
    return coefficient_grads
