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

from ..epsilons import Eps
from ..manifolds import MANIFOLDS
from ..orientation import ROWS_FIRST, PhiLayout
from .coefficients import (
    affine,
    anchor_matrix,
    coefficient_memory,
    gate_index,
    manifold_constants,
    matrix_index,
    matrix_of,
    matrix_of_parts,
    sum_parts,
    write_weights,
)
from .collapse import collapse_by
from .configurations import ceil_div, coefficients_config
from .launch import geometry_of, launch
from .phi import stored_row
from .pre import pre_backward
from .projection import project
from .sinkhorn import sinkhorn


@triton.jit(do_not_specialize=["tokens", "splits"])
def paper_affine_kernel(
    sums: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    post: tl.tensor,
    matrix: tl.tensor,
    projection: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    norm_eps: tl.tensor,
    splits: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    GATED: tl.constexpr,
    MATRIX: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Scale, shift and squash the projections: post [tokens, n] and the matrix [tokens, n, n].

    Of MATRIX "sinkhorn" it writes the logits, for the kernel that follows.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    far = token.to(tl.int64)
    kept = projection + far * (ROWS + 1)
    squares = sum_parts(sums, ROWS, live, token, tokens, splits, ROWS + 1)
    tl.store(kept + ROWS, squares, mask=live)
    inverse_rms = tl.rsqrt(squares / (n * width) + norm_eps)
    j = gate_index(N)
    used = (j < n) & live[None, :]
    raw = sum_parts(sums, j, used, token[None, :], tokens, splits, ROWS + 1)
    tl.store(kept[None, :] + j, raw, mask=used)
    raw = sum_parts(sums, n + j, used, token[None, :], tokens, splits, ROWS + 1)
    tl.store(kept[None, :] + n + j, raw, mask=used)
    logits = affine(raw, n + j, j < n, inverse_rms[None, :], scale + 1, bias)
    tl.store(post + far[None, :] * n + j, write_weights(logits, n, N, GATED, ANCHORED), mask=used)
    o, i = matrix_index(N)
    inside = (o < n) & (i < n)
    here = inside & live[None, None, :]
    if PADDED:
        values = matrix_of_parts(
            sums, scale, bias, projection, token, live, inverse_rms, tokens, splits, n, N, ROWS, PADDED, MATRIX
        )
    elif 2 * n < ROWS:
        row = 2 * n + o * n + i
        raw = sum_parts(sums, row, here, token[None, None, :], tokens, splits, ROWS + 1)
        tl.store(kept[None, None, :] + row, raw, mask=here)
        row = stored_row(row, n, TRANSPOSED)
        values = affine(raw, row, inside, inverse_rms[None, None, :], scale + 2, bias)
    else:
        values = tl.where(o == i, 1.0, 0.0) + tl.full([N, N, BLOCK_TOKENS], 0.0, tl.float32)
    if MATRIX != "sinkhorn":
        if PADDED == 0:
            values = matrix_of(values, 0, (0.0, 0.0, 0.0), n, N, MATRIX, False, False)
        if ANCHORED:
            values = anchor_matrix(values, n, N, EXACT_ROWS)
    tl.store(matrix + far[None, None, :] * (n * n) + o * n + i, values, mask=here)


def paper_pre(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        layout: how phi lies in memory.

    Returns:
        layer_input [*, C] in the streams' dtype; post [*, n], res [*, n, n] and the projection [*, rows + 1] in
        float32.
    """
    geometry = geometry_of(streams, phi, anchored, layout)
    constants = manifold_constants(manifold, eps)
    streams, phi, scale, bias = (tensor.contiguous() for tensor in (streams, phi, scale, bias))
    post, matrix, projection = coefficient_memory(streams, geometry)
    if geometry.tokens:
        sums = project(streams, phi, geometry)
        config = coefficients_config(geometry)
        launch(
            paper_affine_kernel, (ceil_div(geometry.tokens, config.block_tokens),),
            sums, scale, bias, post, matrix, projection, geometry.tokens, geometry.width, norm_eps, sums.shape[0],
            GATED=constants["GATED"], MATRIX=constants["MATRIX"], EXACT_ROWS=constants["EXACT_ROWS"],
            BLOCK_TOKENS=config.block_tokens, num_warps=config.warps, **geometry.coefficients(), **geometry.matrix(),
        )  # fmt: skip
    gated = MANIFOLDS[manifold].gated
    (layer_input,) = collapse_by(streams, scale, bias, projection, norm_eps, eps, gated, geometry)
    if constants["MATRIX"] == "sinkhorn":
        matrix = sinkhorn(matrix, iters, eps, anchored)
    return layer_input, post, matrix, projection


paper_pre_backward = pre_backward
