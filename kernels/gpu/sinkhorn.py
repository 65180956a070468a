"""Sinkhorn-Knopp on its own (arXiv 2512.24880, Eq. 9), forward and backward."""

# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..epsilons import Eps, epsilons
from ..manifolds import MANIFOLDS
from .coefficients import anchor_matrix, matrix_index, sinkhorn_eps_constants
from .configurations import ceil_div
from .launch import launch
from .primitives import rounded, sinkhorn_tile, sinkhorn_tile_backward


@dataclass(frozen=True)
class SinkhornConfig:
    """Launch configuration: tokens of a program's tile, and its warps."""

    block_tokens: int
    warps: int


def forward_config(n: int) -> SinkhornConfig:
    """Choose a token a thread; from 5 streams on several threads share a token's matrix, which is larger."""
    return SinkhornConfig(128, 4) if n <= 4 else SinkhornConfig(32, 4)


backward_config = forward_config


@triton.jit
def _matrix_offsets(tokens: tl.tensor, n: tl.constexpr, N: tl.constexpr, BLOCK_TOKENS: tl.constexpr) -> tuple:
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows, columns = matrix_index(N)
    valid = (rows < n) & (columns < n)
    offsets = token[None, None, :] * (n * n) + rows * n + columns
    return offsets, valid, (token < tokens)[None, None, :] & valid


@triton.jit(do_not_specialize=["tokens", "iters"])
def sinkhorn_forward_kernel(
    logits: tl.tensor,
    res: tl.tensor,
    tokens: tl.tensor,
    iters: tl.tensor,
    first_eps: tl.tensor,
    matrix_eps: tl.tensor,
    sums_eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    HAS_EPS: tl.constexpr,
    FIRST_EPS: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Project a tile of matrices; reads and writes each entry once."""
    offsets, valid, mask = _matrix_offsets(tokens, n, N, BLOCK_TOKENS)
    tile = tl.load(logits + offsets, mask=mask, other=0.0).to(tl.float32)
    projected = sinkhorn_tile(tile, valid, iters, (first_eps, matrix_eps, sums_eps), HAS_EPS, FIRST_EPS)
    if ANCHORED:
        projected = anchor_matrix(projected, n, N, EXACT_ROWS)
    tl.store(res + offsets, rounded(projected, res.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "iters"])
def sinkhorn_backward_kernel(
    grad_res: tl.tensor,
    logits: tl.tensor,
    grad_logits: tl.tensor,
    tokens: tl.tensor,
    iters: tl.tensor,
    first_eps: tl.tensor,
    matrix_eps: tl.tensor,
    sums_eps: tl.tensor,
    n: tl.constexpr,
    N: tl.constexpr,
    HAS_EPS: tl.constexpr,
    FIRST_EPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Differentiate a tile of projections; the iterates are replayed in registers."""
    offsets, valid, mask = _matrix_offsets(tokens, n, N, BLOCK_TOKENS)
    tile = tl.load(logits + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_res + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = sinkhorn_tile_backward(grad, tile, valid, iters, (first_eps, matrix_eps, sums_eps), HAS_EPS, FIRST_EPS)
    tl.store(grad_logits + offsets, rounded(grad, grad_logits.dtype.element_ty), mask=mask)


def sinkhorn(logits: Tensor, iters: int, eps: Eps, anchored: bool = False) -> Tensor:
    """Project [*, n, n] logits onto the doubly stochastic matrices; see `reference.sinkhorn`.

    With `anchored` they are returned as anchored streams are mixed by them. That costs nothing here; as plain
    PyTorch after this kernel it would be several launches more, held against the paper's split.

    Returns:
        [*, n, n] in the dtype of `logits`.
    """
    logits = logits.contiguous()
    res = torch.empty_like(logits)
    n = logits.shape[-1]
    tokens = logits.numel() // (n * n)
    if tokens:
        padded = triton.next_power_of_2(n)
        config = forward_config(n)
        launch(
            sinkhorn_forward_kernel, (ceil_div(tokens, config.block_tokens),),
            logits, res, tokens, iters, *epsilons(eps)[1:],
            n=n, N=padded, EXACT_ROWS=MANIFOLDS["sinkhorn"].rows_are_exact(eps), ANCHORED=anchored,
            BLOCK_TOKENS=config.block_tokens, num_warps=config.warps, **sinkhorn_eps_constants(eps),
        )  # fmt: skip
    return res


def sinkhorn_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: Eps) -> Tensor:
    """Return the gradient of `sinkhorn` with respect to its logits, [*, n, n] like both arguments."""
    grad_res, logits = grad_res.contiguous(), logits.contiguous()
    grad_logits = torch.empty_like(logits)
    n = logits.shape[-1]
    tokens = logits.numel() // (n * n)
    if tokens:
        padded = triton.next_power_of_2(n)
        config = backward_config(n)
        launch(
            sinkhorn_backward_kernel, (ceil_div(tokens, config.block_tokens),),
            grad_res, logits, grad_logits, tokens, iters, *epsilons(eps)[1:],
            n=n, N=padded, BLOCK_TOKENS=config.block_tokens, num_warps=config.warps, **sinkhorn_eps_constants(eps),
        )  # fmt: skip
    return grad_logits
