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

from .coefficient_gradients import coefficient_gradients
from .coefficients import activate, logits_tile, manifold_constants, store_coefficients
from .launch import Geometry, ceil_div, empty, launch, operand_size, product_options, register_limit
from .projection import chunk_width, partial_projections, partial_projections_config, project_by_phi, sum_partials
from .stream_gradients import parameter_gradients, stream_gradients
from .stream_tiles import collapse


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

    From 5 streams on the launch is split too, for the registers' sake: see `partial_projections_config`.
    """
    partials = partial_projections_config(geometry, operand_bytes, mixes)
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
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Project, make coefficients, collapse: one tile of tokens, one launch."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    sums, squares, _ = project_by_phi(
        streams, streams, streams, streams, streams, streams, phi, token, live, width, 0, width, 0,
        n, N, Q, GROUPS, ANCHORED, BLOCK_WIDTH, False, False, False, False, PRECISION,
    )  # fmt: skip
    logits, _, _, _ = logits_tile(sums, squares, scale, bias, width, norm_eps, n, N, Q, GROUPS)
    weights = activate(logits, iters, eps, n, N, Q, GROUPS, GATED, MATRIX, HAS_EPS, EXACT_ROWS, ANCHORED)
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
    MATRIX: tl.constexpr,
    HAS_EPS: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Add up the partial projections, make coefficients, collapse a chunk of C.

    Every program of a token repeats its Sinkhorn, which costs less than a third launch.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    summed, square, _ = sum_partials(sums, squares, sums, token, live, tokens, splits, n, N, Q, False)
    logits, _, _, _ = logits_tile(summed, square, scale, bias, width, norm_eps, n, N, Q, GROUPS)
    weights = activate(logits, iters, eps, n, N, Q, GROUPS, GATED, MATRIX, HAS_EPS, EXACT_ROWS, ANCHORED)
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
    constants: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `pre` (or, with one group, `head`) on contiguous streams.

    Args:
        streams: [tokens, n, C].
        phi: [rows, n·C].
        scale: [3], [2], or [1] for a head.
        bias: [rows].
        iters: Sinkhorn iterations.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        geometry: of the call.
        constants: as from `manifold_constants`.

    Returns:
        layer_input [tokens, C] in the streams' dtype; post [tokens, n] and res [tokens, n, n] in float32, which a head
        leaves as they are.
    """
    tokens, n, width = geometry.tokens, geometry.n, geometry.width
    layer_input = empty(streams, tokens, width, dtype=streams.dtype)
    post, res = empty(streams, tokens, n), empty(streams, tokens, n, n)
    if tokens == 0:
        return layer_input, post, res
    config = forward_config(geometry, operand_size(streams), mixes=False)
    common = {**geometry.constants(), **constants}
    if config.fused:
        launch(
            pre_forward_kernel, (ceil_div(tokens, config.block_tokens),),
            streams, phi, scale, bias, layer_input, post, res, tokens, width, iters, norm_eps, eps,
            BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width,
            num_warps=config.warps, num_stages=config.stages,
            **register_limit(config.registers), **common, **product_options(),
        )  # fmt: skip
        return layer_input, post, res
    sums, squares, _ = partial_projections(streams, phi, geometry)
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
    """Launch the second half of a forward that was split over C.

    Args:
        streams: [tokens, n, C].
        sums: [splits, tokens, Q·N], from `partial_projections`.
        squares: [splits, tokens], from `partial_projections`.
        scale: [3], [2], or [1] for a head.
        bias: [rows].
        layer_input: [tokens, C], to write.
        post: [tokens, n], to write; a head leaves it.
        res: [tokens, n, n], to write; a head leaves it.
        iters: Sinkhorn iterations.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        geometry: of the call.
        config: of the forward.
        common: compile-time constants of the geometry and the manifold.
    """
    chunk = chunk_width(geometry.width, config.chunks, config.block_width)
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
    """Compute a site's coefficients and its layer input; see `reference.pre`.

    Args:
        streams: [*, n, C].
        phi: [rows, n·C].
        scale: [3], or [2] for a manifold that does not mix.
        bias: [rows].
        iters: Sinkhorn iterations.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        manifold: a name of `MANIFOLDS` that the kernels cover.
        anchored: the streams are anchored, and so are the post and res that are returned.

    Returns:
        layer_input [*, C] in the streams' dtype, post [*, n] and res [*, n, n] in float32.
    """
    *leading, n, width = streams.shape
    geometry = geometry_of(streams, phi, anchored)
    layer_input, post, res = forward(
        streams.contiguous(), phi.contiguous(), scale.contiguous(), bias.contiguous(),
        iters, norm_eps, eps, geometry, manifold_constants(manifold, eps),
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
    """Return the gradients of `pre`.

    Args:
        grad_layer_input: [*, C].
        grad_post: [*, n].
        grad_res: [*, n, n].
        streams: [*, n, C], and the rest as in `pre`.
        phi: [rows, n·C].
        scale: [3], or [2] for a manifold that does not mix.
        bias: [rows].
        iters: as in `pre`.
        norm_eps: as in `pre`.
        eps: as in `pre`.
        manifold: as in `pre`.
        anchored: as in `pre`.

    Returns:
        gradients of streams [*, n, C], phi [rows, n·C], scale and bias, each in the dtype of its tensor.
    """
    return backward(
        grad_layer_input, grad_post, grad_res, streams, phi, scale, bias,
        iters, norm_eps, eps, manifold_constants(manifold, eps), anchored,
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
    constants: dict[str, Any],
    anchored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `pre` (or, with one group, `head`): partial projections, coefficients, streams, parameters.

    Takes `constants` as from `manifold_constants` and the rest as `pre_backward` does, which says the shapes. Of a head
    neither grad_post nor grad_res is read.
    """
    geometry = geometry_of(streams, phi, anchored)
    if geometry.tokens == 0:
        zeros = [torch.zeros_like(tensor) for tensor in (streams, phi, scale, bias)]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    streams, phi = streams.contiguous(), phi.contiguous()
    grad_layer_input = grad_layer_input.contiguous()
    sums, squares, grad_pre = partial_projections(streams, phi, geometry, grad_input=grad_layer_input)
    coefficient_grads = coefficient_gradients(
        sums, squares, grad_pre, grad_post.contiguous(), grad_res.contiguous(),
        scale.contiguous(), bias.contiguous(),
        iters, norm_eps, eps, geometry, constants,
    )  # fmt: skip
    grad_streams, grad_phi_parts = stream_gradients(streams, phi, grad_layer_input, coefficient_grads, geometry)
    return (grad_streams, *parameter_gradients(grad_phi_parts, coefficient_grads, phi, scale, bias, geometry))
