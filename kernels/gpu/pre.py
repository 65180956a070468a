"""`pre`: a site's coefficients and the collapse of its streams (arXiv 2512.24880, Eq. 5, 7, 8).

Forward: the projection, split over C; coefficients, one token a thread; the collapse, which reads the streams again.
Each is a launch that streams or computes and does nothing else, with enough programs at every number of tokens.

Backward: the projection is an input. One walk over the streams gives the gradients of the gates, a second those of
the streams and of phi. `head` is a `pre` with gates alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..epsilons import Eps
from ..manifolds import MANIFOLDS
from ..orientation import ROWS_FIRST, PhiLayout
from .coefficient_gradients import coefficient_gradients
from .coefficients import manifold_constants
from .collapse import collapse_by
from .gates import gates
from .launch import geometry_of
from .measure import measure_by
from .parameter_gradients import parameter_gradients
from .stream_gradients import stream_gradients


def pre(
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
    """Compute a site's coefficients and its layer input; see `reference.pre`.

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
    streams, phi, scale, bias = (tensor.contiguous() for tensor in (streams, phi, scale, bias))
    constants = manifold_constants(manifold, eps)
    post, res, projection = measure_by(streams, phi, scale, bias, iters, norm_eps, eps, constants, geometry)
    gated = MANIFOLDS[manifold].gated
    (layer_input,) = collapse_by(streams, scale, bias, projection, norm_eps, eps, gated, geometry)
    return layer_input, post, res, projection


def pre_backward(
    grad_layer_input: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """Return the gradients of `pre`.

    Args:
        grad_layer_input: [*, C].
        grad_post: [*, n].
        grad_res: [*, n, n].
        streams: [*, n, C], and the rest as in `pre`.
        phi: [rows, n·C].
        scale: [3], or [2] for a manifold that does not mix.
        bias: [rows].
        projection: [*, rows + 1] that `pre` returned.
        iters: as in `pre`.
        norm_eps: as in `pre`.
        eps: as in `pre`.
        manifold: as in `pre`.
        anchored: as in `pre`.
        layout: as in `pre`.

    Returns:
        gradients of streams [*, n, C], phi [rows, n·C], scale and bias, each in the dtype of its tensor.
    """
    grads = (grad_layer_input, grad_post, grad_res)
    constants = manifold_constants(manifold, eps)
    return backward(grads, (streams, phi, scale, bias), projection, iters, norm_eps, eps, constants, anchored, layout)


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    constants: dict[str, Any],
    anchored: bool,
    layout: PhiLayout,
) -> tuple[Tensor, ...]:
    """Differentiate `pre` or `head`; arguments and results are those of `pre_backward`.

    Args:
        grads: of the layer input, post and res; of a head the last two are not read.
        tensors: streams, phi, scale and bias.
        projection: [*, rows + 1].
        iters: as in `pre`.
        norm_eps: as in `pre`.
        eps: as in `pre`.
        constants: as from `manifold_constants`.
        anchored: as in `pre`.
        layout: as in `pre`.
    """
    geometry = geometry_of(tensors[0], tensors[1], anchored, layout)
    if geometry.tokens == 0:
        return tuple(torch.zeros_like(tensor) for tensor in tensors)
    streams, phi, scale, bias = (tensor.contiguous() for tensor in tensors)
    grad_input, grad_post, grad_res = (grad.contiguous() for grad in grads)
    gate_parts = gates(streams, grad_input, geometry)
    found = coefficient_gradients(
        projection.contiguous(), gate_parts, grad_post, grad_res, scale, bias, iters, norm_eps, eps, geometry, constants
    )
    grad_streams, phi_parts, _ = stream_gradients(streams, phi, grad_input, found, geometry)
    return (grad_streams, *parameter_gradients(phi_parts, found.parts, phi, scale, bias, geometry))
