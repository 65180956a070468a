"""A site's coefficients: from the projection's partial sums to pre, post and res, one token a thread.

Tiles are [streams, tokens] for pre and post and [out, in, tokens] for the matrix, padded to a power of two; see
`primitives` for why tokens come last.
"""

# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..epsilons import Eps, epsilons
from ..manifolds import MANIFOLDS
from .configurations import Geometry, ceil_div, coefficients_config
from .launch import empty, launch
from .phi import stored_row
from .primitives import row_softmax, sinkhorn_tile, sinkhorn_tile_backward, total
from .row_matrices import kronecker, kronecker_backward, permutation_weights, permuted, permuted_backward


def sinkhorn_eps_constants(eps: Eps) -> dict[str, bool]:
    """Return the compile-time constants that say where Sinkhorn has an eps."""
    return {"HAS_EPS": epsilons(eps).within, "FIRST_EPS": epsilons(eps).first != 0.0}


def manifold_constants(manifold: str, eps: Eps) -> dict[str, Any]:
    """Return the compile-time constants by which kernels turn logits into coefficients, or differentiate that."""
    family = MANIFOLDS[manifold]
    return {
        "GATED": family.gated,
        "MATRIX": family.kernel_matrix,
        **sinkhorn_eps_constants(eps),
        "EXACT_ROWS": family.rows_are_exact(eps),
    }


def head_constants(eps: float) -> dict[str, Any]:
    """Return `manifold_constants` of a head, which has gates alone."""
    return {"GATED": True, "MATRIX": "logits", **sinkhorn_eps_constants(eps), "EXACT_ROWS": False}


