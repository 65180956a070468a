"""`head`: read the streams out by a learned, sigmoid-weighted sum (the head of DeepSeek-V4).

A `pre` whose phi has one group of rows, with no post and no matrix: the same kernels, compiled for that case.
"""

from __future__ import annotations

from torch import Tensor

from ..orientation import ROWS_FIRST, PhiLayout
from .coefficients import head_constants
from .collapse import collapse_by
from .launch import geometry_of
from .measure import measure_by
from .pre import backward


def head(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, Tensor]:
    """Read [*, n, C] streams out as [*, C], with phi [n, n·C], scale [1] and bias [n]; see `reference.head`."""
    geometry = geometry_of(streams, phi, anchored, layout)
    streams, phi, scale, bias = (tensor.contiguous() for tensor in (streams, phi, scale, bias))
    *_, projection = measure_by(streams, phi, scale, bias, 1, norm_eps, eps, head_constants(eps), geometry)
    (collapsed,) = collapse_by(streams, scale, bias, projection, norm_eps, eps, True, geometry)
    return collapsed, projection


def head_backward(
    grad_output: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    norm_eps: float,
    eps: float,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """Return the gradients of `head`.

    Args:
        grad_output: [*, C].
        streams: [*, n, C], and the rest as in `reference.head`.
        phi: [n, n·C].
        scale: [1].
        bias: [n].
        projection: [*, n + 1] that `head` returned.
        norm_eps: as in `reference.head`.
        eps: as in `reference.head`.
        anchored: as in `reference.head`.
        layout: as in `pre`.

    Returns:
        gradients of streams [*, n, C], phi [n, n·C], scale [1] and bias [n], each in the dtype of its tensor.
    """
    grads = (grad_output, projection, projection)
    tensors = (streams, phi, scale, bias)
    return backward(grads, tensors, projection, 1, norm_eps, eps, head_constants(eps), anchored, layout)
