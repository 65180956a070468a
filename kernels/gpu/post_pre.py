"""`post_pre`: one site's `post` and the next site's `pre` (arXiv 2512.24880, Eq. 3, then 5, 7, 8).

Forward, many tokens: one launch. A program makes the new streams of a tile of tokens in registers, writes
them once, projects them from registers, and collapses them on a second walk, last channels first, to find as
many as it can in L2. Collapsing needs coefficients that need the whole row, and rows are wider than the
registers: what has left L2 (a tile of 32 tokens at n = 4, C = 4096 is 1 MB, for every program in flight) is
read from device memory again, (3n + 2)C at worst where (2n + 2)C is the least. Few tokens, or 5 streams and
more: two launches, split over C and over the streams. The projection reads the new streams as rounded to
their dtype: unrounded ones would drift from what the next kernel sees.

Backward: the new streams are made again in registers and never read. One walk over C gives the coefficients'
gradients; a second all gradients of a tile; a third phi's, in programs that own a block of C and walk over
the tokens: (5n + 6)C where (3n + 3)C is the least. Sums over C and over the tokens leave as partials and are
added in a fixed order; those of post and res, n² + n floats a token and block of 16 channels, written and read,
come to 5C more at n = 4 in bfloat16. Blocks of 32 would halve that, but spill on sm_80 and halve the programs that
fit an sm_90: which is faster, a device has to say. From 5 streams on, n streams and n gradients no longer fit the
registers: there the gradient of the new streams is written once, for `post`'s backward to read.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803, RUF005

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficient_gradients import CoefficientGradients, coefficient_gradients
from .coefficients import activate, logits_tile, manifold_constants, slot_rows, store_coefficients
from .launch import Geometry, ceil_div, empty, launch, operand_size, product_options, register_limit
from .post import post_backward
from .pre import finish, forward_config, geometry_of
from .primitives import materialize, product_pair, rounded, total
from .projection import partial_projections, project_by_phi
from .stream_gradients import parameter_gradients, stream_gradients
from .stream_tiles import (
    collapse,
    first_from_last,
    load_factors,
    load_mixing,
    load_row,
    load_streams,
    mix,
    store_mix_backward,
)


@dataclass(frozen=True)
class PostPreGradConfig:
    """Launch configuration of the streams' gradients: tokens and channels of a tile, warps."""

    block_tokens: int
    block_width: int
    warps: int


def backward_config(geometry: Geometry, operand_bytes: int) -> PostPreGradConfig | None:
    """Choose a tile whose n streams and n gradients fit the registers; None from 5 streams on, where none does."""
    if geometry.n > 4:
        return None
    return PostPreGradConfig(64, 16, 4) if operand_bytes == 2 else PostPreGradConfig(32, 16, 4)


