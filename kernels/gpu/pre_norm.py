"""`pre_norm`: a site's coefficients, and the norm of its streams' collapse; see `normed`.

As `pre`, but for a collapse that owns whole rows, and a backward that differentiates the norm within its two walks:
neither the layer input nor its gradient goes to memory.
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
from .collapse_norm import collapse_norm_by
from .configurations import Geometry
from .launch import geometry_of
from .measure import measure_by
from .norm_gates import Norm, norm_gates
from .parameter_gradients import parameter_gradients
from .stream_gradients import stream_gradients


def pre_norm(
    streams: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    layer_eps: float,
    centered: bool,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """Compute a site's coefficients and its normed layer input; see `normed.pre_norm`, which has the arguments."""
    geometry = geometry_of(streams, phi, anchored, layout)
    streams, norm_weight, norm_bias, phi, scale, bias = (
        tensor.contiguous() for tensor in (streams, norm_weight, norm_bias, phi, scale, bias)
    )
    constants = manifold_constants(manifold, eps)
    post, res, projection = measure_by(streams, phi, scale, bias, iters, norm_eps, eps, constants, geometry)
    normed, statistics = collapse_norm_by(
        streams, (norm_weight, norm_bias), scale, bias, projection, norm_eps, eps, layer_eps, centered,
        MANIFOLDS[manifold].gated, geometry,
    )  # fmt: skip
    return normed, post, res, projection, statistics


def pre_norm_backward(
    grad_normed: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    streams: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    statistics: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    layer_eps: float,
    centered: bool,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """Return the gradients of `pre_norm`'s six tensors; see `normed.pre_norm_backward`, which has the arguments."""
    tensors = (streams, norm_weight, norm_bias, phi, scale, bias)
    geometry = geometry_of(streams, phi, anchored, layout)
    if geometry.tokens == 0:
        return tuple(torch.zeros_like(tensor) for tensor in tensors)
    grads = tuple(grad.contiguous() for grad in (grad_normed, grad_post, grad_res))
    norm = Norm(norm_weight, norm_bias, statistics, centered).contiguous()
    mapping = (phi.contiguous(), scale.contiguous(), bias.contiguous())
    grad_streams, phi_parts, coefficient_parts, norm_parts = norm_walks(
        grads, streams.contiguous(), norm, mapping, projection.contiguous(), iters, norm_eps, eps, manifold, geometry
    )
    grad_phi, grad_scale, grad_bias, *grad_norm = parameter_gradients(
        phi_parts, coefficient_parts, *mapping, geometry, norm, norm_parts
    )
    return grad_streams, *grad_norm, grad_phi, grad_scale, grad_bias


def norm_walks(
    grads: tuple[Tensor, ...],
    streams: Tensor,
    norm: Norm,
    mapping: tuple[Tensor, Tensor, Tensor],
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    geometry: Geometry,
    **made: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the two walks of the backward of `pre_norm`, also behind a `post`.

    Args:
        grads: of the normed layer input, post and res; contiguous, as all tensors.
        streams: [*, n, C].
        norm: of the layer input.
        mapping: phi, scale and bias.
        projection: [*, rows + 1].
        iters: as in `pre_norm`.
        norm_eps: as in `pre_norm`.
        eps: as in `pre_norm`.
        manifold: as in `pre_norm`.
        geometry: of the call.
        made: `mixing` and `grad_fresh` of streams that a `post` makes; see `stream_gradients`.

    Returns:
        the gradient of the streams that are collapsed; partial gradients of phi, of scale and bias, and of the norm.
    """
    phi, scale, bias = mapping
    parts = norm_gates(
        streams, grads[0], norm, projection, scale, bias, norm_eps, eps, MANIFOLDS[manifold].gated, geometry,
        made.get("mixing"),
    )  # fmt: skip
    found = coefficient_gradients(
        projection, parts, grads[1], grads[2], scale, bias, iters, norm_eps, eps, geometry,
        manifold_constants(manifold, eps), norm,
    )  # fmt: skip
    grad_streams, phi_parts, norm_parts = stream_gradients(streams, phi, grads[0], found, geometry, norm=norm, **made)
    return grad_streams, phi_parts, found.parts, norm_parts
