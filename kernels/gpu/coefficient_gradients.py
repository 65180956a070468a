"""The backward of a site's coefficients, between its two walks over the streams; one token a thread.

The coefficients are recomputed from the projection that the forward kept, Sinkhorn is replayed in registers, and what
the gradients of the streams and of phi need is left in device memory.
"""

# mypy: disable-error-code="assignment"
# ruff: noqa: N803, N806

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..epsilons import Eps, epsilons
from .coefficients import (
    affine,
    gate_index,
    matrix_backward,
    matrix_index,
    matrix_of_row_backward,
    read_weights,
    release_matrix_gradient,
    sigmoid,
    sum_parts,
)
from .configurations import Geometry, ceil_div, coefficients_config
from .launch import empty, launch
from .norm_gates import Norm
from .phi import stored_row
from .primitives import split, total


class CoefficientGradients(NamedTuple):
    """What the coefficients' backward leaves for the gradients of streams, phi, scale and bias.

    Attributes:
        slopes: [pieces, tokens, slots] gradient of the raw products with phi, as products take it (see
            `primitives.split`), zero in the padding.
        factors: [n + 1, tokens] float32: what collapses the streams as stored, then the factor of the streams
            themselves in their gradient, through 1/RMS. Where the layer input is normed, [n + 3, tokens]: the means of
            the norm's gradient behind its weight along the normed values, and by itself.
        parts: [programs, 2, rows] float32 partial gradients of bias and of each row's scale.
    """

    slopes: Tensor
    factors: Tensor
    parts: Tensor


@triton.jit
def _leave(
    grad: tl.tensor,
    raw: tl.tensor,
    row: tl.tensor,
    used: tl.tensor,
    inverse_rms: tl.tensor,
    scale: tl.tensor,
    slopes: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
) -> tl.tensor:
    """Write the slopes of a tile of rows, and return its gradient's products with the raw products times scale."""
    normed = grad * tl.load(scale).to(tl.float32)
    pieces = split(normed * inverse_rms, PIECES)
    place = slopes + token * SLOTS + row
    tl.store(place, pieces[0], mask=used)
    if PIECES == 2:
        tl.store(place + tokens.to(tl.int64) * SLOTS, pieces[1], mask=used)
    return normed * raw


@triton.jit
def _through_norm(
    parts: tl.tensor,
    statistics: tl.tensor,
    factors: tl.tensor,
    j: tl.tensor,
    used: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    splits: tl.tensor,
    n: tl.constexpr,
    CENTERED: tl.constexpr,
) -> tl.tensor:
    """Put the gates' gradient together from the sums of `norm_gates`, and leave the norm's two means in `factors`."""
    SUMS: tl.constexpr = 3 * n + 2 if CENTERED else 2 * n + 1
    grad = sum_parts(parts, j, used, token[None, :], tokens, splits, SUMS)
    along = sum_parts(parts, 2 * n, live, token, tokens, splits, SUMS) / width
    grad -= along[None, :] * sum_parts(parts, n + j, used, token[None, :], tokens, splits, SUMS)
    tl.store(factors + tokens.to(tl.int64) * (n + 1) + token, along, mask=live)
    if CENTERED:
        level = sum_parts(parts, 3 * n + 1, live, token, tokens, splits, SUMS) / width
        grad -= level[None, :] * sum_parts(parts, 2 * n + 1 + j, used, token[None, :], tokens, splits, SUMS)
        tl.store(factors + tokens.to(tl.int64) * (n + 2) + token, level, mask=live)
    return grad * tl.load(statistics + 2 * token.to(tl.int64) + 1, mask=live, other=0.0)[None, :]


