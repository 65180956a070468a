"""`post`: mix the streams and write the branch's output into each (arXiv 2512.24880, Eq. 3).

One pass forward, (2n + 1)C elements a token. One pass backward, (3n + 2)C, for the gradients of streams,
branch, post and res together: a program owns its tokens' whole rows, so that the sums over C stay in its
registers.
"""

# mypy: disable-error-code="assignment,misc,index"
# ruff: noqa: N803, RUF005

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import ceil_div
from .launch import launch
from .primitives import rounded, total
from .stream_tiles import all_live, load_mixing, load_streams, mix, store_mix_backward


@dataclass(frozen=True)
class PostConfig:
    """Launch configuration: tokens and channels of a tile, warps, and channels that a thread loads at once."""

    block_tokens: int
    block_width: int
    warps: int
    vector: int


def forward_config(width: int, element_size: int) -> PostConfig:
    """Choose a tile of one 16-byte load a thread for each stream; narrow streams share a tile."""
    vector = 16 // element_size
    block_width = min(triton.next_power_of_2(width), 128 * vector)
    return PostConfig(128 * vector // block_width, block_width, 4, vector)


def backward_config(width: int, n: int, element_size: int) -> PostConfig:
    """Choose the forward's tile, with fewer channels a thread where n² sums crowd the registers."""
    vector = (16 if n <= 4 else 8 if n <= 6 else 4) // element_size
    block_width = min(triton.next_power_of_2(width), 128 * vector)
    return PostConfig(128 * vector // block_width, max(block_width, vector), 4, vector)


@triton.jit(do_not_specialize=["tokens"])
def post_forward_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    mixed: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    n: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Mix a tile of tokens and channels; neighboring programs share tokens."""
    blocks = (width + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    token = (tl.program_id(0) // blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = (tl.program_id(0) % blocks) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    live = token < tokens
    mask = live[:, None] & (column < width)[None, :]
    base = token.to(tl.int64) * width
    tiles = load_streams(streams, base, column, mask, n, width)
    written = tl.load(branch + base[:, None] + column[None, :], mask=mask, other=0.0)
    weights = load_mixing(post, res, token, live, n)
    for o in tl.static_range(n):
        fresh = rounded(mix(tiles, written, weights, o * (n + 1), n), mixed.dtype.element_ty)
        tl.store(mixed + base[:, None] * n + o * width + column[None, :], fresh, mask=mask)


@triton.jit
def _fold(values: tl.tensor, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, VECTOR: tl.constexpr) -> tl.tensor:
    """Add up the channels that one thread holds, so that a running sum costs it one register."""
    return total(tl.reshape(values, [BLOCK_TOKENS, BLOCK_WIDTH // VECTOR, VECTOR]), 2)


@triton.jit
def post_backward_tile(
    program: tl.tensor,
    grad_mixed: tl.tensor,
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    grad_streams: tl.tensor,
    grad_branch: tl.tensor,
    grad_post: tl.tensor,
    grad_res: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    n: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """All four gradients of a tile of tokens, walking over C once."""
    token = program * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    live = token < tokens
    base = token.to(tl.int64) * width
    read, there = all_live(token, live, n)
    weights = load_mixing(post, res, read, there, n)
    sums = ()
    for _ in tl.static_range(n * (n + 1)):
        sums = sums + (tl.full([BLOCK_TOKENS, BLOCK_WIDTH // VECTOR], 0.0, tl.float32),)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        mask = live[:, None] & (column < width)[None, :]
        gathered = load_streams(grad_mixed, base, column, mask, n, width)
        tiles = load_streams(streams, base, column, mask, n, width)
        offsets = base[:, None] + column[None, :]
        written = tl.load(branch + offsets, mask=mask, other=0.0)
        grads = ()
        for o in tl.static_range(n):
            grads = grads + (gathered[o].to(tl.float32),)
        store_mix_backward(grads, weights, grad_streams, grad_branch, base, column, mask, n, width)
        grown = ()
        for o in tl.static_range(n):
            for i in tl.static_range(n):
                share = _fold(grads[o] * tiles[i].to(tl.float32), BLOCK_TOKENS, BLOCK_WIDTH, VECTOR)
                grown = grown + (sums[o * (n + 1) + i] + share,)
            share = _fold(grads[o] * written.to(tl.float32), BLOCK_TOKENS, BLOCK_WIDTH, VECTOR)
            grown = grown + (sums[o * (n + 1) + n] + share,)
        sums = grown
    token = token.to(tl.int64)
    for o in tl.static_range(n):
        for i in tl.static_range(n):
            entry = rounded(total(sums[o * (n + 1) + i], 1), grad_res.dtype.element_ty)
            tl.store(grad_res + token * (n * n) + o * n + i, entry, mask=live)
        entry = rounded(total(sums[o * (n + 1) + n], 1), grad_post.dtype.element_ty)
        tl.store(grad_post + token * n + o, entry, mask=live)


@triton.jit(do_not_specialize=["tokens"])
def post_backward_kernel(
    grad_mixed: tl.tensor,
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    grad_streams: tl.tensor,
    grad_branch: tl.tensor,
    grad_post: tl.tensor,
    grad_res: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    n: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """All four gradients, a tile of tokens a program."""
    post_backward_tile(
        tl.program_id(0), grad_mixed, streams, branch, post, res, grad_streams, grad_branch, grad_post, grad_res,
        tokens, width, n, BLOCK_TOKENS, BLOCK_WIDTH, VECTOR,
    )  # fmt: skip


def post(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Return X'_o = Σ_i res[o, i] X_i + post_o · branch; see `reference.post`.

    Args:
        streams: [*, n, C].
        branch: [*, C].
        post: [*, n].
        res: [*, n, n].

    Returns:
        [*, n, C] in the streams' dtype.
    """
    mixed = torch.empty_like(streams, memory_format=torch.contiguous_format)
    *leading, n, width = streams.shape
    tokens = torch.Size(leading).numel()
    if mixed.numel():
        config = forward_config(width, streams.element_size())
        grid = ceil_div(tokens, config.block_tokens) * ceil_div(width, config.block_width)
        launch(
            post_forward_kernel, (grid,),
            streams.contiguous(), branch.contiguous(), post.contiguous(), res.contiguous(), mixed,
            tokens, width,
            n=n, BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, num_warps=config.warps,
        )  # fmt: skip
    return mixed


def post_backward(
    grad_streams: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `post`.

    Args:
        grad_streams: [*, n, C], of its result.
        streams: [*, n, C].
        branch: [*, C].
        post: [*, n].
        res: [*, n, n].

    Returns:
        gradients of streams, branch, post and res, each with the shape and dtype of its tensor.
    """
    inputs = (streams, branch, post, res)
    if streams.numel() == 0:
        zeros = [torch.zeros_like(tensor) for tensor in inputs]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    streams, branch, post, res = (tensor.contiguous() for tensor in inputs)
    grads = [torch.empty_like(tensor) for tensor in (streams, branch, post, res)]
    *leading, n, width = streams.shape
    tokens = torch.Size(leading).numel()
    config = backward_config(width, n, streams.element_size())
    launch(
        post_backward_kernel, (ceil_div(tokens, config.block_tokens),),
        grad_streams.contiguous(), streams, branch, post, res, *grads, tokens, width,
        n=n, BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, VECTOR=config.vector,
        num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return grads[0], grads[1], grads[2], grads[3]