@triton.jit(do_not_specialize=["tokens", "iters"])
def post_pre_forward_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    phi: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    fresh_streams: tl.tensor,
    layer_input: tl.tensor,
    next_post: tl.tensor,
    next_res: tl.tensor,
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
    """Mix, write, project, make coefficients, collapse: one tile of tokens, one launch."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    sums, squares, _ = project_by_phi(
        streams, branch, post, res, fresh_streams, streams, phi, token, live, width, 0, width, 0,
        n, N, Q, GROUPS, ANCHORED, BLOCK_WIDTH, False, True, True, False, PRECISION,
    )  # fmt: skip
    logits, _, _, _ = logits_tile(sums, squares, scale, bias, width, norm_eps, n, N, Q, GROUPS)
    weights = activate(logits, iters, eps, n, N, Q, GROUPS, GATED, MATRIX, HAS_EPS, EXACT_ROWS, ANCHORED)
    store_coefficients(weights, next_post, next_res, token, live, n, N, Q)
    # A thread may collapse what another has written.
    tl.debug_barrier()
    collapse(fresh_streams, weights, layer_input, token, live, width, 0, width, n, N, Q, BLOCK_WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def post_pre_backward_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    phi: tl.tensor,
    grad_fresh: tl.tensor,
    grad_input: tl.tensor,
    grad_products: tl.tensor,
    norm_factor: tl.tensor,
    read_weights: tl.tensor,
    grad_streams: tl.tensor,
    grad_branch: tl.tensor,
    mixing_parts: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Gradients of a block of C of all streams and of the branch, and its share of those of post and res."""
    blocks = (width + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    block = tl.program_id(0) % blocks
    column = block * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (column < width)[None, :]
    row, used = slot_rows(n, N, Q, GROUPS)
    slot = tl.arange(0, Q * N)
    token = (tl.program_id(0) // blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    token = token.to(tl.int64)
    mask = live[:, None] & inside
    base = token * width
    offsets = base[:, None] + column[None, :]
    tiles = load_streams(streams, base, column, mask, n, width)
    written = tl.load(branch + offsets, mask=mask, other=0.0)
    grad = tl.load(grad_input + offsets, mask=mask, other=0.0)
    factor = tl.load(norm_factor + token, mask=live, other=0.0)
    grad_product = tl.load(grad_products + token[:, None] * (Q * N) + slot[None, :], mask=live[:, None], other=0.0)
    parts = mixing_parts + (block * (n * (n + 1))).to(tl.int64) * tokens + token
    grads = ()
    if ANCHORED:
        weights = load_row(post, res, token, live, 0, n)
        anchor = materialize(rounded(mix(tiles, written, weights, 0, n), streams.dtype.element_ty), PRECISION)
        added = n * anchor.to(tl.float32)
        summed = tl.full([Q * N, BLOCK_WIDTH], 0.0, tl.float32)
    for step in tl.static_range(n):
        # Stream 0 comes last: its gradient takes a share of every stream's.
        o = (step + 1) % n if ANCHORED else step
        if not (ANCHORED and step == n - 1):
            weights = load_row(post, res, token, live, o, n)
            fresh = materialize(rounded(mix(tiles, written, weights, 0, n), streams.dtype.element_ty), PRECISION)
        weight = tl.load(read_weights + token * n + o, mask=live, other=0.0)
        outer = tl.load(grad_fresh + base[:, None] * n + o * width + column[None, :], mask=mask, other=0.0)
        outer = outer.to(tl.float32) + weight[:, None] * grad.to(tl.float32)
        if ANCHORED and step == n - 1:
            through = added
        else:
            through = fresh.to(tl.float32)
            if ANCHORED:
                added += through
                through += anchor.to(tl.float32)
        outer += factor[:, None] * through
        factors = load_factors(phi, row, column, used[:, None] & inside, o, n, width)
        if ANCHORED:
            factors = materialize(factors, PRECISION)
            summed += factors
            factors = summed if step == n - 1 else factors
        outer = product_pair(grad_product, factors, outer, streams.dtype.element_ty, PRECISION)
        for i in tl.static_range(n):
            tl.store(parts + (o * (n + 1) + i) * tokens, total(outer * tiles[i].to(tl.float32), 1), mask=live)
        tl.store(parts + (o * (n + 1) + n) * tokens, total(outer * written.to(tl.float32), 1), mask=live)
        grads = grads + (outer,)
    if ANCHORED:
        grads = first_from_last(grads, n)
    # Loaded again: held over the matmuls, n² + n coefficients a token would crowd the registers.
    weights = load_mixing(post, res, token, live, n)
    store_mix_backward(grads, weights, grad_streams, grad_branch, base, column, mask, n, width)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def mixing_gradients_kernel(
    mixing_parts: tl.tensor,
    grad_post: tl.tensor,
    grad_res: tl.tensor,
    tokens: tl.tensor,
    blocks: tl.tensor,
    n: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Add up one coefficient's gradient over the blocks of C, in their order."""
    entry = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    token = token.to(tl.int64)
    acc = tl.full([BLOCK_TOKENS], 0.0, tl.float32)
    for block in range(blocks):
        acc += tl.load(
            mixing_parts + token + (block * (n * (n + 1)) + entry) * tokens.to(tl.int64), mask=live, other=0.0
        )
    o = entry // (n + 1)
    i = entry % (n + 1)
    if i == n:
        tl.store(grad_post + token * n + o, rounded(acc, grad_post.dtype.element_ty), mask=live)
    else:
        tl.store(grad_res + token * (n * n) + o * n + i, rounded(acc, grad_res.dtype.element_ty), mask=live)


def post_pre(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a site's `post` and the next site's `pre`; see `boundary.post_pre`.

    Args:
        streams: [*, n, C].
        branch: [*, C].
        post: [*, n] of the site.
        res: [*, n, n] of the site.
        phi: [rows, n·C] of the next site.
        scale: [3], or [2] for a manifold that does not mix, of the next site.
        bias: [rows] of the next site.
        iters: Sinkhorn iterations.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        manifold: a name of `MANIFOLDS` that the kernels cover.
        anchored: the streams given are anchored, and so is all that is returned.

    Returns:
        the new streams [*, n, C] and layer_input [*, C] in the streams' dtype; post [*, n] and res [*, n, n] of the
        next site in float32.
    """
    *leading, n, width = streams.shape
    geometry = geometry_of(streams, phi, anchored)
    tokens = geometry.tokens
    fresh = torch.empty_like(streams, memory_format=torch.contiguous_format)
    layer_input = empty(streams, *leading, width, dtype=streams.dtype)
    next_post, next_res = empty(streams, *leading, n), empty(streams, *leading, n, n)
    outputs = (fresh, layer_input, next_post, next_res)
    if tokens == 0:
        return outputs
    streams, branch, post, res, phi, scale, bias = (
        tensor.contiguous() for tensor in (streams, branch, post, res, phi, scale, bias)
    )
    config = forward_config(geometry, operand_size(streams), mixes=True)
    common = {**geometry.constants(), **manifold_constants(manifold, eps)}
    if config.fused:
        launch(
            post_pre_forward_kernel, (ceil_div(tokens, config.block_tokens),),
            streams, branch, post, res, phi, scale, bias, *outputs, tokens, width, iters, norm_eps, eps,
            BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width,
            num_warps=config.warps, num_stages=config.stages,
            **register_limit(config.registers), **common, **product_options(),
        )  # fmt: skip
        return outputs
    sums, squares, _ = partial_projections(streams, phi, geometry, mixing=(branch, post, res), fresh_streams=fresh)
    finish(
        fresh, sums, squares, scale, bias, layer_input, next_post, next_res,
        iters, norm_eps, eps, geometry, config, common,
    )  # fmt: skip
    return outputs


def post_pre_backward(
    grad_fresh: Tensor,
    grad_layer_input: Tensor,
    grad_next_post: Tensor,
    grad_next_res: Tensor,
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
) -> tuple[Tensor, ...]:
    """Return the gradients of `post_pre`.

    Args:
        grad_fresh: [*, n, C], of the new streams.
        grad_layer_input: [*, C].
        grad_next_post: [*, n].
        grad_next_res: [*, n, n].
        streams: [*, n, C], and the rest as in `post_pre`.
        branch: [*, C].
        post: [*, n].
        res: [*, n, n].
        phi: [rows, n·C].
        scale: [3], or [2] for a manifold that does not mix.
        bias: [rows].
        iters: as in `post_pre`.
        norm_eps: as in `post_pre`.
        eps: as in `post_pre`.
        manifold: as in `post_pre`.
        anchored: as in `post_pre`.

    Returns:
        the gradients of its seven tensors, each with the shape and dtype of its tensor.
    """
    inputs = (streams, branch, post, res, phi, scale, bias)
    geometry = geometry_of(streams, phi, anchored)
    if geometry.tokens == 0:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    streams, branch, post, res, phi, scale, bias = (tensor.contiguous() for tensor in inputs)
    grad_layer_input = grad_layer_input.contiguous()
    sums, squares, grad_pre = partial_projections(
        streams, phi, geometry, mixing=(branch, post, res), grad_input=grad_layer_input
    )
    coefficient_grads = coefficient_gradients(
        sums, squares, grad_pre, grad_next_post.contiguous(), grad_next_res.contiguous(), scale, bias,
        iters, norm_eps, eps, geometry, manifold_constants(manifold, eps),
    )  # fmt: skip
    mixing = (branch, post, res)
    config = backward_config(geometry, operand_size(streams))
    if config is None:
        grad_fresh, phi_parts = stream_gradients(
            streams,
            phi,
            grad_layer_input,
            coefficient_grads,
            geometry,
            mixing=mixing,
            grad_fresh=grad_fresh.contiguous(),
        )
        grads = post_backward(grad_fresh, streams, *mixing)
    else:
        _, phi_parts = stream_gradients(streams, phi, grad_layer_input, coefficient_grads, geometry, mixing=mixing)
        grads = _all_stream_gradients(
            (streams, *mixing), phi, grad_fresh.contiguous(), grad_layer_input, coefficient_grads, geometry, config
        )
    return (*grads, *parameter_gradients(phi_parts, coefficient_grads, phi, scale, bias, geometry))


def _all_stream_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    phi: Tensor,
    grad_fresh: Tensor,
    grad_input: Tensor,
    coefficient_grads: CoefficientGradients,
    geometry: Geometry,
    config: PostPreGradConfig,
) -> tuple[Tensor, ...]:
    """Return the gradients of (streams, branch, post, res), the gradient of the new streams held in registers.

    Args:
        inputs: streams [tokens, n, C], branch [tokens, C], post [tokens, n] and res [tokens, n, n].
        phi: [rows, n·C].
        grad_fresh: [tokens, n, C].
        grad_input: [tokens, C].
        coefficient_grads: of the next site.
        geometry: of the call.
        config: of the launch.
    """
    n, width, tokens = geometry.n, geometry.width, geometry.tokens
    blocks = ceil_div(width, config.block_width)
    grads = tuple(torch.empty_like(tensor) for tensor in inputs)
    mixing_parts = empty(phi, blocks, n * (n + 1), tokens)
    launch(
        post_pre_backward_kernel, (blocks * ceil_div(tokens, config.block_tokens),),
        *inputs, phi, grad_fresh, grad_input,
        coefficient_grads.grad_products, coefficient_grads.norm_factor, coefficient_grads.read_weights,
        grads[0], grads[1], mixing_parts, tokens, width,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width,
        num_warps=config.warps, num_stages=1, **geometry.constants(), **product_options(),
    )  # fmt: skip
    launch(
        mixing_gradients_kernel, (ceil_div(tokens, 128), n * (n + 1)),
        mixing_parts, grads[2], grads[3], tokens, blocks, n=n, BLOCK_TOKENS=128, num_warps=4,
    )  # fmt: skip
    return grads
