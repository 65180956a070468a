"""Device functions that kernels share: sums, rounding, split-precision products, Sinkhorn.

Tokens come last in Sinkhorn's tiles: then a thread holds a token's whole matrix where there are as many tokens as
threads, and sums over rows and columns need neither shuffles nor shared memory.

They use builtins of the language alone (`tl.reduce`, not `tl.sum`): the wrappers are jitted themselves, and where
Triton was imported before its interpreter was switched on, they stay compiled and cannot be called.
"""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import standard

# Stands in for minus infinity in padding, where inf - inf would be NaN.
LOWEST = tl.constexpr(-1.0e30)

# Fixed when the kernels are decorated. The interpreter of Triton 3.9 multiplies the bit patterns of bfloat16
# in a dot and truncates where a device rounds; both are done by hand there.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def total(values: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Sum over an axis."""
    return tl.reduce(values, axis, standard._sum_combine)


@triton.jit
def largest(values: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """Maximum over an axis."""
    return tl.reduce(values, axis, standard._elementwise_max)


@triton.jit
def rounded(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Round float32 to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def materialize(values: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Return `values` unchanged, computed once and kept in registers.

    Where a matmul takes a value in another register layout, the compiler prefers to compute it again in that layout to
    moving it. A mix of n streams that every warp computes again costs hundreds of registers: an opaque move stops it.
    """
    if INTERPRETED:
        return values
    move: tl.constexpr = "v_mov_b32 $0, $1" if PRECISION == "ieee" else "mov.b32 $0, $1;"
    registers: tl.constexpr = "=v,v" if PRECISION == "ieee" else "=r,r"
    pack: tl.constexpr = 32 // values.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise(move, registers, [values], dtype=values.dtype, is_pure=False, pack=pack)


@triton.jit
def product(left: tl.tensor, right: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """`acc + left @ right` on one pair of operands of equal dtype."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def split(values: tl.tensor, PIECES: tl.constexpr) -> tuple:
    """Split float32 into what products take: itself, or with 2 PIECES its bfloat16 rounding and that of the rest.

    Two pieces keep 16 bits. A third would not help: chained through tensor cores, whose sums truncate, errors of the
    accumulator are larger.
    """
    if PIECES == 1:
        return (values,)
    else:
        high = rounded(values, tl.bfloat16)
        return high, rounded(values - high.to(tl.float32), tl.bfloat16)


@triton.jit
def stream_product(left: tl.tensor, right: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """`acc + left @ right` of a stream as stored and the pieces of float32 factors."""
    if len(right) == 1:
        return product(left.to(tl.float32), right[0], acc, PRECISION)
    else:
        acc = product(left, right[1], acc, PRECISION)
        return product(left, right[0], acc, PRECISION)


@triton.jit
def piece_product(left: tl.tensor, right: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """`acc + left @ right` of the pieces of two float32 factors, for a result of a stream's dtype."""
    if len(right) == 1:
        return product(left[0], right[0], acc, PRECISION)
    else:
        acc = product(left[1], right[0], acc, PRECISION)
        acc = product(left[0], right[1], acc, PRECISION)
        return product(left[0], right[0], acc, PRECISION)


@triton.jit
def _nonzero(sums: tl.tensor) -> tl.tensor:
    """Padding sums to exactly 0; real sums lie in [1/n², n]."""
    return tl.where(sums == 0.0, 1.0, sums)


@triton.jit
def row_softmax(logits: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """Softmax over the inputs of a tile [out, in, tokens]; zero where not `valid`."""
    shown = tl.where(valid, logits, LOWEST)
    matrix = tl.where(valid, tl.exp(shown - largest(shown, 1)[:, None, :]), 0.0)
    return matrix / _nonzero(total(matrix, 1))[:, None, :]


@triton.jit
def _sinkhorn_start(
    logits: tl.tensor, valid: tl.tensor, eps: tl.tensor, HAS_EPS: tl.constexpr, FIRST_EPS: tl.constexpr
) -> tuple:
    """First column and row normalization, in the log domain where no eps is added.

    Returns the exponentials by their sums over columns, the matrix and its row sums, all zero in the padding.
    """
    shown = tl.where(valid, logits, LOWEST)
    top = largest(shown, 0)
    shown = shown - top[None, :, :]
    column_sums = total(tl.exp(shown), 0)
    columns = shown - tl.log(column_sums)[None, :, :]
    probabilities = tl.where(valid, tl.exp(columns), 0.0)
    if FIRST_EPS:
        # Of exponentials too small to matter beside the eps, exp(-top) may be infinite.
        kept = column_sums / (column_sums + eps[0] * tl.exp(-tl.where(top == LOWEST, 0.0, top)))
        probabilities *= kept[None, :, :]
    if HAS_EPS:
        matrix = tl.where(valid, probabilities + eps[1], 0.0)
        sums = _nonzero(total(matrix, 1) + eps[2])
    else:
        columns = tl.where(valid, columns, LOWEST)
        matrix = tl.where(valid, tl.exp(columns - largest(columns, 1)[:, None, :]), 0.0)
        sums = _nonzero(total(matrix, 1))
    return probabilities, matrix / sums[:, None, :], sums


@triton.jit
def _sinkhorn_step(matrix: tl.tensor, eps: tl.tensor, active: tl.tensor) -> tuple:
    """One column, then one row normalization, and their sums; changes nothing unless `active`."""
    column_sums = tl.where(active, _nonzero(total(matrix, 0) + eps), 1.0)
    matrix = matrix / column_sums[None, :, :]
    row_sums = tl.where(active, _nonzero(total(matrix, 1) + eps), 1.0)
    return matrix / row_sums[:, None, :], column_sums, row_sums


@triton.jit
def _sinkhorn_step_backward(
    grad: tl.tensor,
    matrix: tl.tensor,
    column_sums: tl.tensor,
    row_sums: tl.tensor,
    valid: tl.tensor,
    active: tl.tensor,
) -> tuple:
    """Take `_sinkhorn_step` back: the gradient and the matrix before it."""
    keep = tl.where(active, 1.0, 0.0)
    grad = (grad - keep * total(grad * matrix, 1)[:, None, :]) / row_sums[:, None, :]
    matrix = matrix * row_sums[:, None, :]
    grad = (grad - keep * total(grad * matrix, 0)[None, :, :]) / column_sums[None, :, :]
    return tl.where(valid, grad, 0.0), matrix * column_sums[None, :, :]


@triton.jit
def sinkhorn_tile(
    logits: tl.tensor,
    valid: tl.tensor,
    iters: tl.tensor,
    eps: tl.tensor,
    HAS_EPS: tl.constexpr,
    FIRST_EPS: tl.constexpr,
) -> tl.tensor:
    """Project a tile of logits [out, in, tokens] onto the doubly stochastic matrices, rows last (Eq. 9).

    Of `eps`, what is added to the first sums, to the matrix and to later sums, kernels know at compile time whether
    there is any, and whether there is the first.
    """
    _, matrix, _ = _sinkhorn_start(logits, valid, eps, HAS_EPS, FIRST_EPS)
    for _ in range(iters - 1):
        matrix, _, _ = _sinkhorn_step(matrix, eps[2], True)
    return matrix


@triton.jit
def sinkhorn_tile_backward(
    grad: tl.tensor,
    logits: tl.tensor,
    valid: tl.tensor,
    iters: tl.tensor,
    eps: tl.tensor,
    HAS_EPS: tl.constexpr,
    FIRST_EPS: tl.constexpr,
) -> tl.tensor:
    """Differentiate `sinkhorn_tile` exactly, replaying the iterates in registers.

    Three iterations at a time, last ones first: their start is recomputed, their sums (not their matrices) are kept,
    and walking back multiplies by them. The padding of `grad` must be zero.
    """
    probabilities, first, first_sums = _sinkhorn_start(logits, valid, eps, HAS_EPS, FIRST_EPS)
    sums_eps = eps[2]
    rounds = iters - 1
    for segment in range((rounds + 2) // 3):
        end = rounds - 3 * segment
        begin = tl.maximum(end - 3, 0)
        matrix = first
        for _ in range(begin):
            matrix, _, _ = _sinkhorn_step(matrix, sums_eps, True)
        second, third = begin + 1 < end, begin + 2 < end
        matrix, columns_1, rows_1 = _sinkhorn_step(matrix, sums_eps, True)
        matrix, columns_2, rows_2 = _sinkhorn_step(matrix, sums_eps, second)
        matrix, columns_3, rows_3 = _sinkhorn_step(matrix, sums_eps, third)
        grad, matrix = _sinkhorn_step_backward(grad, matrix, columns_3, rows_3, valid, third)
        grad, matrix = _sinkhorn_step_backward(grad, matrix, columns_2, rows_2, valid, second)
        grad, matrix = _sinkhorn_step_backward(grad, matrix, columns_1, rows_1, valid, True)
    if HAS_EPS:
        grad = (grad - total(grad * first, 1)[:, None, :]) / first_sums[:, None, :]
        # An eps in the first sums leaves the derivative of a softmax, p(δ - p).
        grad = grad * probabilities
    else:
        grad = first * (grad - total(grad * first, 1)[:, None, :])
    return grad - probabilities * total(grad, 0)[None, :, :]