@triton.jit(do_not_specialize=["tokens", "iters", "splits"])
def coefficient_gradients_kernel(
    projection: tl.tensor,
    gate_parts: tl.tensor,
    grad_post: tl.tensor,
    grad_res: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    statistics: tl.tensor,
    slopes: tl.tensor,
    factors: tl.tensor,
    parts: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    iters: tl.tensor,
    norm_eps: tl.tensor,
    eps: tl.tensor,
    first_eps: tl.tensor,
    matrix_eps: tl.tensor,
    sums_eps: tl.tensor,
    splits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    GATED: tl.constexpr,
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
    FIRST_EPS: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Recompute the coefficients of a tile of tokens and differentiate them; with NORM from sums of `norm_gates`."""
    j = gate_index(N)
    o, i = matrix_index(N)
    entry = 2 * n + o * n + i
    inside = (o < n) & (i < n)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    far = token.to(tl.int64)
    kept = projection + far * (ROWS + 1)
    inverse_rms = tl.rsqrt(tl.load(kept + ROWS, mask=live, other=0.0) / (n * width) + norm_eps)
    used = (j < n) & live[None, :]
    raw = tl.load(kept[None, :] + j, mask=used, other=0.0)
    logits = affine(raw, j, j < n, inverse_rms[None, :], scale, bias)
    weights = read_weights(logits, eps, n, N, GATED, ANCHORED)
    tl.store(factors + j * tokens.to(tl.int64) + token[None, :], weights, mask=used)
    if NORM:
        grad = _through_norm(
            gate_parts, statistics, factors, j, used, token, live, tokens, width, splits, n, CENTERED
        )  # fmt: skip
    else:
        grad = sum_parts(gate_parts, j, used, token[None, :], tokens, splits, n)
    if ANCHORED:
        grad += tl.where((j > 0) & (j < n), total(tl.where(j == 0, grad, 0.0), 0)[None, :], 0.0)
    if GATED:
        opened = sigmoid(logits)
        grad = grad * opened * (1.0 - opened)
    grad = tl.where(used, grad, 0.0)
    bias_pre = total(grad, 1)
    scale_pre = total(grad * raw * inverse_rms[None, :], 1)
    through = total(
        _leave(grad, raw, j, used, inverse_rms[None, :], scale, slopes, far[None, :], tokens, SLOTS, PIECES), 0
    )
    if n < ROWS:
        raw = tl.load(kept[None, :] + n + j, mask=used, other=0.0)
        grad = tl.load(grad_post + far[None, :] * n + j, mask=used, other=0.0).to(tl.float32)
        if ANCHORED:
            grad -= tl.where(j == 0, total(tl.where(j > 0, grad, 0.0), 0)[None, :], 0.0)
        if GATED:
            opened = sigmoid(affine(raw, n + j, j < n, inverse_rms[None, :], scale + 1, bias))
            grad = grad * 2.0 * opened * (1.0 - opened)
        grad = tl.where(used, grad, 0.0)
        bias_post = total(grad, 1)
        scale_post = total(grad * raw * inverse_rms[None, :], 1)
        through += total(
            _leave(
                grad, raw, n + j, used, inverse_rms[None, :], scale + 1, slopes, far[None, :], tokens, SLOTS, PIECES
            ),
            0,
        )
    if 2 * n < ROWS:
        here = inside & live[None, None, :]
        wanted = here
        if ANCHORED and EXACT_ROWS:
            # Column 0 of the anchored matrix is a constant.
            wanted = here & (i > 0)
        place = grad_res + far[None, None, :] * (n * n) + o * n + i
        grad = tl.load(place, mask=wanted, other=0.0).to(tl.float32)
        if ANCHORED:
            grad = release_matrix_gradient(grad, n, N, EXACT_ROWS)
        if PADDED:
            row = gate_index(PADDED)
            used = (row < ROWS - 2 * n) & live[None, :]
            raw = tl.load(kept[None, :] + 2 * n + row, mask=used, other=0.0)
            logits = affine(raw, 2 * n + row, row < ROWS - 2 * n, inverse_rms[None, :], scale + 2, bias)
            grad = matrix_of_row_backward(grad, logits, n, N, ROWS, PADDED, MATRIX)
            grad = tl.where(used, grad, 0.0)
            bias_matrix = total(grad, 1)
            scale_matrix = total(grad * raw * inverse_rms[None, :], 1)
            product = _leave(
                grad, raw, 2 * n + row, used, inverse_rms[None, :], scale + 2, slopes, far[None, :], tokens, SLOTS,
                PIECES,
            )  # fmt: skip
            through += total(product, 0)
        else:
            raw = tl.load(kept[None, None, :] + entry, mask=here, other=0.0)
            row = stored_row(entry, n, TRANSPOSED)
            logits = affine(raw, row, inside, inverse_rms[None, None, :], scale + 2, bias)
            within = (first_eps, matrix_eps, sums_eps)
            grad = matrix_backward(grad, logits, iters, within, n, N, MATRIX, HAS_EPS, FIRST_EPS)
            grad = tl.where(here, grad, 0.0)
            bias_matrix = total(grad, 2)
            scale_matrix = total(grad * raw * inverse_rms[None, None, :], 2)
            product = _leave(
                grad, raw, entry, here, inverse_rms[None, None, :], scale + 2, slopes, far[None, None, :], tokens,
                SLOTS, PIECES,
            )  # fmt: skip
            through += total(total(product, 0), 0)
    cube = inverse_rms * inverse_rms * inverse_rms
    tl.store(factors + tokens.to(tl.int64) * n + token, -through * cube / (n * width), mask=live)
    if ROWS < SLOTS:
        padding = tl.arange(0, SLOTS)[:, None]
        zero = tl.full([SLOTS, BLOCK_TOKENS], 0.0, tl.float32).to(slopes.dtype.element_ty)
        for piece in tl.static_range(PIECES):
            place = slopes + (far[None, :] + piece * tokens) * SLOTS + padding
            tl.store(place, zero, mask=(padding >= ROWS) & live[None, :])
    part = parts + tl.program_id(0) * (2 * ROWS)
    j = tl.arange(0, N)
    tl.store(part + j, bias_pre, mask=j < n)
    tl.store(part + ROWS + j, scale_pre, mask=j < n)
    if n < ROWS:
        tl.store(part + n + j, bias_post, mask=j < n)
        tl.store(part + ROWS + n + j, scale_post, mask=j < n)
    if PADDED:
        row = tl.arange(0, PADDED)
        tl.store(part + 2 * n + row, bias_matrix, mask=row < ROWS - 2 * n)
        tl.store(part + ROWS + 2 * n + row, scale_matrix, mask=row < ROWS - 2 * n)
    elif 2 * n < ROWS:
        o, i = j[:, None], j[None, :]
        inside = (o < n) & (i < n)
        tl.store(part + 2 * n + o * n + i, bias_matrix, mask=inside)
        tl.store(part + ROWS + 2 * n + o * n + i, scale_matrix, mask=inside)


def coefficient_gradients(
    projection: Tensor,
    gate_parts: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    geometry: Geometry,
    constants: dict[str, Any],
    norm: Norm | None = None,
) -> CoefficientGradients:
    """Differentiate a site's coefficients.

    Args:
        projection: [tokens, rows + 1] that the forward kept.
        gate_parts: [splits, n, tokens], from `gates`, or [splits, sums, tokens] from `norm_gates`.
        grad_post: [tokens, n]; not read for a head.
        grad_res: [tokens, n, n]; read only where streams mix.
        scale: [3], [2], or [1] for a head.
        bias: [rows].
        iters: Sinkhorn iterations.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        geometry: of the call.
        constants: as from `manifold_constants`.
        norm: of the layer input, if it has one.
    """
    config = coefficients_config(geometry)
    tokens = geometry.tokens
    programs = ceil_div(tokens, config.block_tokens)
    dtype = torch.bfloat16 if geometry.pieces == 2 else torch.float32
    found = CoefficientGradients(
        slopes=empty(projection, geometry.pieces, tokens, geometry.slots, dtype=dtype),
        factors=empty(projection, geometry.n + (3 if norm else 1), tokens),
        parts=empty(projection, programs, 2, geometry.rows),
    )
    launch(
        coefficient_gradients_kernel, (programs,),
        projection, gate_parts, grad_post, grad_res, scale, bias, norm.statistics if norm else projection, *found,
        tokens, geometry.width, iters, norm_eps, *epsilons(eps), gate_parts.shape[0],
        SLOTS=geometry.slots, PIECES=geometry.pieces,
        NORM=norm is not None, CENTERED=norm is not None and norm.centered,
        BLOCK_TOKENS=config.block_tokens, num_warps=config.warps, **geometry.coefficients(), **geometry.matrix(),
        **constants,
    )  # fmt: skip
    return found
