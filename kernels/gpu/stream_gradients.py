"""Gradients of streams, phi, scale and bias, shared by `pre`, `head` and `post_pre`.

The backward of a site's coefficients has three steps, none with atomics: the gradients of the logits from partial
projections (`coefficient_gradients`); the gradients of the streams, in programs that own a block of C and walk over
tokens, so that each keeps its share of phi's gradient on chip; the sum of those shares over the splits of the tokens.
"""

# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficient_gradients import CoefficientGradients
from .coefficients import slot_rows
from .launch import Geometry, ceil_div, empty, launch, operand_size, product_options
from .primitives import materialize, product_exact_right, product_pair, rounded, total
from .stream_tiles import load_factors, load_other_factors, load_row, load_streams, mix


@dataclass(frozen=True)
class StreamGradientsConfig:
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


def stream_gradients_config(geometry: Geometry, operand_bytes: int) -> StreamGradientsConfig:
    """Choose blocks of C that keep phi's gradient in registers, and splits that fill the device.

    The number of splits depends on the shape alone, so that results do not depend on the device.
    """
    width = 16 if geometry.slots > 64 and operand_bytes == 4 else 32
    warps = 8 if geometry.slots > 64 or operand_bytes == 4 else 4
    blocks = geometry.n * ceil_div(geometry.width, width)
    return StreamGradientsConfig(32, width, warps, 1, token_splits(geometry.tokens, blocks, 32))


def token_splits(tokens: int, blocks: int, block_tokens: int) -> int:
    """Shares of the tokens that bring `blocks` programs to about 1024, each with a step or more to do."""
    return max(1, min(ceil_div(1024, blocks), ceil_div(tokens, block_tokens), 64))


