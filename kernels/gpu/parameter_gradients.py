"""Gradients of phi, scale and bias, and of a norm's: partial sums added up in a fixed order, no atomics."""

# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import Geometry, ceil_div
from .launch import launch, register_limit
from .norm_gates import Norm
from .phi import phi_place, stored_row
from .primitives import rounded, total

# Channels of a program, and shares of the coefficients' sums that are added up at a time.
BLOCK, BLOCK_PROGRAMS = 1024, 16


@triton.jit
def parameter_gradients_block(
    row: tl.tensor,
    block: tl.tensor,
    phi_parts: tl.tensor,
    coefficient_parts: tl.tensor,
    norm_parts: tl.tensor,
    grad_phi: tl.tensor,
    grad_scale: tl.tensor,
    grad_bias: tl.tensor,
    grad_norm_weight: tl.tensor,
    grad_norm_bias: tl.tensor,
    width: tl.tensor,
    splits: tl.tensor,
    programs: tl.tensor,
    n: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
) -> None:
    """Add up a row of phi's gradient over a block of C of all streams; scale and bias, then a norm's, come last.

    With ANCHORED the parts are of the streams as stored, X_k = Y_k + Y_0: stream 0's is added to the others'.
    """
    if row < ROWS:
        column = block * BLOCK + tl.arange(0, BLOCK)
        mask = column < width
        first = tl.full([BLOCK], 0.0, tl.float32)
        for o in tl.static_range(n):
            place = row.to(tl.int64) * (n * width) + o * width + column
            part = phi_parts + place
            acc = tl.full([BLOCK], 0.0, tl.float32)
            for _ in range(splits):
                acc += tl.load(part, mask=mask, other=0.0)
                part += tl.cast(width, tl.int64) * (n * ROWS)
            if ANCHORED:
                if o == 0:
                    first = acc
                else:
                    acc += first
            place = phi_place(row, o * width + column, width, n, ROWS, COLUMNS, TRANSPOSED)
            tl.store(grad_phi + place, acc, mask=mask)
    elif row > ROWS:
        if NORM:
            column = block * BLOCK + tl.arange(0, BLOCK)
            mask = column < width
            weight_sum = tl.full([BLOCK], 0.0, tl.float32)
            bias_sum = tl.full([BLOCK], 0.0, tl.float32)
            part = norm_parts + column
            for _ in range(splits):
                weight_sum += tl.load(part, mask=mask, other=0.0)
                if CENTERED:
                    bias_sum += tl.load(part + width, mask=mask, other=0.0)
                part += 2 * tl.cast(width, tl.int64)
            tl.store(grad_norm_weight + column, rounded(weight_sum, grad_norm_weight.dtype.element_ty), mask=mask)
            tl.store(grad_norm_bias + column, rounded(bias_sum, grad_norm_bias.dtype.element_ty), mask=mask)
    elif block == 0:
        slot = tl.arange(0, SLOTS)
        used = slot < ROWS
        bias_sum = tl.full([SLOTS], 0.0, tl.float32)
        scale_sum = tl.full([SLOTS], 0.0, tl.float32)
        for start in range(0, programs, BLOCK_PROGRAMS):
            part = start + tl.arange(0, BLOCK_PROGRAMS)
            mask = (part < programs)[:, None] & used[None, :]
            place = coefficient_parts + part[:, None] * (2 * ROWS) + slot[None, :]
            bias_sum += total(tl.load(place, mask=mask, other=0.0), 0)
            scale_sum += total(tl.load(place + ROWS, mask=mask, other=0.0), 0)
        tl.store(grad_bias + stored_row(slot, n, TRANSPOSED), bias_sum, mask=used)
        tl.store(grad_scale, total(tl.where(slot < n, scale_sum, 0.0), 0))
        if n < ROWS:
            tl.store(grad_scale + 1, total(tl.where((slot >= n) & (slot < 2 * n), scale_sum, 0.0), 0))
        if 2 * n < ROWS:
            tl.store(grad_scale + 2, total(tl.where(slot >= 2 * n, scale_sum, 0.0), 0))


@triton.jit(do_not_specialize=["splits", "programs"])
def parameter_gradients_kernel(
    phi_parts: tl.tensor,
    coefficient_parts: tl.tensor,
    norm_parts: tl.tensor,
    grad_phi: tl.tensor,
    grad_scale: tl.tensor,
    grad_bias: tl.tensor,
    grad_norm_weight: tl.tensor,
    grad_norm_bias: tl.tensor,
    width: tl.tensor,
    splits: tl.tensor,
    programs: tl.tensor,
    n: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
) -> None:
    """Add up all partial gradients, a row of phi's and a block of C a program."""
    parameter_gradients_block(
        tl.program_id(0), tl.program_id(1), phi_parts, coefficient_parts, norm_parts, grad_phi, grad_scale, grad_bias,
        grad_norm_weight, grad_norm_bias, width, splits, programs, n, ROWS, ANCHORED, NORM, CENTERED, COLUMNS,
        TRANSPOSED, SLOTS, BLOCK, BLOCK_PROGRAMS,
    )  # fmt: skip


def parameter_gradients(
    phi_parts: Tensor,
    coefficient_parts: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    geometry: Geometry,
    norm: Norm | None = None,
    norm_parts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Add up partial gradients.

    Args:
        phi_parts: [splits, rows, n·C].
        coefficient_parts: [programs, 2, rows].
        phi: [rows, n·C], as the geometry's layout says.
        scale: [groups, at most 3].
        bias: [rows].
        geometry: of the call.
        norm: of the layer input, if it has one.
        norm_parts: [splits, 2, C], with a norm.

    Returns:
        gradients of phi, scale and bias, then of the norm's weight and bias, each with the shape and dtype of its
        tensor.
    """
    tensors = (phi, scale, bias, *(norm[:2] if norm else ()))
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    launch(
        parameter_gradients_kernel, (geometry.rows + (2 if norm else 1), ceil_div(geometry.width, BLOCK)),
        phi_parts, coefficient_parts, phi_parts if norm_parts is None else norm_parts, *grads,
        *(() if norm else grads[1:]), geometry.width, phi_parts.shape[0], coefficient_parts.shape[0],
        NORM=norm is not None, CENTERED=norm is not None and norm.centered,
        SLOTS=geometry.slots, BLOCK=BLOCK, BLOCK_PROGRAMS=BLOCK_PROGRAMS, num_warps=4,
        **register_limit(72 if geometry.layout.columns else 64), **geometry.constants(), **geometry.phi(),
    )  # fmt: skip
    return tuple(grads)
