"""`post_pre`: one site's `post` and the next site's `pre` (arXiv 2512.24880, Eq. 3, then 5, 7, 8).

Forward: the projection makes the new streams in registers, rounds them as they are stored (unrounded ones would drift
from what the next kernel sees), writes them and projects them; coefficients; the collapse reads the new streams back.
(3n + 2)C where (2n + 2)C is the least: collapsing needs coefficients that need the whole row.

Backward: the new streams are made again in registers and never read. One walk gives the gradients of the gates, a
second the gradient of the new streams and phi's, a third is the backward of `post`, which writes over that gradient
in place: nothing of the streams' size is allocated that is not returned. (n + 2) + (3n + 2) + (3n + 2), 34C at n = 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..epsilons import Eps
from ..manifolds import MANIFOLDS
from ..orientation import ROWS_FIRST, PhiLayout
from .coefficient_gradients import coefficient_gradients
from .coefficients import manifold_constants
from .collapse import collapse_by
from .gates import gates
from .last_gradients import last_gradients
from .launch import geometry_of
from .measure import measure_by
from .stream_gradients import stream_gradients


def post_pre(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """Run a site's `post` and the next site's `pre`; see `boundary.post_pre`.

    Args:
        streams: [*, n, C].
        branch: [*, C].
        post: [*, n] of the site.
        res: [*, n, n] of the site.
        phi: [rows, n·C] of the next site.
        scale: [3], or [2] for a manifold that does not mix, of the next site.
        bias: [rows] of the next site.
        iters: Sinkhorn iterations.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        manifold: a name of `MANIFOLDS` that the kernels cover.
        anchored: the streams given are anchored, and so is all that is returned.
        layout: how phi lies in memory.

    Returns:
        the new streams [*, n, C] and layer_input [*, C] in the streams' dtype; post [*, n], res [*, n, n] and the
        projection [*, rows + 1] of the next site in float32.
    """
    geometry = geometry_of(streams, phi, anchored, layout)
    streams, branch, post, res, phi, scale, bias = (
        tensor.contiguous() for tensor in (streams, branch, post, res, phi, scale, bias)
    )
    fresh = torch.empty_like(streams)
    next_post, next_res, projection = measure_by(
        streams, phi, scale, bias, iters, norm_eps, eps, manifold_constants(manifold, eps), geometry,
        mixing=(branch, post, res), fresh_streams=fresh,
    )  # fmt: skip
    gated = MANIFOLDS[manifold].gated
    (layer_input,) = collapse_by(fresh, scale, bias, projection, norm_eps, eps, gated, geometry)
    return fresh, layer_input, next_post, next_res, projection


def post_pre_backward(
    grad_fresh: Tensor,
    grad_layer_input: Tensor,
    grad_next_post: Tensor,
    grad_next_res: Tensor,
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
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
    """Return the gradients of `post_pre`.

    Args:
        grad_fresh: [*, n, C], of the new streams.
        grad_layer_input: [*, C].
        grad_next_post: [*, n].
        grad_next_res: [*, n, n].
        streams: [*, n, C], and the rest as in `post_pre`.
        branch: [*, C].
        post: [*, n].
        res: [*, n, n].
        phi: [rows, n·C].
        scale: [3], or [2] for a manifold that does not mix.
        bias: [rows].
        projection: [*, rows + 1] that `post_pre` returned.
        iters: as in `post_pre`.
        norm_eps: as in `post_pre`.
        eps: as in `post_pre`.
        manifold: as in `post_pre`.
        anchored: as in `post_pre`.
        layout: as in `post_pre`.

    Returns:
        the gradients of its seven tensors, each with the shape and dtype of its tensor.
    """
    inputs = (streams, branch, post, res, phi, scale, bias)
    geometry = geometry_of(streams, phi, anchored, layout)
    if geometry.tokens == 0:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    streams, branch, post, res, phi, scale, bias = (tensor.contiguous() for tensor in inputs)
    grad_input = grad_layer_input.contiguous()
    mixing = (branch, post, res)
    found = coefficient_gradients(
        projection.contiguous(), gates(streams, grad_input, geometry, mixing),
        grad_next_post.contiguous(), grad_next_res.contiguous(), scale, bias,
        iters, norm_eps, eps, geometry, manifold_constants(manifold, eps),
    )  # fmt: skip
    grad_mixed, phi_parts, _ = stream_gradients(
        streams, phi, grad_input, found, geometry, mixing=mixing, grad_fresh=grad_fresh.contiguous()
    )
    return last_gradients(
        grad_mixed, (streams, branch, post, res), phi_parts, found.parts, (phi, scale, bias), geometry
    )
