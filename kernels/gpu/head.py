"""`head`: read the streams out by a learned, sigmoid-weighted sum (the head of DeepSeek-V4).

A `pre` whose phi has one group of rows, with no post and no matrix: the same kernels, compiled for that case.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import empty
from .pre import backward, forward, geometry_of


def _constants(eps: float) -> dict[str, Any]:
    return {"GATED": True, "MATRIX": "logits", "HAS_EPS": eps != 0.0, "EXACT_ROWS": False}


def head(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    anchored: bool = False,
) -> Tensor:
    """Read [*, n, C] streams out as [*, C], with phi [n, n·C], scale [1] and bias [n]; see `reference.head`."""
    *leading, _, width = streams.shape
    collapsed, _, _ = forward(
        streams.contiguous(), phi.contiguous(), scale.contiguous(), bias.contiguous(),
        1, norm_eps, eps, geometry_of(streams, phi, anchored), _constants(eps),
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
    """Return the gradients of `head`.

    Args:
        grad_output: [*, C].
        streams: [*, n, C], and the rest as in `reference.head`.
        phi: [n, n·C].
        scale: [1].
        bias: [n].
        norm_eps: as in `reference.head`.
        eps: as in `reference.head`.
        anchored: as in `reference.head`.

    Returns:
        gradients of streams [*, n, C], phi [n, n·C], scale [1] and bias [n], each in the dtype of its tensor.
    """
    nothing = empty(streams, 1)
    return backward(
        grad_output, nothing, nothing, streams, phi, scale, bias, 1, norm_eps, eps, _constants(eps), anchored
    )
