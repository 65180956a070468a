"""phi as products take it: in terms of the streams as stored, padded, float32 factors split.

It is read where it lies: rows first or columns first, rows of res in either order (see `orientation`).

Of anchored streams phi · X = (Σ_k phi_k) Y_0 + Σ_{k≥1} phi_k Y_k: stream 0 takes the sum of all columns. Where many
programs project, a launch of its own makes that once; few, and the backward, make it where they load it.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import Geometry, ceil_div
from .launch import empty, launch
from .primitives import split

_BLOCK = 128


@triton.jit
def stored_row(row: tl.tensor, n: tl.constexpr, TRANSPOSED: tl.constexpr) -> tl.tensor:
    """Return where a row of phi or bias lies: with TRANSPOSED that of `res[out, in]` as [in, out]."""
    if TRANSPOSED:
        entry = row - 2 * n
        row = tl.where(entry < 0, row, 2 * n + entry % n * n + entry // n)
    return row


@triton.jit
def phi_place(
    row: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    n: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> tl.tensor:
    """Return the offset of a row's entry among the n·C of phi."""
    row = stored_row(row, n, TRANSPOSED)
    if COLUMNS:
        return column * ROWS + row
    return row * (n * width) + column


@triton.jit
def load_phi(
    phi: tl.tensor,
    slot: tl.tensor,
    column: tl.tensor,
    stream: tl.constexpr,
    width: tl.tensor,
    n: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    PREPARED: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> tuple:
    """Load the factors of a block of one stream's channels: PIECES tiles of `slot`'s shape × `column`'s."""
    mask = (slot < ROWS) & (column < width)
    if PREPARED:
        place = phi + slot * (n * width) + column
        pieces = (tl.load(place + stream * width, mask=mask, other=0.0),)
        if PIECES == 2:
            pieces = pieces + (tl.load(place + stream * width + ROWS * n * width, mask=mask, other=0.0),)
        return pieces
    else:
        place = phi_place(slot, column + stream * width, width, n, ROWS, COLUMNS, TRANSPOSED)
        values = tl.load(phi + place, mask=mask, other=0.0).to(tl.float32)
        if ANCHORED and stream == 0:
            for other in tl.static_range(1, n):
                place = phi_place(slot, column + other * width, width, n, ROWS, COLUMNS, TRANSPOSED)
                values += tl.load(phi + place, mask=mask, other=0.0).to(tl.float32)
        return split(values, PIECES)


@triton.jit
def prepare_phi_kernel(
    phi: tl.tensor,
    prepared: tl.tensor,
    width: tl.tensor,
    n: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write a block of channels of all streams to prepared [PIECES, ROWS, n·C]."""
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    slot = tl.program_id(1) * 16 + tl.arange(0, 16)[:, None]
    for o in tl.static_range(n):
        pieces = load_phi(phi, slot, column, o, width, n, ROWS, ANCHORED, False, PIECES, COLUMNS, TRANSPOSED)
        place = prepared + slot * (n * width) + o * width + column
        for piece in tl.static_range(PIECES):
            tl.store(place + piece * ROWS * n * width, pieces[piece], mask=(column < width) & (slot < ROWS))


def prepare_phi(phi: Tensor, geometry: Geometry) -> Tensor:
    """Return phi as [pieces, rows, n·C], in the kernels' order; bfloat16 where there are two pieces."""
    dtype = torch.bfloat16 if geometry.pieces == 2 else torch.float32
    prepared = empty(phi, geometry.pieces, geometry.rows, geometry.n * geometry.width, dtype=dtype)
    launch(
        prepare_phi_kernel, (ceil_div(geometry.width, _BLOCK), ceil_div(geometry.rows, 16)),
        phi, prepared, geometry.width, PIECES=geometry.pieces, BLOCK=_BLOCK, num_warps=4,
        **geometry.constants(), **geometry.phi(),
    )  # fmt: skip
    return prepared
