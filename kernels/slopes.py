"""The backward of a site's coefficients, the first step of a mapping's backward (see `mapping`).

From partial projections: the coefficients are recomputed, Sinkhorn replayed in registers, and the gradients of the
logits left for the gradients of the streams and of phi.
"""

# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .coefficients import logits_tile, matrix_slots, release_gates, release_gradients, sigmoid
from .device import sinkhorn_tile_backward, total
from .launch import Geometry, ceil_div, empty, launch
from .partials import gather_partials


class Slopes(NamedTuple):
    """What the coefficients' backward leaves for the streams and the mapping.

    Attributes:
        rows: [tokens, Q·N] gradient of the raw products, zero in the padding.
        pull: [tokens] factor of the streams themselves, through 1/RMS.
        weights: [tokens, n] pre, or what collapses anchored streams.
        bias_parts, scale_parts: [programs, Q·N] partial gradients.
    """

    rows: Tensor
    pull: Tensor
    weights: Tensor
    bias_parts: Tensor
    scale_parts: Tensor


@dataclass(frozen=True)
class SlopesConfig:
    """Launch configuration of the coefficients' backward: tokens of a tile, warps, most programs."""

    block_tokens: int
    warps: int
    programs: int


def slopes_config(geometry: Geometry) -> SlopesConfig:
    """Choose tiles of about 512 slots; Sinkhorn's replay takes twice the threads, for their registers."""
    return SlopesConfig(max(1, 512 // geometry.slots), 4 if geometry.groups <= 2 else 8, 512)


@triton.jit(do_not_specialize=["tokens", "iters", "splits"])
def slopes_kernel(
    sums: tl.tensor,
    squares: tl.tensor,
    gates: tl.tensor,
    grad_post: tl.tensor,
    grad_res: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    pull: tl.tensor,
    pre: tl.tensor,
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
    SINKHORN: tl.constexpr,
    HAS_EPS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Recompute the coefficients of tiles of tokens and differentiate them."""
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    used = (q < GROUPS) & (j < n)
    slot = tl.arange(0, Q * N)
    # Sinkhorn ends on rows; without eps their sums are constant, and column 0 of `mix` gets no gradient.
    exact: tl.constexpr = SINKHORN and not HAS_EPS
    bias_sum = tl.full([Q * N], 0.0, tl.float32)
    scale_sum = tl.full([Q * N], 0.0, tl.float32)
    for tile in range(tl.program_id(0), (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS, tl.num_programs(0)):
        token = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        live = token < tokens
        summed, square, gate = gather_partials(sums, squares, gates, token, live, tokens, splits, n, N, Q, True)
        logits, raw, inverse_rms, scales = logits_tile(summed, square, scale, bias, width, norm_eps, n, N, Q, GROUPS)
        if ANCHORED:
            gate = release_gates(gate, n, N)
        grad = tl.where(q == 0, gate[:, None, :], 0.0)
        deep = token.to(tl.int64)[:, None, None]
        alive = live[:, None, None] & used
        if GROUPS > 1:
            grad += tl.load(grad_post + deep * n + j + 0 * q, mask=alive & (q == 1), other=0.0).to(tl.float32)
        if GROUPS > 2:
            place = grad_res + deep * (n * n) + (q - 2) * n + j
            wanted = alive & (q >= 2)
            if ANCHORED and exact:
                wanted = wanted & (j > 0)
            grad += tl.load(place, mask=wanted, other=0.0).to(tl.float32)
        if ANCHORED:
            grad = release_gradients(grad, n, N, Q, GROUPS, exact)
        weights = logits
        if GATED:
            opened = sigmoid(logits)
            weights = opened + eps
            slope = tl.where(q == 0, 1.0, 2.0) * opened * (1.0 - opened)
            gated = grad * slope
            if SINKHORN:
                matrix = sinkhorn_tile_backward(
                    tl.where(q >= 2, grad, 0.0), logits, matrix_slots(n, N, Q), iters, eps, HAS_EPS
                )
                grad = tl.where(q >= 2, matrix, gated)
            else:
                grad = gated
        grad = tl.where(alive, grad, 0.0)
        normed = grad * scales[None, :, None]
        grad_inverse = total(total(normed * raw, 2), 1)
        cube = inverse_rms * inverse_rms * inverse_rms
        tl.store(pull + token, -grad_inverse * cube / (n * width), mask=live)
        flat = tl.reshape(normed * inverse_rms[:, None, None], [BLOCK_TOKENS, Q * N])
        place = rows + token.to(tl.int64)[:, None] * (Q * N) + slot[None, :]
        tl.store(place, flat, mask=live[:, None])
        if ANCHORED:
            weights = tl.where(j == 0, total(tl.where(j < n, weights, 0.0), 2)[:, :, None], weights)
        tl.store(pre + deep * n + j + 0 * q, weights, mask=live[:, None, None] & (q == 0) & (j < n))
        bias_sum += total(tl.reshape(grad, [BLOCK_TOKENS, Q * N]), 0)
        through = grad * raw * inverse_rms[:, None, None]
        scale_sum += total(tl.reshape(through, [BLOCK_TOKENS, Q * N]), 0)
    tl.store(bias_parts + tl.program_id(0) * (Q * N) + slot, bias_sum)
    tl.store(scale_parts + tl.program_id(0) * (Q * N) + slot, scale_sum)


def coefficient_gradients(
    sums: Tensor,
    squares: Tensor,
    gates: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    geometry: Geometry,
    flags: dict[str, bool],
) -> Slopes:
    """Differentiate a site's coefficients, given the partial projections of its streams."""
    config = slopes_config(geometry)
    tokens, slots = geometry.tokens, geometry.slots
    programs = min(config.programs, ceil_div(tokens, config.block_tokens))
    slopes = Slopes(
        rows=empty(sums, tokens, slots),
        pull=empty(sums, tokens),
        weights=empty(sums, tokens, geometry.n),
        bias_parts=empty(sums, programs, slots),
        scale_parts=empty(sums, programs, slots),
    )
    launch(
        slopes_kernel, (programs,),
        sums, squares, gates, grad_post, grad_res, scale, bias, *slopes,
        tokens, geometry.width, iters, norm_eps, eps, sums.shape[0],
        HAS_EPS=eps != 0.0, BLOCK_TOKENS=config.block_tokens, num_warps=config.warps,
        **geometry.constants(), **flags,
    )  # fmt: skip
    return slopes
