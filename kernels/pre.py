"""`pre`: a site's coefficients and the collapse of its streams (arXiv 2512.24880, Eq. 5, 7, 8).

Many tokens: one launch, a tile of tokens per program, which projects, does Sinkhorn in registers and
collapses, reading its streams a second time (from L2 as far as they fit). Few tokens: two launches split over
C, joined by partial sums of Q·N + 1 floats a token. Both are the same device functions, and so is `head`, a
`pre` with one group.
"""

# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficients import activate, logits_tile, store_coefficients
from .launch import Geometry, ceil_div, empty, launch, operand_size, products, registers
from .mapping import reduce_mapping, stream_gradients
from .partials import chunk_of, gather_partials, partials_config, project_partials
from .project import collapse, project
from .slopes import coefficient_gradients

MANIFOLD_FLAGS: dict[str, dict[str, bool]] = {
    "sinkhorn": {"GATED": True, "SINKHORN": True},
    "identity": {"GATED": True, "SINKHORN": False},
    "none": {"GATED": False, "SINKHORN": False},
}


@dataclass(frozen=True)
class PreConfig:
    """Launch configuration of the forward.

    Attributes:
        fused: one launch; otherwise the partial projections and `pre_finish_kernel`.
        block_tokens: tokens of a program's tile; at least 16 where it feeds a matmul.
        block_width: channels of a step.
        warps: warps of a program.
        stages: loads in flight; 1 leaves them unpipelined.
        chunks: programs over C of the second launch.
        registers: most registers of a thread, or None for the compiler's choice.
    """

    fused: bool
    block_tokens: int
    block_width: int
    warps: int
    stages: int = 1
    chunks: int = 1
    registers: int | None = None


def forward_config(geometry: Geometry, operand_bytes: int, mixes: bool) -> PreConfig:
    """Choose by shape: at most 64 tokens are split over C, so that a decoding step fills the device.

    From 5 streams on the launch is split too, for the registers' sake: see `partials_config`.
    """
    partials = partials_config(geometry, operand_bytes, mixes)
    if geometry.tokens <= 64:
        return PreConfig(False, 4, 128, 4, chunks=ceil_div(geometry.width, 256))
    if partials.one_stream:
        return PreConfig(False, 4, 128, 4)
    return PreConfig(
        True,
        partials.block_tokens,
        partials.block_width,
        partials.warps,
        partials.stages,
        registers=partials.registers if geometry.anchored else None,
    )


@triton.jit(do_not_specialize=["tokens", "iters"])
def pre_forward_kernel(
    streams: tl.tensor,
    phi: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    layer_input: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    iters: tl.tensor,
    norm_eps: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    GATED: tl.constexpr,
    SINKHORN: tl.constexpr,
    HAS_EPS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Project, make coefficients, collapse: one tile of tokens, one launch."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    sums, squares, _ = project(
        streams, streams, streams, streams, streams, streams, phi, token, live, width, 0, width, 0,
        n, N, Q, GROUPS, ANCHORED, BLOCK_WIDTH, False, False, False, False, PRECISION,
    )  # fmt: skip
    logits, _, _, _ = logits_tile(sums, squares, scale, bias, width, norm_eps, n, N, Q, GROUPS)
    weights = activate(logits, iters, eps, n, N, Q, GROUPS, GATED, SINKHORN, HAS_EPS, ANCHORED)
    if GROUPS > 1:
        store_coefficients(weights, post, res, token, live, n, N, Q)
    collapse(streams, weights, layer_input, token, live, width, 0, width, n, N, Q, BLOCK_WIDTH)


@triton.jit(do_not_specialize=["tokens", "iters", "splits"])
def pre_finish_kernel(
    streams: tl.tensor,
    sums: tl.tensor,
    squares: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    layer_input: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    iters: tl.tensor,
    norm_eps: tl.tensor,
    eps: tl.tensor,
    splits: tl.tensor,
    chunk: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    GATED: tl.constexpr,
    SINKHORN: tl.constexpr,
    HAS_EPS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Add up the partial projections, make coefficients, collapse a chunk of C.

    Every program of a token repeats its Sinkhorn, which costs less than a third launch.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    summed, square, _ = gather_partials(sums, squares, sums, token, live, tokens, splits, n, N, Q, False)
    logits, _, _, _ = logits_tile(summed, square, scale, bias, width, norm_eps, n, N, Q, GROUPS)
    weights = activate(logits, iters, eps, n, N, Q, GROUPS, GATED, SINKHORN, HAS_EPS, ANCHORED)
    if GROUPS > 1:
        store_coefficients(weights, post, res, token, token < tl.where(tl.program_id(1) == 0, tokens, 0), n, N, Q)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, width)
    collapse(streams, weights, layer_input, token, live, width, begin, end, n, N, Q, BLOCK_WIDTH)


