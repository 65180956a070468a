"""The last launch of a boundary's backward: `post` differentiated, and beside it the parameters' partial sums added up.

Neither needs the other, and both need all that came before. Each has programs of its own within one launch. Those of
the parameters come first: each of them adds up many parts, one after the other, while the others stream.
"""

# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import Geometry, ceil_div
from .launch import launch, register_limit
from .norm_gates import Norm
from .parameter_gradients import BLOCK, BLOCK_PROGRAMS, parameter_gradients_block
from .post import backward_config, post_backward_tile


@triton.jit(do_not_specialize=["tokens", "splits", "programs", "blocks"])
def last_gradients_kernel(
    grad_mixed: tl.tensor,
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    phi_parts: tl.tensor,
    coefficient_parts: tl.tensor,
    norm_parts: tl.tensor,
    grad_branch: tl.tensor,
    grad_post: tl.tensor,
    grad_res: tl.tensor,
    grad_phi: tl.tensor,
    grad_scale: tl.tensor,
    grad_bias: tl.tensor,
    grad_norm_weight: tl.tensor,
    grad_norm_bias: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    splits: tl.tensor,
    programs: tl.tensor,
    blocks: tl.tensor,
    n: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
) -> None:
    """Add up parameters' gradients in ROWS + 1 times `blocks` programs, and differentiate `post` in the others.

    With NORM, `blocks` programs more add up those of the norm.
    The gradient of the streams is written over that of the mixed ones: a program loads a tile of all n before it
    writes it.
    """
    program = tl.program_id(0)
    others = blocks * (ROWS + 2 if NORM else ROWS + 1)
    if program < others:
        parameter_gradients_block(
            program // blocks, program % blocks, phi_parts, coefficient_parts, norm_parts, grad_phi, grad_scale,
            grad_bias, grad_norm_weight, grad_norm_bias, width, splits, programs, n, ROWS, ANCHORED, NORM, CENTERED,
            COLUMNS, TRANSPOSED, SLOTS, BLOCK, BLOCK_PROGRAMS,
        )  # fmt: skip
    else:
        post_backward_tile(
            program - others, grad_mixed, streams, branch, post, res, grad_mixed, grad_branch, grad_post, grad_res,
            tokens, width, n, BLOCK_TOKENS, BLOCK_WIDTH, VECTOR,
        )  # fmt: skip


def last_gradients(
    grad_mixed: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    phi_parts: Tensor,
    coefficient_parts: Tensor,
    parameters: tuple[Tensor, Tensor, Tensor],
    geometry: Geometry,
    norm: Norm | None = None,
    norm_parts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of streams, branch, post, res, phi, scale and bias, then of a norm's weight and bias.

    Args:
        grad_mixed: [*, n, C] gradient of the streams after `post`; that of the streams before it is written over it.
        inputs: streams [*, n, C], branch [*, C], post [*, n] and res [*, n, n], contiguous and with tokens.
        phi_parts: [splits, rows, n·C] partial gradients.
        coefficient_parts: [programs, 2, rows] partial gradients of bias and of each row's scale.
        parameters: phi [rows, n·C], as the geometry's layout says, scale and bias.
        geometry: of the call.
        norm: of the layer input, if it has one.
        norm_parts: [splits, 2, C] partial gradients, with a norm.
    """
    tensors = (*inputs[1:], *parameters, *(norm[:2] if norm else ()))
    grads = [torch.empty_like(tensor) for tensor in tensors]
    config = backward_config(geometry.width, geometry.n, geometry.element_size)
    blocks = ceil_div(geometry.width, BLOCK)
    adding = blocks * (geometry.rows + (2 if norm else 1))
    launch(
        last_gradients_kernel, (adding + ceil_div(geometry.tokens, config.block_tokens),),
        grad_mixed, *inputs, phi_parts, coefficient_parts, phi_parts if norm_parts is None else norm_parts, *grads,
        *(() if norm else grads[-2:]),
        geometry.tokens, geometry.width, phi_parts.shape[0], coefficient_parts.shape[0], blocks,
        NORM=norm is not None, CENTERED=norm is not None and norm.centered,
        SLOTS=geometry.slots, BLOCK=BLOCK, BLOCK_PROGRAMS=BLOCK_PROGRAMS,
        BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width, VECTOR=config.vector,
        num_warps=config.warps, num_stages=1,
        **register_limit(None if geometry.n <= 4 else 255), **geometry.constants(), **geometry.phi(),
    )  # fmt: skip
    return (grad_mixed, *grads)
