"""`head`: read the streams out by a learned, sigmoid-weighted sum (the head of DeepSeek-V4).

A `pre` whose mapping has one group of rows, with no post and no matrix: the same kernels, compiled for that
case.
"""

from __future__ import annotations

from torch import Tensor

from .launch import empty
from .pre import backward, forward, geometry_of

_FLAGS = {"GATED": True, "SINKHORN": False}


def head(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    anchored: bool = False,
) -> Tensor:
    """Read [*, n, C] streams out as [*, C]; see `reference.head`."""
    *leading, _, width = streams.shape
    collapsed, _, _ = forward(
        streams.contiguous(), phi.contiguous(), scale.contiguous(), bias.contiguous(),
        1, norm_eps, eps, geometry_of(streams, phi, anchored), _FLAGS,
    )  # fmt: skip
    return collapsed.view(*leading, width)


def head_backward(
    grad_output: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `head` with respect to streams, phi, scale and bias."""
    nothing = empty(streams, 1)
    return backward(grad_output, nothing, nothing, streams, phi, scale, bias, 1, norm_eps, eps, _FLAGS, anchored)
