"""The backward of a site's mapping, shared by `pre`, `head` and `post_pre`.

Three steps, none with atomics: the gradients of the logits from partial projections (Sinkhorn replayed in
registers); the gradients of the streams, in programs that own a block of C and walk over tokens, so that each
keeps its share of phi's gradient on chip; the sum of those shares over the splits of the tokens.
"""

# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import (
    logits_tile,
    matrix_slots,
    narrow,
    product_exact_right,
    product_pair,
    settle,
    sigmoid,
    sinkhorn_tile_backward,
    slot_rows,
    total,
)
from .launch import Geometry, ceil_div, empty, launch, operand_size, products
from .partials import gather_partials
from .project import load_row, load_streams, mix


class Slopes(NamedTuple):
    """What the coefficients' backward leaves for the streams and the mapping.

    Attributes:
        rows: [tokens, Q·N] gradient of the raw products, zero in the padding.
        pull: [tokens] factor of the streams themselves, through 1/RMS.
        weights: [tokens, n] pre.
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


@dataclass(frozen=True)
class StreamsConfig:
    """Launch configuration of the streams' gradients.

    Attributes:
        block_tokens: tokens of a step, at least 16: they are the inner dimension of phi's gradient.
        block_width: channels that a program owns.
        warps: warps of a program.
        stages: loads in flight.
        splits: shares of the tokens, each with partial sums of phi's gradient of its own.
    """

    block_tokens: int
    block_width: int
    warps: int
    stages: int
    splits: int


def slopes_config(geometry: Geometry) -> SlopesConfig:
    """Choose tiles of about 512 slots; Sinkhorn's replay takes twice the threads, for their registers."""
    return SlopesConfig(max(1, 512 // geometry.slots), 4 if geometry.groups <= 2 else 8, 512)


def streams_config(geometry: Geometry, operand_bytes: int) -> StreamsConfig:
    """Choose blocks of C that keep phi's gradient in registers, and splits that fill the device.

    The number of splits depends on the shape alone, so that results do not depend on the device.
    """
    width = 16 if geometry.slots > 64 and operand_bytes == 4 else 32
    warps = 8 if geometry.slots > 64 or operand_bytes == 4 else 4
    blocks = geometry.n * ceil_div(geometry.width, width)
    return StreamsConfig(32, width, warps, 1, token_splits(geometry.tokens, blocks, 32))


def token_splits(tokens: int, blocks: int, block_tokens: int) -> int:
    """Shares of the tokens that bring `blocks` programs to about 1024, each with a step or more to do."""
    return max(1, min(ceil_div(1024, blocks), ceil_div(tokens, block_tokens), 64))


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
        summed, square, gate = gather_partials(sums, squares, gates, token, live, tokens, splits, n, N, Q, True)
        logits, raw, inverse_rms, scales = logits_tile(summed, square, scale, bias, width, norm_eps, n, N, Q, GROUPS)
        grad = tl.where(q == 0, gate[:, None, :], 0.0)
        deep = token.to(tl.int64)[:, None, None]
        alive = live[:, None, None] & used
        if GROUPS > 1:
            grad += tl.load(grad_post + deep * n + j + 0 * q, mask=alive & (q == 1), other=0.0).to(tl.float32)
        if GROUPS > 2:
            place = grad_res + deep * (n * n) + (q - 2) * n + j
            grad += tl.load(place, mask=alive & (q >= 2), other=0.0).to(tl.float32)
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
        tl.store(pre + deep * n + j + 0 * q, weights, mask=live[:, None, None] & (q == 0) & (j < n))
        bias_sum += total(tl.reshape(grad, [BLOCK_TOKENS, Q * N]), 0)
        through = grad * raw * inverse_rms[:, None, None]
        scale_sum += total(tl.reshape(through, [BLOCK_TOKENS, Q * N]), 0)
    tl.store(bias_parts + tl.program_id(0) * (Q * N) + slot, bias_sum)
    tl.store(scale_parts + tl.program_id(0) * (Q * N) + slot, scale_sum)


@triton.jit(do_not_specialize=["tokens", "span"])
def streams_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    grad_fresh: tl.tensor,
    phi: tl.tensor,
    grad_input: tl.tensor,
    rows: tl.tensor,
    pull: tl.tensor,
    pre: tl.tensor,
    grad_streams: tl.tensor,
    phi_parts: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    span: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MIX: tl.constexpr,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Gradients of one stream's block of C over a share of the tokens, and that share's gradient of phi.

    With MIX the stream is the one after a `post`, made in registers, and its own gradient `grad_fresh` is
    added. Without STORE only phi's gradient is wanted. The n programs of a block run side by side and share
    loads in L2.
    """
    stream = tl.program_id(0) % n
    column = (tl.program_id(0) // n) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (column < width)[None, :]
    row, used = slot_rows(n, N, Q, GROUPS)
    slot = tl.arange(0, Q * N)
    factors = tl.load(
        phi + row[:, None] * (n * width) + stream * width + column[None, :],
        mask=used[:, None] & inside,
        other=0.0,
    ).to(tl.float32)
    grad_phi = tl.full([Q * N, BLOCK_WIDTH], 0.0, tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        live = token < tokens
        token = token.to(tl.int64)
        mask = live[:, None] & inside
        offsets = (token * n + stream)[:, None] * width + column[None, :]
        if MIX:
            tiles = load_streams(streams, token * width, column, mask, n, width)
            written = tl.load(branch + token[:, None] * width + column[None, :], mask=mask, other=0.0)
            mixing = load_row(post, res, token, live, stream, n)
            values = settle(narrow(mix(tiles, written, mixing, 0, n), streams.dtype.element_ty), PRECISION)
        else:
            values = tl.load(streams + offsets, mask=mask, other=0.0)
        slopes = tl.load(rows + token[:, None] * (Q * N) + slot[None, :], mask=live[:, None], other=0.0)
        if STORE:
            grad = tl.load(grad_input + token[:, None] * width + column[None, :], mask=mask, other=0.0)
            weight = tl.load(pre + token * n + stream, mask=live, other=0.0)
            factor = tl.load(pull + token, mask=live, other=0.0)
            direct = weight[:, None] * grad.to(tl.float32) + factor[:, None] * values.to(tl.float32)
            if MIX:
                direct += tl.load(grad_fresh + offsets, mask=mask, other=0.0).to(tl.float32)
            direct = product_pair(slopes, factors, direct, grad_streams.dtype.element_ty, PRECISION)
            tl.store(grad_streams + offsets, narrow(direct, grad_streams.dtype.element_ty), mask=mask)
        grad_phi = product_exact_right(tl.trans(slopes), values, grad_phi, PRECISION)
    part = tl.program_id(1).to(tl.int64) * (Q * N) + slot
    tl.store(
        phi_parts + part[:, None] * (n * width) + stream * width + column[None, :],
        grad_phi,
        mask=used[:, None] & inside,
    )


@triton.jit(do_not_specialize=["splits", "programs"])
def reduce_kernel(
    phi_parts: tl.tensor,
    bias_parts: tl.tensor,
    scale_parts: tl.tensor,
    grad_phi: tl.tensor,
    grad_scale: tl.tensor,
    grad_bias: tl.tensor,
    flat_width: tl.tensor,
    splits: tl.tensor,
    programs: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
) -> None:
    """Add up partial gradients in a fixed order: a row of phi a program, scale and bias in the last one."""
    if tl.program_id(0) < GROUPS * n:
        row = tl.program_id(0)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < flat_width
        slot = (row // n) * N + row % n
        acc = tl.full([BLOCK], 0.0, tl.float32)
        for split in range(splits):
            part = (slot.to(tl.int64) + split * (Q * N)) * flat_width
            acc += tl.load(phi_parts + part + column, mask=mask, other=0.0)
        tl.store(grad_phi + row * flat_width + column, acc, mask=mask)
    elif tl.program_id(1) == 0:
        row, used = slot_rows(n, N, Q, GROUPS)
        slot = tl.arange(0, Q * N)
        bias_sum = tl.full([Q * N], 0.0, tl.float32)
        scale_sum = tl.full([Q * N], 0.0, tl.float32)
        for start in range(0, programs, BLOCK_PROGRAMS):
            part = start + tl.arange(0, BLOCK_PROGRAMS)
            mask = (part < programs)[:, None] & used[None, :]
            offsets = part[:, None] * (Q * N) + slot[None, :]
            bias_sum += total(tl.load(bias_parts + offsets, mask=mask, other=0.0), 0)
            scale_sum += total(tl.load(scale_parts + offsets, mask=mask, other=0.0), 0)
        tl.store(grad_bias + row, bias_sum, mask=used)
        group = slot // N
        tl.store(grad_scale, total(tl.where(group == 0, scale_sum, 0.0), 0))
        if GROUPS > 1:
            tl.store(grad_scale + 1, total(tl.where(group == 1, scale_sum, 0.0), 0))
        if GROUPS > 2:
            tl.store(grad_scale + 2, total(tl.where(group >= 2, scale_sum, 0.0), 0))


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


def stream_gradients(
    streams: Tensor,
    phi: Tensor,
    grad_input: Tensor,
    slopes: Slopes,
    geometry: Geometry,
    *,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
    grad_fresh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of [tokens, n, C] streams and partial gradients of phi [splits, Q·N, n·C].

    With `mixing`, the (branch, post, res) of a `post` that comes first, the streams are those after it, made
    again in registers; their gradient is returned only if `grad_fresh`, their gradient from elsewhere, is
    given.
    """
    config = streams_config(geometry, operand_size(streams))
    span = ceil_div(ceil_div(geometry.tokens, config.splits), config.block_tokens) * config.block_tokens
    splits = ceil_div(geometry.tokens, span)
    store = mixing is None or grad_fresh is not None
    grad_streams = torch.empty_like(streams) if store else streams
    branch, post, res = mixing or (streams, slopes.rows, slopes.rows)
    phi_parts = empty(streams, splits, geometry.slots, geometry.n * geometry.width)
    launch(
        streams_kernel, (geometry.n * ceil_div(geometry.width, config.block_width), splits),
        streams, branch, post, res, streams if grad_fresh is None else grad_fresh, phi, grad_input,
        slopes.rows, slopes.pull, slopes.weights, grad_streams, phi_parts,
        geometry.tokens, geometry.width, span,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, MIX=mixing is not None, STORE=store,
        num_warps=config.warps, num_stages=config.stages, **geometry.constants(), **products(),
    )  # fmt: skip
    return grad_streams, phi_parts


def reduce_mapping(
    phi_parts: Tensor, slopes: Slopes, phi: Tensor, scale: Tensor, bias: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the partial gradients of phi, scale and bias."""
    flat_width = geometry.n * geometry.width
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (phi, scale, bias)]
    launch(
        reduce_kernel, (geometry.rows + 1, ceil_div(flat_width, 1024)),
        phi_parts, slopes.bias_parts, slopes.scale_parts, *grads,
        flat_width, phi_parts.shape[0], slopes.bias_parts.shape[0],
        BLOCK=1024, BLOCK_PROGRAMS=16, num_warps=4, **geometry.constants(),
    )  # fmt: skip
    return grads[0], grads[1], grads[2]
