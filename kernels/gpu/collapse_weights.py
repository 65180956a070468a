"""What collapsing kernels share: the weights that a token's projection gives, and copies of its coefficients."""

# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from .coefficients import affine, gate_index, read_weights
from .primitives import total


@triton.jit
def collapse_weights(
    projection: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    token: tl.tensor,
    live: tl.tensor,
    width: tl.tensor,
    norm_eps: tl.tensor,
    eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    GATED: tl.constexpr,
) -> tl.tensor:
    """Make what collapses the streams [streams, tokens] of a projection; of `token` int64."""
    j = gate_index(N)
    squares = tl.load(projection + token * (ROWS + 1) + ROWS, mask=live, other=0.0)
    raw = tl.load(projection + token[None, :] * (ROWS + 1) + j, mask=(j < n) & live[None, :], other=0.0)
    inverse_rms = tl.rsqrt(squares / (n * width) + norm_eps)
    return read_weights(affine(raw, j, j < n, inverse_rms[None, :], scale, bias), eps, n, N, GATED, ANCHORED)


@triton.jit
def weight_of(weights: tl.tensor, stream: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """Take one stream's row [tokens] of a tile [streams, tokens]."""
    return total(tl.where(gate_index(N) == stream, weights, 0.0), 0)


@triton.jit
def copy_coefficients(
    measured_post: tl.tensor,
    measured_res: tl.tensor,
    post_copy: tl.tensor,
    res_copy: tl.tensor,
    token: tl.tensor,
    wanted: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
) -> None:
    """Copy post and res of the `wanted` tokens."""
    entry = tl.arange(0, N * N)[None, :]
    place, here = token[:, None] * (n * n) + entry, wanted[:, None] & (entry < n * n)
    tl.store(res_copy + place, tl.load(measured_res + place, mask=here), mask=here)
    place, here = token[:, None] * n + entry, wanted[:, None] & (entry < n)
    tl.store(post_copy + place, tl.load(measured_post + place, mask=here), mask=here)
