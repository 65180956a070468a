"""Rows of phi and bias in the order that the kernels read: `res[out, in]`.

A site whose mixing matrix is stored [in, out] (`transposed`, as DeepSeek-V4 stores it) is the same site with the n·n
last rows of phi and bias in another order. The reference takes the flag as it is. The kernels do not know it: here they
are given the rows in their order, and the gradients are put back; the projection is in their order everywhere. That is
one pass over phi, (n² + 2n)·n·C numbers, beside the n·C of every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def in_kernel_order(
    call: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    n_streams: int,
    constants: tuple[Any, ...],
    phi_at: int | None,
    kernel_constants: int | None,
    gradients: bool = False,
) -> Any:
    """Call a kernel that knows no `transposed`.

    Args:
        call: the kernel.
        tensors: of the call.
        n_streams: n.
        constants: of the call, as the operator's signature has them.
        phi_at: where phi, scale and bias begin among the tensors, None without.
        kernel_constants: how many of the constants stand before `transposed`, None for all.
        gradients: the kernel returns the gradients of phi, scale and bias last.
    """
    count = len(constants) if kernel_constants is None else kernel_constants
    known, transposed = constants[:count], any(constants[count:])
    if not transposed or phi_at is None or tensors[phi_at].shape[0] == 2 * n_streams:
        return call(*tensors, *known)
    phi, scale, bias = tensors[phi_at : phi_at + 3]
    ordered = (with_res_transposed(phi, n_streams), scale, with_res_transposed(bias, n_streams))
    results = call(*tensors[:phi_at], *ordered, *tensors[phi_at + 3 :], *known)
    if not gradients:
        return results
    *grads, grad_phi, grad_scale, grad_bias = results
    return (*grads, with_res_transposed(grad_phi, n_streams), grad_scale, with_res_transposed(grad_bias, n_streams))


def with_res_transposed(rows: Tensor, n_streams: int) -> Tensor:
    """Return a copy of phi [rows, n·C] or bias [rows] whose n·n last rows, those of res, are transposed."""
    gates, matrix = rows.split([2 * n_streams, n_streams * n_streams])
    return torch.cat([gates, *matrix.unflatten(0, (n_streams, n_streams)).unbind(1)])
