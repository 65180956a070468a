"""The projection of streams by phi: the device function that accumulates it, and partial projections.

Partial projections are split over C: the first half of a split forward, and of every backward. A program walks over
a chunk of C for a tile of tokens and leaves Q·N + 1 floats a token (and n more in a backward).
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803, RUF005

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .coefficients import slot_rows
from .launch import Geometry, ceil_div, empty, launch, operand_size, product_options, register_limit
from .primitives import materialize, product_exact_left, rounded, total
from .stream_tiles import first_from_last, load_factors, load_mixing, load_other_factors, load_row, load_streams, mix


@dataclass(frozen=True)
class PartialProjectionsConfig:
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


def partial_projections_config(geometry: Geometry, operand_bytes: int, crowded: bool) -> PartialProjectionsConfig:
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
        return PartialProjectionsConfig(
            16,
            width,
            8 if crowded and large else 2 if crowded else 4,
            1,
            max(1, min(64, ceil_div(geometry.width, 2 * width))),
            one_stream,
            registers=255 if roomy else None,
        )
    warps = 8 if crowded and (operand_bytes == 4 or large) else 4
    return PartialProjectionsConfig(32, width, warps, 1, 1, one_stream, registers=255 if roomy else None)


def chunk_width(width: int, splits: int, block_width: int) -> int:
    """Channels of a program when C is split: a whole number of steps."""
    return ceil_div(ceil_div(width, splits), block_width) * block_width


@triton.jit
def project_by_phi(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    fresh_streams: tl.tensor,
    grad_input: tl.tensor,
    phi: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    width: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    stream: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    ONE: tl.constexpr,
    MIX: tl.constexpr,
    STORE: tl.constexpr,
    GRADS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple:
    """Accumulate over channels begin … end what a site's coefficients, or their gradients, need.

    With MIX the streams are those after a `post`, made in registers and rounded to the streams' dtype as they
    are stored (otherwise forward and backward would see different streams); with STORE they are written out.
    With ONE, only the share of `stream` is accumulated.

    With ANCHORED the streams are stream 0 and differences from it. Squares are of the streams they stand for, in
    float32. Products are with the tiles as stored, Σ_k phi_k X_k = (Σ_k phi_k) Y_0 + Σ_{k≥1} phi_k Y_k: the streams
    themselves would not be exact in bfloat16. Gates are of the tiles as stored, too.

    Returns:
        products [tokens, Q·N] of the streams with phi, their sums of squares [tokens], and with GRADS a tuple
        of the products [tokens] of each stream with the gradient of the collapsed streams.
    """
    row, used = slot_rows(n, N, Q, GROUPS)
    base = token.to(tl.int64) * width
    products = tl.full([token.shape[0], Q * N], 0.0, tl.float32)
    squares = tl.full([token.shape[0]], 0.0, tl.float32)
    grad_pre = ()
    for _ in tl.static_range((1 if ONE else n) if GRADS else 0):
        grad_pre = grad_pre + (squares,)
    if MIX:
        weights = load_row(post, res, token, live, stream, n) if ONE else load_mixing(post, res, token, live, n)
        if ANCHORED:
            anchor_weights = load_row(post, res, token, live, 0, n) if ONE else weights
    # Of anchored streams the first comes last: its factor is the sum of all.
    first: tl.constexpr = 1 if ANCHORED and not ONE else 0
    for start in range(begin, end, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        mask = live[:, None] & (column < width)[None, :]
        if MIX:
            tiles = load_streams(streams, base, column, mask, n, width)
            written = tl.load(branch + base[:, None] + column[None, :], mask=mask, other=0.0)
        if GRADS:
            grad = tl.load(grad_input + base[:, None] + column[None, :], mask=mask, other=0.0)
        if ANCHORED:
            if MIX:
                anchor = rounded(mix(tiles, written, anchor_weights, 0, n), streams.dtype.element_ty)
                anchor = materialize(anchor, PRECISION)
            else:
                anchor = tl.load(streams + base[:, None] * n + column[None, :], mask=mask, other=0.0)
            summed = tl.full([Q * N, BLOCK_WIDTH], 0.0, tl.float32)
        sums = ()
        for step in tl.static_range(1 if ONE else n):
            o = stream if ONE else (first + step) % n
            offsets = base[:, None] * n + o * width + column[None, :]
            if first + step == n:
                fresh = anchor
            elif MIX:
                fresh = materialize(
                    rounded(mix(tiles, written, weights, (first + step) * (n + 1), n), streams.dtype.element_ty),
                    PRECISION,
                )
            else:
                fresh = tl.load(streams + offsets, mask=mask, other=0.0)
            if MIX and STORE:
                tl.store(fresh_streams + offsets, fresh, mask=mask)
            inside = used[:, None] & (column < width)[None, :]
            factors = load_factors(phi, row, column, inside, o, n, width)
            if ANCHORED and ONE:
                factors += load_other_factors(phi, row, used, column, stream, n, width)
            elif ANCHORED:
                factors = materialize(factors, PRECISION)
                summed += factors
                factors = summed if first + step == n else factors
            products = product_exact_left(fresh, tl.trans(factors), products, PRECISION)
            wide = fresh.to(tl.float32)
            released = wide
            if ANCHORED and ONE:
                released += tl.where(stream > 0, anchor.to(tl.float32), 0.0)
            elif ANCHORED and first + step < n:
                released += anchor.to(tl.float32)
            squares += total(released * released, 1)
            if GRADS:
                sums = sums + (grad_pre[step] + total(wide * grad.to(tl.float32), 1),)
        grad_pre = sums
    if GRADS and first == 1:
        grad_pre = first_from_last(grad_pre, n)
    return products, squares, grad_pre


@triton.jit(do_not_specialize=["tokens"])
def partial_projections_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    fresh_streams: tl.tensor,
    grad_input: tl.tensor,
    phi: tl.tensor,
    sums: tl.tensor,
    squares: tl.tensor,
    grad_pre: tl.tensor,
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
    """Write sums [splits, tokens, Q·N], squares [splits, tokens] and grad_pre [splits, tokens, n]."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    stream = tl.program_id(1) % n if ONE else 0
    begin = (tl.program_id(1) // n if ONE else tl.program_id(1)) * chunk
    end = tl.minimum(begin + chunk, width)
    summed, square, gate = project_by_phi(
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
            tl.store(grad_pre + row * n + i, share, mask=live)


@triton.jit
def sum_partials(
    sums: tl.tensor,
    squares: tl.tensor,
    grad_pre: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    tokens: tl.tensor,
    splits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GRADS: tl.constexpr,
) -> tuple:
    """Add up the partial projections of a tile of tokens, in the order of the chunks.

    Returns:
        sums [tokens, Q·N], squares [tokens] and, with GRADS, grad_pre [tokens, N] (otherwise zeros).
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
            gate += tl.load(grad_pre + row[:, None] * n + stream[None, :], mask=mask, other=0.0)
    return summed, square, gate


def partial_projections(
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
        mixing: (branch [tokens, C], post [tokens, n], res [tokens, n, n]) of a `post` that comes first; the
            projection is then of the streams after it.
        fresh_streams: [tokens, n, C], where to write the streams after that `post`, or None to keep them in registers.
        grad_input: [tokens, C] gradient of the collapsed streams; adds its products with the streams.

    Returns:
        sums [splits, tokens, Q·N], squares [splits, tokens], grad_pre [splits, tokens, n] (empty without
        `grad_input`).
    """
    config = partial_projections_config(geometry, operand_size(streams), mixing is not None or grad_input is not None)
    chunk = chunk_width(geometry.width, config.splits, config.block_width)
    tokens = geometry.tokens
    splits = ceil_div(geometry.width, chunk) * (geometry.n if config.one_stream else 1)
    sums, squares = empty(streams, splits, tokens, geometry.slots), empty(streams, splits, tokens)
    grad_pre = empty(streams, splits, tokens, geometry.n if grad_input is not None else 0)
    branch, post, res = mixing or (streams, sums, sums)
    launch(
        partial_projections_kernel, (ceil_div(tokens, config.block_tokens), splits),
        streams, branch, post, res, streams if fresh_streams is None else fresh_streams,
        streams if grad_input is None else grad_input, phi,
        sums, squares, squares if grad_input is None else grad_pre,
        tokens, geometry.width, chunk,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, ONE=config.one_stream,
        MIX=mixing is not None, STORE=fresh_streams is not None, GRADS=grad_input is not None,
        num_warps=config.warps, num_stages=config.stages,
        **register_limit(config.registers), **geometry.constants(), **product_options(),
    )  # fmt: skip
    return sums, squares, grad_pre
