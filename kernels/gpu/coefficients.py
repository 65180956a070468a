"""Device functions of a site's coefficients: from the projection's product to pre, post and res.

A token's coefficients live in one register tile [tokens, Q, N], N and Q padded to powers of two: group 0
holds pre, group 1 post, groups 2 … n+1 the rows of the n×n matrix. Entry (q, j) belongs to row q·n + j of
phi, so the tile is a reshape of the projection's product, nothing is moved between the matmul and Sinkhorn,
and any n fits by masks.
"""

# ruff: noqa: N803

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..manifolds import MANIFOLDS
from .primitives import row_softmax, sinkhorn_tile, sinkhorn_tile_backward, total


def manifold_constants(manifold: str, eps: float) -> dict[str, Any]:
    """Return the compile-time constants by which kernels turn logits into coefficients, or differentiate that."""
    family = MANIFOLDS[manifold]
    return {
        "GATED": family.gated,
        "MATRIX": family.kernel_matrix,
        "HAS_EPS": eps != 0.0,
        "EXACT_ROWS": family.rows_are_exact(eps),
    }


@triton.jit
def slot_rows(n: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, GROUPS: tl.constexpr) -> tuple:
    """For each of the Q·N slots of a coefficient tile: its row of phi, and whether it has one."""
    slot = tl.arange(0, Q * N)
    return (slot // N) * n + slot % N, (slot // N < GROUPS) & (slot % N < n)


@triton.jit
def logits_tile(
    products: tl.tensor,
    squares: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    width: tl.tensor,
    norm_eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tuple:
    """Turn products [tokens, Q·N] and sums of squares [tokens] into logits (Eq. 7).

    Returns logits, raw products (both [tokens, Q, N]), 1/RMS [tokens] and the scale of each group [Q].
    """
    tile = tl.reshape(products, [products.shape[0], Q, N])
    q = tl.arange(0, Q)
    j = tl.arange(0, N)
    used = (q[:, None] < GROUPS) & (j[None, :] < n)
    inverse_rms = tl.rsqrt(squares / (n * width) + norm_eps)
    scales = tl.load(scale + tl.minimum(q, 2), mask=q < GROUPS, other=0.0).to(tl.float32)
    shift = tl.load(bias + q[:, None] * n + j[None, :], mask=used, other=0.0).to(tl.float32)
    # 1/RMS after the matmul: it must not scale the bias.
    logits = tile * inverse_rms[:, None, None] * scales[None, :, None] + shift[None, :, :]
    return logits, tile, inverse_rms, scales


@triton.jit
def matrix_slots(n: tl.constexpr, N: tl.constexpr, Q: tl.constexpr) -> tl.tensor:
    """Which slots [1, Q, N] hold the n×n matrix."""
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    return (q >= 2) & (q < n + 2) & (j < n)


@triton.jit
def sigmoid(values: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)); exact 0 and 1 at the ends."""
    return 1.0 / (1.0 + tl.exp(-values))


@triton.jit
def matrix_tile(
    logits: tl.tensor,
    iters: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
) -> tl.tensor:
    """Turn the logits of the n×n matrix in a coefficient tile into res, as MATRIX says; other slots are not used."""
    if MATRIX == "sinkhorn":
        return sinkhorn_tile(logits, matrix_slots(n, N, Q), iters, eps, HAS_EPS)
    elif MATRIX == "row":
        return row_softmax(logits, matrix_slots(n, N, Q))
    else:
        tl.static_assert(MATRIX == "logits")
        return logits


@triton.jit
def matrix_tile_backward(
    grad: tl.tensor,
    logits: tl.tensor,
    iters: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
) -> tl.tensor:
    """Differentiate `matrix_tile`; slots other than the matrix's are not used."""
    if MATRIX == "sinkhorn":
        q = tl.arange(0, Q)[None, :, None]
        grad = tl.where(q >= 2, grad, 0.0)
        return sinkhorn_tile_backward(grad, logits, matrix_slots(n, N, Q), iters, eps, HAS_EPS)
    elif MATRIX == "row":
        # Of the other slots the matrix is zero.
        matrix = row_softmax(logits, matrix_slots(n, N, Q))
        return matrix * (grad - total(matrix * grad, 2)[:, :, None])
    else:
        tl.static_assert(MATRIX == "logits")
        return grad


@triton.jit
def activate(
    logits: tl.tensor,
    iters: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    GATED: tl.constexpr,
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
) -> tl.tensor:
    """Turn logits into coefficients (Eq. 8): pre and post through sigmoids, res through the manifold.

    With ANCHORED they are those of anchored streams; EXACT_ROWS as in `Manifold.rows_are_exact`.
    """
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    weights = logits
    if GATED:
        gate = sigmoid(logits)
        weights = tl.where(q == 0, gate + eps, 2.0 * gate)
    if GROUPS > 2:
        weights = tl.where(q >= 2, matrix_tile(logits, iters, eps, n, N, Q, MATRIX, HAS_EPS), weights)
    elif GROUPS == 2:
        weights = tl.where(q >= 2, tl.where(q - 2 == j, 1.0, 0.0), weights)
    if ANCHORED:
        weights = anchor_coefficients(weights, n, N, Q, GROUPS, EXACT_ROWS)
    return weights


@triton.jit
def anchor_matrix(
    matrix: tl.tensor, row: tl.tensor, column: tl.tensor, valid: tl.tensor, EXACT_ROWS: tl.constexpr
) -> tl.tensor:
    """Turn res in a tile [tokens, out, in] into T res T⁻¹ (see `anchored.mixing`); other slots stay as they are."""
    sums = 1.0 if EXACT_ROWS else total(tl.where(valid, matrix, 0.0), 2)[:, :, None]
    matrix = tl.where(valid & (column == 0), sums, matrix)
    top = total(tl.where(valid & (row == 0), matrix, 0.0), 1)[:, None, :]
    return tl.where(valid & (row > 0), matrix - top, matrix)


@triton.jit
def anchor_reading(weights: tl.tensor, n: tl.constexpr, N: tl.constexpr, Q: tl.constexpr) -> tl.tensor:
    """Turn pre in group 0 of a coefficient tile into the weights of anchored streams: the first one is their sum."""
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    # In the padding a gate is 1/2.
    sums = total(tl.where((q == 0) & (j < n), weights, 0.0), 2)[:, :, None]
    return tl.where((q == 0) & (j == 0), sums, weights)


@triton.jit
def anchor_coefficients(
    weights: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
) -> tl.tensor:
    """Turn a tile of pre, post and res into the coefficients of anchored streams (see `anchored`)."""
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    weights = anchor_reading(weights, n, N, Q)
    if GROUPS > 1:
        first = one_weight(weights, 1, 0, N, Q)[:, None, None]
        weights = tl.where((q == 1) & (j > 0), weights - first, weights)
        weights = anchor_matrix(weights, q - 2, j, matrix_slots(n, N, Q), EXACT_ROWS)
    return weights


@triton.jit
def release_grad_pre(grad_pre: tl.tensor, n: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Turn gradients [tokens, N] of the stored streams' weights into those of pre: see `anchored.read_weights`."""
    stream = tl.arange(0, N)[None, :]
    first = total(tl.where(stream == 0, grad_pre, 0.0), 1)[:, None]
    return tl.where((stream > 0) & (stream < n), grad_pre + first, grad_pre)


@triton.jit
def release_gradients(
    grad: tl.tensor, n: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, GROUPS: tl.constexpr, EXACT_ROWS: tl.constexpr
) -> tl.tensor:
    """Turn gradients of anchored streams' post and res, in groups 1 and on, into those of post and res.

    As in `anchored.write_weights_backward` and `anchored.mixing_backward`; with EXACT_ROWS, column 0 of the matrix must
    come as zeros. The padding must be zero and stays so. Entries are picked by factors of 0 and 1: masks live in scalar
    registers on gfx942, over all of Sinkhorn, which has none to spare.
    """
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    if GROUPS > 1:
        others = total(grad * tl.where((q == 1) & (j > 0), 1.0, 0.0), 2)[:, :, None]
        grad -= others * tl.where(j == 0, 1.0, 0.0)
    if GROUPS > 2:
        others = total(grad * tl.where(q > 2, 1.0, 0.0), 1)[:, None, :]
        grad -= others * tl.where(q == 2, 1.0, 0.0)
        if not EXACT_ROWS:
            # Column 0 holds a row's sum: its gradient is every entry's.
            sums = total(tl.where((q >= 2) & (j == 0), grad, 0.0), 2)[:, :, None]
            grad = tl.where((j > 0) & (j < n), grad + sums, grad)
    return grad


@triton.jit
def one_weight(
    weights: tl.tensor, group: tl.constexpr, index: tl.constexpr, N: tl.constexpr, Q: tl.constexpr
) -> tl.tensor:
    """Take slot (group, index) of a coefficient tile: [tokens]."""
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    return total(total(tl.where((q == group) & (j == index), weights, 0.0), 2), 1)


@triton.jit
def store_coefficients(
    weights: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
) -> None:
    """Write groups 1 and 2 … n+1 of a coefficient tile to post [*, n] and res [*, n, n]."""
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    token = token.to(tl.int64)[:, None, None]
    alive = live[:, None, None] & (j < n)
    tl.store(post + token * n + j + 0 * q, weights, mask=alive & (q == 1))
    tl.store(res + token * (n * n) + (q - 2) * n + j, weights, mask=alive & (q >= 2) & (q < n + 2))
