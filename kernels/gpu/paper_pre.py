"""The paper's own split of `pre` into separate kernels (arXiv 2512.24880, section 4.3), for `fusion="paper"`.

Projection and norm; affine maps and sigmoids; Sinkhorn; collapse: four launches, each with its result in
device memory, then `post` as a fifth, after the branch. The backward is that of `pre`, so that only the forward
differs.
"""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .coefficients import activate, logits_tile, manifold_constants, store_coefficients
from .launch import Geometry, ceil_div, empty, launch
from .post import forward_config
from .pre import geometry_of, pre_backward
from .primitives import rounded
from .projection import partial_projections, sum_partials
from .sinkhorn import sinkhorn
from .stream_tiles import load_streams


@triton.jit(do_not_specialize=["tokens", "splits"])
def paper_affine_kernel(
    sums: tl.tensor,
    squares: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    pre: tl.tensor,
    post: tl.tensor,
    matrix: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    norm_eps: tl.tensor,
    eps: tl.tensor,
    splits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    GROUPS: tl.constexpr,
    GATED: tl.constexpr,
    MATRIX: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Scale, shift and squash the projections: pre and post [tokens, n], and the matrix [tokens, n, n].

    Of MATRIX "sinkhorn" it writes the logits, for the kernel that follows.
    """
    q = tl.arange(0, Q)[None, :, None]
    j = tl.arange(0, N)[None, None, :]
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    summed, square, _ = sum_partials(sums, squares, sums, token, live, tokens, splits, n, N, Q, False)
    logits, _, _, _ = logits_tile(summed, square, scale, bias, width, norm_eps, n, N, Q, GROUPS)
    split: tl.constexpr = MATRIX == "sinkhorn"
    weights = activate(
        logits, 0, eps, n, N, Q, GROUPS, GATED, "logits" if split else MATRIX, False, EXACT_ROWS, ANCHORED
    )
    if split:
        weights = tl.where(q >= 2, logits, weights)
    place = pre + token.to(tl.int64)[:, None, None] * n + j + 0 * q
    tl.store(place, weights, mask=live[:, None, None] & (j < n) & (q == 0))
    store_coefficients(weights, post, matrix, token, live, n, N, Q)


@triton.jit(do_not_specialize=["tokens"])
def paper_collapse_kernel(
    streams: tl.tensor,
    pre: tl.tensor,
    layer_input: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    n: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Add up a tile of streams by weights in device memory (Eq. 5)."""
    blocks = (width + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    token = (tl.program_id(0) // blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = (tl.program_id(0) % blocks) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = token < tokens
    mask = live[:, None] & (column < width)[None, :]
    token = token.to(tl.int64)
    tiles = load_streams(streams, token * width, column, mask, n, width)
    collapsed = tl.full([BLOCK_TOKENS, BLOCK_WIDTH], 0.0, tl.float32)
    for i in tl.static_range(n):
        collapsed += tl.load(pre + token * n + i, mask=live, other=0.0)[:, None] * tiles[i].to(tl.float32)
    place = layer_input + (token * width)[:, None] + column[None, :]
    tl.store(place, rounded(collapsed, layer_input.dtype.element_ty), mask=mask)


def paper_pre(
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
    """Compute `reference.pre` in separate kernels.

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
    geometry: Geometry = geometry_of(streams, phi, anchored)
    constants = manifold_constants(manifold, eps)
    *leading, n, width = streams.shape
    streams, phi, scale, bias = (tensor.contiguous() for tensor in (streams, phi, scale, bias))
    layer_input = empty(streams, *leading, width, dtype=streams.dtype)
    pre, post = empty(streams, *leading, n), empty(streams, *leading, n)
    matrix = empty(streams, *leading, n, n)
    if geometry.tokens:
        sums, squares, _ = partial_projections(streams, phi, geometry)
        block = max(1, 512 // geometry.slots)
        launch(
            paper_affine_kernel, (ceil_div(geometry.tokens, block),),
            sums, squares, scale, bias, pre, post, matrix,
            geometry.tokens, width, norm_eps, eps, sums.shape[0],
            GATED=constants["GATED"], MATRIX=constants["MATRIX"], EXACT_ROWS=constants["EXACT_ROWS"],
            BLOCK_TOKENS=block, num_warps=4, **geometry.constants(),
        )  # fmt: skip
        config = forward_config(width, streams.element_size())
        grid = ceil_div(geometry.tokens, config.block_tokens) * ceil_div(width, config.block_width)
        launch(
            paper_collapse_kernel, (grid,), streams, pre, layer_input, geometry.tokens, width,
            n=n, BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, num_warps=config.warps,
        )  # fmt: skip
    if constants["MATRIX"] == "sinkhorn":
        matrix = sinkhorn(matrix, iters, eps, anchored)
    return layer_input, post, matrix


paper_pre_backward = pre_backward