@triton.jit
def sigmoid(values: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)); exact 0 and 1 at the ends."""
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def gate_index(N: tl.constexpr) -> tl.tensor:
    """Streams of a tile [streams, tokens]: [N, 1]."""
    return tl.arange(0, N)[:, None]


@triton.jit
def matrix_index(N: tl.constexpr) -> tuple:
    """Output and input streams of a tile [out, in, tokens]: [N, 1, 1] and [1, N, 1]."""
    return tl.arange(0, N)[:, None, None], tl.arange(0, N)[None, :, None]


@triton.jit
def affine(
    raw: tl.tensor, row: tl.tensor, used: tl.tensor, inverse_rms: tl.tensor, scale: tl.tensor, bias: tl.tensor
) -> tl.tensor:
    """Turn raw products into logits (Eq. 7): 1/RMS after the matmul, it must not scale the bias."""
    shift = tl.load(bias + row, mask=used, other=0.0).to(tl.float32)
    return raw * inverse_rms * tl.load(scale).to(tl.float32) + shift


@triton.jit
def read_weights(
    logits: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    GATED: tl.constexpr,
    ANCHORED: tl.constexpr,
) -> tl.tensor:
    """Turn logits of pre into what collapses the streams as stored: of anchored ones the first is the sum of all."""
    weights = logits
    if GATED:
        weights = sigmoid(logits) + eps
    if ANCHORED:
        j = gate_index(N)
        # In the padding a gate is 1/2.
        weights = tl.where(j == 0, total(tl.where(j < n, weights, 0.0), 0)[None, :], weights)
    return weights


@triton.jit
def write_weights(
    logits: tl.tensor, n: tl.constexpr, N: tl.constexpr, GATED: tl.constexpr, ANCHORED: tl.constexpr
) -> tl.tensor:
    """Turn logits of post into what writes the branch into the streams as stored."""
    weights = logits
    if GATED:
        weights = 2.0 * sigmoid(logits)
    if ANCHORED:
        j = gate_index(N)
        weights = tl.where(j > 0, weights - total(tl.where(j == 0, weights, 0.0), 0)[None, :], weights)
    return weights


@triton.jit
def matrix_of(
    logits: tl.tensor,
    iters: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
    FIRST_EPS: tl.constexpr,
) -> tl.tensor:
    """Turn logits [out, in, tokens] into res, as MATRIX says."""
    if MATRIX == "sinkhorn":
        o, i = matrix_index(N)
        return sinkhorn_tile(logits, (o < n) & (i < n), iters, eps, HAS_EPS, FIRST_EPS)
    elif MATRIX == "row":
        o, i = matrix_index(N)
        return row_softmax(logits, (o < n) & (i < n))
    else:
        tl.static_assert(MATRIX == "logits")
        return logits


@triton.jit
def matrix_backward(
    grad: tl.tensor,
    logits: tl.tensor,
    iters: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
    FIRST_EPS: tl.constexpr,
) -> tl.tensor:
    """Differentiate `matrix_of`; the padding of `grad` must be zero."""
    if MATRIX == "sinkhorn":
        o, i = matrix_index(N)
        return sinkhorn_tile_backward(grad, logits, (o < n) & (i < n), iters, eps, HAS_EPS, FIRST_EPS)
    elif MATRIX == "row":
        o, i = matrix_index(N)
        matrix = row_softmax(logits, (o < n) & (i < n))
        return matrix * (grad - total(matrix * grad, 1)[:, None, :])
    else:
        tl.static_assert(MATRIX == "logits")
        return grad


@triton.jit
def matrix_of_row(
    logits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    MATRIX: tl.constexpr,
) -> tl.tensor:
    """Turn logits [PADDED, tokens] into res [out, in, tokens], as MATRIX says; the padding of `logits` is not read."""
    o, i = matrix_index(N)
    row = gate_index(PADDED)
    if MATRIX == "permutation":
        return permuted(permutation_weights(logits, row, ROWS - 2 * n), row, o, i, n, ROWS - 2 * n)
    else:
        tl.static_assert(MATRIX == "kronecker")
        return kronecker(sigmoid(logits), row, o, i, ROWS - 2 * n)


@triton.jit
def matrix_of_row_backward(
    grad: tl.tensor,
    logits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    MATRIX: tl.constexpr,
) -> tl.tensor:
    """Differentiate `matrix_of_row`; the padding of `grad` must be zero."""
    o, i = matrix_index(N)
    row = gate_index(PADDED)
    if MATRIX == "permutation":
        weights = permutation_weights(logits, row, ROWS - 2 * n)
        slopes = permuted_backward(grad, row, o, i, n, ROWS - 2 * n)
        return weights * (slopes - total(weights * slopes, 0)[None, :])
    else:
        stay = sigmoid(logits)
        return kronecker_backward(grad, stay, row, o, i, ROWS - 2 * n) * stay * (1.0 - stay)


@triton.jit
def anchor_matrix(matrix: tl.tensor, n: tl.constexpr, N: tl.constexpr, EXACT_ROWS: tl.constexpr) -> tl.tensor:
    """Turn res [out, in, tokens] into T res T⁻¹ (see `anchored.mixing`)."""
    o, i = matrix_index(N)
    sums = 1.0 if EXACT_ROWS else total(tl.where(i < n, matrix, 0.0), 1)[:, None, :]
    matrix = tl.where(i == 0, sums, matrix)
    top = total(tl.where(o == 0, matrix, 0.0), 0)[None, :, :]
    return tl.where(o > 0, matrix - top, matrix)


@triton.jit
def release_matrix_gradient(grad: tl.tensor, n: tl.constexpr, N: tl.constexpr, EXACT_ROWS: tl.constexpr) -> tl.tensor:
    """Turn gradients of T res T⁻¹ into those of res, as in `anchored.mixing_backward`.

    With EXACT_ROWS, column 0 must come as zeros. The padding must be zero and stays so. Entries are picked by factors
    of 0 and 1: masks live in scalar registers on gfx942, over all of Sinkhorn, which has none to spare.
    """
    o, i = matrix_index(N)
    others = total(grad * tl.where(o > 0, 1.0, 0.0), 0)[None, :, :]
    grad -= others * tl.where(o == 0, 1.0, 0.0)
    if not EXACT_ROWS:
        # Column 0 holds a row's sum: its gradient is every entry's.
        sums = total(grad * tl.where(i == 0, 1.0, 0.0), 1)[:, None, :]
        grad += sums * tl.where((i > 0) & (i < n) & (o < n), 1.0, 0.0)
    return grad


@triton.jit
def sum_parts(
    parts: tl.tensor,
    row: tl.tensor,
    used: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """Add up rows of parts [splits, COUNT, tokens] in the order of the splits; `used` says which rows and tokens."""
    place = parts + row * tokens.to(tl.int64) + token
    summed = tl.load(place, mask=used, other=0.0)
    for _ in range(1, splits):
        place += tokens.to(tl.int64) * COUNT
        summed += tl.load(place, mask=used, other=0.0)
    return summed


@triton.jit
def matrix_of_parts(
    sums: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    projection: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    inverse_rms: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    MATRIX: tl.constexpr,
) -> tl.tensor:
    """Add up the partial sums of a row of logits, write them as projection, and return res [out, in, tokens]."""
    row = gate_index(PADDED)
    used = (row < ROWS - 2 * n) & live[None, :]
    raw = sum_parts(sums, 2 * n + row, used, token[None, :], tokens, splits, ROWS + 1)
    tl.store(projection + token.to(tl.int64)[None, :] * (ROWS + 1) + 2 * n + row, raw, mask=used)
    logits = affine(raw, 2 * n + row, row < ROWS - 2 * n, inverse_rms[None, :], scale + 2, bias)
    return matrix_of_row(logits, n, N, ROWS, PADDED, MATRIX)


@triton.jit(do_not_specialize=["tokens", "iters", "splits"])
def coefficients_kernel(
    sums: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    projection: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    iters: tl.tensor,
    norm_eps: tl.tensor,
    first_eps: tl.tensor,
    matrix_eps: tl.tensor,
    sums_eps: tl.tensor,
    splits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    GATED: tl.constexpr,
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
    FIRST_EPS: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Add up a tile's partial sums, write them as its projection, and post and res of it."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    far = token.to(tl.int64)
    squares = sum_parts(sums, ROWS, live, token, tokens, splits, ROWS + 1)
    tl.store(projection + far * (ROWS + 1) + ROWS, squares, mask=live)
    inverse_rms = tl.rsqrt(squares / (n * width) + norm_eps)
    j = gate_index(N)
    used = (j < n) & live[None, :]
    gates = sum_parts(sums, j, used, token[None, :], tokens, splits, ROWS + 1)
    tl.store(projection + far[None, :] * (ROWS + 1) + j, gates, mask=used)
    if n < ROWS:
        raw = sum_parts(sums, j + n, used, token[None, :], tokens, splits, ROWS + 1)
        tl.store(projection + far[None, :] * (ROWS + 1) + j + n, raw, mask=used)
        logits = affine(raw, j + n, j < n, inverse_rms[None, :], scale + 1, bias)
        tl.store(post + far[None, :] * n + j, write_weights(logits, n, N, GATED, ANCHORED), mask=used)
        o, i = matrix_index(N)
        inside = (o < n) & (i < n)
        here = inside & live[None, None, :]
        if PADDED:
            matrix = matrix_of_parts(
                sums, scale, bias, projection, token, live, inverse_rms, tokens, splits, n, N, ROWS, PADDED, MATRIX
            )
        elif 2 * n < ROWS:
            row = 2 * n + o * n + i
            raw = sum_parts(sums, row, here, token[None, None, :], tokens, splits, ROWS + 1)
            tl.store(projection + far[None, None, :] * (ROWS + 1) + row, raw, mask=here)
            row = stored_row(row, n, TRANSPOSED)
            logits = affine(raw, row, inside, inverse_rms[None, None, :], scale + 2, bias)
            matrix = matrix_of(logits, iters, (first_eps, matrix_eps, sums_eps), n, N, MATRIX, HAS_EPS, FIRST_EPS)
        else:
            matrix = tl.where(o == i, 1.0, 0.0) + tl.full([N, N, BLOCK_TOKENS], 0.0, tl.float32)
        if ANCHORED:
            matrix = anchor_matrix(matrix, n, N, EXACT_ROWS)
        tl.store(res + far[None, None, :] * (n * n) + o * n + i, matrix, mask=here)


def coefficients(
    sums: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    geometry: Geometry,
    constants: dict[str, Any],
    coefficient_outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Launch what turns partial sums into coefficients.

    Args:
        sums: [splits, rows + 1, tokens], from `project`.
        scale: [3], [2], or [1] for a head.
        bias: [rows].
        iters: Sinkhorn iterations.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        geometry: of the call.
        constants: as from `manifold_constants`.
        coefficient_outputs: from `coefficient_memory`, to write.
    """
    config = coefficients_config(geometry)
    launch(
        coefficients_kernel, (ceil_div(geometry.tokens, config.block_tokens),),
        sums, scale, bias, *coefficient_outputs, geometry.tokens, geometry.width, iters, norm_eps, *epsilons(eps)[1:],
        sums.shape[0],
        BLOCK_TOKENS=config.block_tokens, num_warps=config.warps, **geometry.coefficients(), **geometry.matrix(),
        **constants,
    )  # fmt: skip


def coefficient_memory(streams: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 memory for post [*, n], res [*, n, n] and the projection [*, rows + 1]; a head has neither."""
    leading, n = streams.shape[:-2], geometry.n
    projection = empty(streams, *leading, geometry.rows + 1)
    if geometry.rows == n:
        return projection, projection, projection
    return empty(streams, *leading, n), empty(streams, *leading, n, n), projection
