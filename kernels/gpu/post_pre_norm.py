"""`post_pre_norm`: one site's `post` and the next site's `pre` with the norm of its layer input; see `normed`.

As `post_pre` and `pre_norm`: forward (3n + 2)C elements a token, and the layer input neither written nor read by a
norm; backward (n + 2) + (3n + 2) + (3n + 2) with the norm in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..epsilons import Eps
from ..manifolds import MANIFOLDS
from ..orientation import ROWS_FIRST, PhiLayout
from .coefficients import manifold_constants
from .collapse_norm import collapse_norm_by
from .last_gradients import last_gradients
from .launch import geometry_of
from .measure import measure_by
from .norm_gates import Norm
from .pre_norm import norm_walks


def post_pre_norm(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
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
    """Run a site's `post` and the next site's `pre_norm`; see `normed.post_pre_norm`, which has the arguments."""
    geometry = geometry_of(streams, phi, anchored, layout)
    streams, norm_weight, norm_bias, phi, scale, bias = (
        tensor.contiguous() for tensor in (streams, norm_weight, norm_bias, phi, scale, bias)
    )
    fresh = torch.empty_like(streams)
    next_post, next_res, projection = measure_by(
        streams, phi, scale, bias, iters, norm_eps, eps, manifold_constants(manifold, eps), geometry,
        mixing=(branch.contiguous(), post.contiguous(), res.contiguous()), fresh_streams=fresh,
    )  # fmt: skip
    normed, statistics = collapse_norm_by(
        fresh, (norm_weight, norm_bias), scale, bias, projection, norm_eps, eps, layer_eps, centered,
        MANIFOLDS[manifold].gated, geometry,
    )  # fmt: skip
    return fresh, normed, next_post, next_res, projection, statistics


def post_pre_norm_backward(
    grad_fresh: Tensor,
    grad_normed: Tensor,
    grad_next_post: Tensor,
    grad_next_res: Tensor,
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
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
    """Return the gradients of `post_pre_norm`'s nine tensors; see `normed.post_pre_norm_backward`."""
    tensors = (streams, branch, post, res, norm_weight, norm_bias, phi, scale, bias)
    geometry = geometry_of(streams, phi, anchored, layout)
    if geometry.tokens == 0:
        return tuple(torch.zeros_like(tensor) for tensor in tensors)
    streams, branch, post, res, phi, scale, bias = (
        tensor.contiguous() for tensor in (streams, branch, post, res, phi, scale, bias)
    )
    grads = tuple(grad.contiguous() for grad in (grad_normed, grad_next_post, grad_next_res))
    norm = Norm(norm_weight, norm_bias, statistics, centered).contiguous()
    grad_mixed, phi_parts, coefficient_parts, norm_parts = norm_walks(
        grads, streams, norm, (phi, scale, bias), projection.contiguous(), iters, norm_eps, eps, manifold, geometry,
        mixing=(branch, post, res), grad_fresh=grad_fresh.contiguous(),
    )  # fmt: skip
    *grad_mixing, grad_phi, grad_scale, grad_bias, grad_weight, grad_shift = last_gradients(
        grad_mixed, (streams, branch, post, res), phi_parts, coefficient_parts, (phi, scale, bias), geometry, norm,
        norm_parts,
    )  # fmt: skip
    return (*grad_mixing, grad_weight, grad_shift, grad_phi, grad_scale, grad_bias)