@triton.jit(do_not_specialize=["tokens", "span"])
def stream_gradients_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    grad_fresh: tl.tensor,
    phi: tl.tensor,
    grad_input: tl.tensor,
    grad_products: tl.tensor,
    norm_factor: tl.tensor,
    read_weights: tl.tensor,
    grad_streams: tl.tensor,
    phi_parts: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    span: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    ANCHORED: tl.constexpr,
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

    With ANCHORED a difference's gradient is its stream's, which needs stream 0 as well, and the gradient of stream 0
    is the sum of the streams', which needs them all: 2(n - 1) blocks of the streams more for n programs, from L2, and
    n - 1 blocks of phi. phi's gradient is left in terms of the streams as stored.
    """
    stream = tl.program_id(0) % n
    column = (tl.program_id(0) // n) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (column < width)[None, :]
    row, used = slot_rows(n, N, Q, GROUPS)
    slot = tl.arange(0, Q * N)
    shown = used[:, None] & inside
    factors = load_factors(phi, row, column, shown, stream, n, width)
    if ANCHORED:
        factors += load_other_factors(phi, row, used, column, stream, n, width)
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
            values = materialize(rounded(mix(tiles, written, mixing, 0, n), streams.dtype.element_ty), PRECISION)
        else:
            values = tl.load(streams + offsets, mask=mask, other=0.0)
        grad_product = tl.load(grad_products + token[:, None] * (Q * N) + slot[None, :], mask=live[:, None], other=0.0)
        if STORE:
            grad = tl.load(grad_input + token[:, None] * width + column[None, :], mask=mask, other=0.0)
            weight = tl.load(read_weights + token * n + stream, mask=live, other=0.0)
            factor = tl.load(norm_factor + token, mask=live, other=0.0)
            direct = weight[:, None] * grad.to(tl.float32)
            through = values.to(tl.float32)
            if ANCHORED:
                through = tl.where(stream == 0, n, 1) * through
                # Stream 0's program takes all others, the others' take stream 0.
                for i in range(tl.where(stream == 0, 1, 0), tl.where(stream == 0, n, 1)):
                    if MIX:
                        mixing = load_row(post, res, token, live, i, n)
                        other = rounded(mix(tiles, written, mixing, 0, n), streams.dtype.element_ty)
                        other = materialize(other, PRECISION)
                    else:
                        place = streams + (token * n + i)[:, None] * width + column[None, :]
                        other = tl.load(place, mask=mask, other=0.0)
                    through += other.to(tl.float32)
            direct += factor[:, None] * through
            if MIX:
                direct += tl.load(grad_fresh + offsets, mask=mask, other=0.0).to(tl.float32)
            direct = product_pair(grad_product, factors, direct, grad_streams.dtype.element_ty, PRECISION)
            tl.store(grad_streams + offsets, rounded(direct, grad_streams.dtype.element_ty), mask=mask)
        grad_phi = product_exact_right(tl.trans(grad_product), values, grad_phi, PRECISION)
    part = tl.program_id(1).to(tl.int64) * (Q * N) + slot
    tl.store(
        phi_parts + part[:, None] * (n * width) + stream * width + column[None, :],
        grad_phi,
        mask=shown,
    )


@triton.jit(do_not_specialize=["splits", "programs"])
def parameter_gradients_kernel(
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
    ANCHORED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
) -> None:
    """Add up partial gradients in a fixed order: a row of phi a program, scale and bias in the last one.

    With ANCHORED the parts are of the streams as stored, X_k = Y_k + Y_0: stream 0's is added to the others'.
    """
    if tl.program_id(0) < GROUPS * n:
        row = tl.program_id(0)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < flat_width
        slot = (row // n) * N + row % n
        acc = tl.full([BLOCK], 0.0, tl.float32)
        if ANCHORED:
            first = tl.full([BLOCK], 0.0, tl.float32)
        for split in range(splits):
            part = (slot.to(tl.int64) + split * (Q * N)) * flat_width
            acc += tl.load(phi_parts + part + column, mask=mask, other=0.0)
            if ANCHORED:
                width = flat_width // n
                difference = mask & (column >= width)
                first += tl.load(phi_parts + part + column % width, mask=difference, other=0.0)
        if ANCHORED:
            acc += first
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


def stream_gradients(
    streams: Tensor,
    phi: Tensor,
    grad_input: Tensor,
    coefficient_grads: CoefficientGradients,
    geometry: Geometry,
    *,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
    grad_fresh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the streams and partial gradients of phi.

    Args:
        streams: [tokens, n, C].
        phi: [rows, n·C].
        grad_input: [tokens, C] gradient of the collapsed streams.
        coefficient_grads: of the site.
        geometry: of the call.
        mixing: (branch [tokens, C], post [tokens, n], res [tokens, n, n]) of a `post` that comes first: the streams
            are then those after it, made again in registers.
        grad_fresh: [tokens, n, C], with `mixing` the gradient of these streams from elsewhere, which theirs is added
            to; None leaves their gradient out.

    Returns:
        [tokens, n, C] gradient in the streams' dtype (the streams themselves where it was left out), and
        [splits, Q·N, n·C] partial gradients of phi in float32.
    """
    config = stream_gradients_config(geometry, operand_size(streams))
    span = ceil_div(ceil_div(geometry.tokens, config.splits), config.block_tokens) * config.block_tokens
    splits = ceil_div(geometry.tokens, span)
    store = mixing is None or grad_fresh is not None
    grad_streams = torch.empty_like(streams) if store else streams
    branch, post, res = mixing or (streams, coefficient_grads.grad_products, coefficient_grads.grad_products)
    phi_parts = empty(streams, splits, geometry.slots, geometry.n * geometry.width)
    launch(
        stream_gradients_kernel, (geometry.n * ceil_div(geometry.width, config.block_width), splits),
        streams, branch, post, res, streams if grad_fresh is None else grad_fresh, phi, grad_input,
        coefficient_grads.grad_products, coefficient_grads.norm_factor, coefficient_grads.read_weights,
        grad_streams, phi_parts,
        geometry.tokens, geometry.width, span,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, MIX=mixing is not None, STORE=store,
        num_warps=config.warps, num_stages=config.stages, **geometry.constants(), **product_options(),
    )  # fmt: skip
    return grad_streams, phi_parts


def parameter_gradients(
    phi_parts: Tensor,
    coefficient_grads: CoefficientGradients,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up partial gradients.

    Args:
        phi_parts: [splits, Q·N, n·C].
        coefficient_grads: of the site.
        phi: [rows, n·C].
        scale: [groups, at most 3].
        bias: [rows].
        geometry: of the call.

    Returns:
        gradients of phi, scale and bias, each with the shape and dtype of its tensor.
    """
    flat_width = geometry.n * geometry.width
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (phi, scale, bias)]
    launch(
        parameter_gradients_kernel, (geometry.rows + 1, ceil_div(flat_width, 1024)),
        phi_parts, coefficient_grads.bias_parts, coefficient_grads.scale_parts, *grads,
        flat_width, phi_parts.shape[0], coefficient_grads.bias_parts.shape[0],
        BLOCK=1024, BLOCK_PROGRAMS=16, num_warps=4, **geometry.constants(),
    )  # fmt: skip
    return grads[0], grads[1], grads[2]
