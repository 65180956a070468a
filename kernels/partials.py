"""Partial projections split over C: the first half of a split forward, and of every backward.

A program walks over a chunk of C for a tile of tokens and leaves Q·N + 1 floats a token (and n more in a
backward).
"""

# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import Geometry, ceil_div, empty, launch, operand_size, products, registers
from .project import project


@dataclass(frozen=True)
class PartialsConfig:
    """Launch configuration.

    Attributes:
        block_tokens: tokens of a tile, at least 16 to feed a matmul.
        block_width: channels of a step.
        warps: warps of a program.
        stages: loads in flight; 1 leaves them unpipelined.
        splits: programs over C.
        one_stream: a program takes the share of one stream, and there are n times as many.
        registers: most registers of a thread, or None for the compiler's choice.
    """

    block_tokens: int
    block_width: int
    warps: int
    stages: int
    splits: int
    one_stream: bool
    registers: int | None = None


def partials_config(geometry: Geometry, operand_bytes: int, crowded: bool) -> PartialsConfig:
    """Choose by shape: few tokens are spread over C, two steps a program; many fill the device as they are.

    Steps are half as wide where a mix or a backward (`crowded`) needs the registers as well. From 5 streams
    on, n tiles and n² coefficients a token do not fit at all: one stream a program.

    Anchored streams hold a tile of stream 0 and one of phi's sum more: half as many slots fit beside a wide step, and
    the widest coefficient tiles take twice the warps.
    """
    one_stream = geometry.n > 4
    width = (32 if crowded or geometry.slots > (16 if geometry.anchored else 32) else 64) * 2 // operand_bytes
    large = geometry.anchored and geometry.slots > 64
    roomy = operand_bytes == 4 or (geometry.anchored and (geometry.tokens <= 64 or geometry.n < 4))
    if geometry.tokens <= 64:
        return PartialsConfig(
            16,
            width,
            8 if crowded and large else 2 if crowded else 4,
            1,
            max(1, min(64, ceil_div(geometry.width, 2 * width))),
            one_stream,
            registers=255 if roomy else None,
        )
    warps = 8 if crowded and (operand_bytes == 4 or large) else 4
    return PartialsConfig(32, width, warps, 1, 1, one_stream, registers=255 if roomy else None)


def chunk_of(width: int, splits: int, block_width: int) -> int:
    """Channels of a program when C is split: a whole number of steps."""
    return ceil_div(ceil_div(width, splits), block_width) * block_width


@triton.jit(do_not_specialize=["tokens"])
def partials_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    fresh_streams: tl.tensor,
    grad_input: tl.tensor,
    phi: tl.tensor,
    sums: tl.tensor,
    squares: tl.tensor,
    gates: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    chunk: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ONE: tl.constexpr,
    MIX: tl.constexpr,
    STORE: tl.constexpr,
    GRADS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write sums [splits, tokens, Q·N], squares [splits, tokens] and gates [splits, tokens, n]."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    stream = tl.program_id(1) % n if ONE else 0
    begin = (tl.program_id(1) // n if ONE else tl.program_id(1)) * chunk
    end = tl.minimum(begin + chunk, width)
    summed, square, gate = project(
        streams, branch, post, res, fresh_streams, grad_input, phi, token, live, width, begin, end, stream,
        n, N, Q, GROUPS, ANCHORED, BLOCK_WIDTH, ONE, MIX, STORE, GRADS, PRECISION,
    )  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * tokens + token
    slot = tl.arange(0, Q * N)
    tl.store(sums + row[:, None] * (Q * N) + slot[None, :], summed, mask=live[:, None])
    tl.store(squares + row, square, mask=live)
    if GRADS:
        for i in tl.static_range(n):
            share = tl.where(stream == i, gate[0], 0.0) if ONE else gate[i]
            tl.store(gates + row * n + i, share, mask=live)


@triton.jit
def gather_partials(
    sums: tl.tensor,
    squares: tl.tensor,
    gates: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GRADS: tl.constexpr,
) -> tuple:
    """Add up the partials of a tile of tokens, in the order of the chunks.

    [tokens, Q·N], [tokens], [tokens, N].
    """
    slot = tl.arange(0, Q * N)
    stream = tl.arange(0, N)
    summed = tl.full([token.shape[0], Q * N], 0.0, tl.float32)
    square = tl.full([token.shape[0]], 0.0, tl.float32)
    gate = tl.full([token.shape[0], N], 0.0, tl.float32)
    for split in range(splits):
        row = token.to(tl.int64) + split * tokens
        summed += tl.load(sums + row[:, None] * (Q * N) + slot[None, :], mask=live[:, None], other=0.0)
        square += tl.load(squares + row, mask=live, other=0.0)
        if GRADS:
            mask = live[:, None] & (stream < n)[None, :]
            gate += tl.load(gates + row[:, None] * n + stream[None, :], mask=mask, other=0.0)
    return summed, square, gate


def project_partials(
    streams: Tensor,
    phi: Tensor,
    geometry: Geometry,
    *,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
    fresh_streams: Tensor | None = None,
    grad_input: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the partial projections of contiguous [tokens, n, C] streams.

    Args:
        streams: [tokens, n, C].
        phi: [rows, n·C].
        geometry: of the call.
        mixing: (branch, post, res) of a `post` that comes first; the projection is then of the streams after
            it.
        fresh_streams: where to write the streams after that `post`, or None to keep them in registers.
        grad_input: [tokens, C] gradient of the collapsed streams; adds its products with the streams.

    Returns:
        sums [splits, tokens, Q·N], squares [splits, tokens], gates [splits, tokens, n] (empty without
        `grad_input`).
    """
    config = partials_config(geometry, operand_size(streams), mixing is not None or grad_input is not None)
    chunk = chunk_of(geometry.width, config.splits, config.block_width)
    tokens = geometry.tokens
    splits = ceil_div(geometry.width, chunk) * (geometry.n if config.one_stream else 1)
    sums, squares = empty(streams, splits, tokens, geometry.slots), empty(streams, splits, tokens)
    gates = empty(streams, splits, tokens, geometry.n if grad_input is not None else 0)
    branch, post, res = mixing or (streams, sums, sums)
    launch(
        partials_kernel, (ceil_div(tokens, config.block_tokens), splits),
        streams, branch, post, res, streams if fresh_streams is None else fresh_streams,
        streams if grad_input is None else grad_input, phi,
        sums, squares, squares if grad_input is None else gates,
        tokens, geometry.width, chunk,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, ONE=config.one_stream,
        MIX=mixing is not None, STORE=fresh_streams is not None, GRADS=grad_input is not None,
        num_warps=config.warps, num_stages=config.stages,
        **registers(config.registers), **geometry.constants(), **products(),
    )  # fmt: skip
    return sums, squares, gates