def forward(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    geometry: Geometry,
    flags: dict[str, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `pre` (or, with one group, `head`) on contiguous [tokens, n, C] streams."""
    tokens, n, width = geometry.tokens, geometry.n, geometry.width
    layer_input = empty(streams, tokens, width, dtype=streams.dtype)
    post, res = empty(streams, tokens, n), empty(streams, tokens, n, n)
    if tokens == 0:
        return layer_input, post, res
    config = forward_config(geometry, operand_size(streams), mixes=False)
    common: dict[str, Any] = {**geometry.constants(), **flags, "HAS_EPS": eps != 0.0}
    if config.fused:
        launch(
            pre_forward_kernel, (ceil_div(tokens, config.block_tokens),),
            streams, phi, scale, bias, layer_input, post, res, tokens, width, iters, norm_eps, eps,
            BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width,
            num_warps=config.warps, num_stages=config.stages, **registers(config.registers), **common, **products(),
        )  # fmt: skip
        return layer_input, post, res
    sums, squares, _ = project_partials(streams, phi, geometry)
    finish(
        streams,
        sums,
        squares,
        scale,
        bias,
        layer_input,
        post,
        res,
        iters,
        norm_eps,
        eps,
        geometry,
        config,
        common,
    )
    return layer_input, post, res


def finish(
    streams: Tensor,
    sums: Tensor,
    squares: Tensor,
    scale: Tensor,
    bias: Tensor,
    layer_input: Tensor,
    post: Tensor,
    res: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    geometry: Geometry,
    config: PreConfig,
    common: dict[str, Any],
) -> None:
    """Launch the second half of a forward that was split over C."""
    chunk = chunk_of(geometry.width, config.chunks, config.block_width)
    launch(
        pre_finish_kernel, (ceil_div(geometry.tokens, config.block_tokens), ceil_div(geometry.width, chunk)),
        streams, sums, squares, scale, bias, layer_input, post, res,
        geometry.tokens, geometry.width, iters, norm_eps, eps, sums.shape[0], chunk,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, num_warps=config.warps, **common,
    )  # fmt: skip


def pre(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute layer_input [*, C], post [*, n] and res [*, n, n]; see `reference.pre`."""
    *leading, n, width = streams.shape
    geometry = geometry_of(streams, phi, anchored)
    layer_input, post, res = forward(
        streams.contiguous(), phi.contiguous(), scale.contiguous(), bias.contiguous(),
        iters, norm_eps, eps, geometry, MANIFOLD_FLAGS[manifold],
    )  # fmt: skip
    return layer_input.view(*leading, width), post.view(*leading, n), res.view(*leading, n, n)


def geometry_of(streams: Tensor, phi: Tensor, anchored: bool) -> Geometry:
    """Return the geometry of [*, n, C] streams and their phi."""
    n, width = streams.shape[-2:]
    return Geometry(streams.shape[:-2].numel(), n, width, phi.shape[0] // n, anchored)


def pre_backward(
    grad_layer_input: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `pre` with respect to streams, phi, scale and bias."""
    return backward(
        grad_layer_input, grad_post, grad_res, streams, phi, scale, bias,
        iters, norm_eps, eps, MANIFOLD_FLAGS[manifold], anchored,
    )  # fmt: skip


def backward(
    grad_layer_input: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    flags: dict[str, bool],
    anchored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `pre` (or, with one group, `head`).

    Partial projections, coefficients, streams, mapping.
    """
    geometry = geometry_of(streams, phi, anchored)
    if geometry.tokens == 0:
        zeros = [torch.zeros_like(tensor) for tensor in (streams, phi, scale, bias)]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    streams, phi = streams.contiguous(), phi.contiguous()
    grad_layer_input = grad_layer_input.contiguous()
    sums, squares, gates = project_partials(streams, phi, geometry, grad_input=grad_layer_input)
    slopes = coefficient_gradients(
        sums, squares, gates, grad_post.contiguous(), grad_res.contiguous(),
        scale.contiguous(), bias.contiguous(),
        iters, norm_eps, eps, geometry, flags,
    )  # fmt: skip
    grad_streams, grad_phi_parts = stream_gradients(streams, phi, grad_layer_input, slopes, geometry)
    return (grad_streams, *reduce_mapping(grad_phi_parts, slopes, phi, scale, bias, geometry))
