"""`post_pre` in plain PyTorch: a site's `post`, then the next site's `pre`, each as the reference defines it.

A file of its own because its arguments post and res would hide the functions of `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import reference


def post_pre(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int = 20,
    norm_eps: float = reference.NORM_EPS,
    eps: float = 0.0,
    manifold: str = "sinkhorn",
    anchored: bool = False,
    transposed: bool = False,
    sinkhorn_eps: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """Run a site's `post`, then the next site's `pre`.

    Args:
        streams: [*, n, C].
        branch: [*, C], any floating dtype.
        post: [*, n] of the site.
        res: [*, n, n] of the site.
        phi: [rows, n·C] of the next site, as its scale and bias and all that follow; see `pre`.
        scale: [3], or [2] for a manifold that does not mix.
        bias: [rows].
        iters: Sinkhorn iterations.
        norm_eps: as in `pre`.
        eps: as in `pre`.
        manifold: a name of `MANIFOLDS`.
        anchored: the streams given are anchored, and so is all that is returned.
        transposed: as in `pre`.
        sinkhorn_eps: as in `pre`.

    Returns:
        the new streams [*, n, C]; layer_input [*, C], post [*, n], res [*, n, n] and the projection [*, rows + 1] of
        the next site.
    """
    fresh = reference.post(streams, branch, post, res)
    site = (iters, norm_eps, eps, manifold, anchored, transposed, sinkhorn_eps)
    return (fresh, *reference.pre(fresh, phi, scale, bias, *site))


def post_measure(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return post, res and the projection of `post_pre`; see `reference.measure`. `constants` are those of a site."""
    return reference.measure(reference.post(streams, branch, post, res), phi, scale, bias, *constants)


def post_collapse(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    next_post: Tensor,
    next_res: Tensor,
    projection: Tensor,
    *constants: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `post_pre` returns, given what `post_measure` did; see `reference.collapse`."""
    fresh = reference.post(streams, branch, post, res)
    return (fresh, *reference.collapse(fresh, phi, scale, bias, next_post, next_res, projection, *constants))


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
    *constants: Any,
) -> tuple[Tensor, ...]:
    """Return the gradients of `post_pre` with respect to its seven tensors, making the new streams again."""
    fresh = reference.post(streams, branch, post, res)
    grads = (grad_layer_input, grad_next_post, grad_next_res)
    through, *grad_mapping = reference.pre_backward(*grads, fresh, phi, scale, bias, projection, *constants)
    return (*reference.post_backward(grad_fresh + through, streams, branch, post, res), *grad_mapping)
