"""The operators whose collapse is normalized, in plain PyTorch: `pre` and `post_pre` with the norm of the layer input.

In a pre-norm block nobody but a norm reads the layer input: these return the normed value in its place, so that the
layer input itself never goes to memory, and is not rounded to the streams' dtype on the way. A norm is LayerNorm
(`centered`) or RMSNorm, which reads no `norm_bias`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import accumulation_dtype


def norm(
    layer_input: Tensor, norm_weight: Tensor, norm_bias: Tensor, layer_eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """Normalize [*, C] as LayerNorm or RMSNorm does.

    Returns:
        the normed value [*, C]; its statistics [*, 2], the mean (0 for RMSNorm) and the factor 1/RMS; both in the dtype
        of `layer_input`.
    """
    mean = layer_input.mean(-1, keepdim=True) if centered else torch.zeros_like(layer_input[..., :1])
    away = layer_input - mean
    inverse_rms = torch.rsqrt(away.square().mean(-1, keepdim=True) + layer_eps)
    normed = away * inverse_rms * norm_weight.to(away.dtype)
    if centered:
        normed = normed + norm_bias.to(away.dtype)
    return normed, torch.cat([mean, inverse_rms], dim=-1)


def norm_backward(
    grad_normed: Tensor,
    layer_input: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    statistics: Tensor,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `norm` with respect to the layer input [*, C], the weight [C] and the bias [C]."""
    dtype = layer_input.dtype
    grad, (mean, inverse_rms) = grad_normed.to(dtype), statistics.split(1, dim=-1)
    away = (layer_input - mean) * inverse_rms
    through = grad * norm_weight.to(dtype)
    grad_away = through - away * (through * away).mean(-1, keepdim=True)
    if centered:
        grad_away = grad_away - through.mean(-1, keepdim=True)
    flat = grad.flatten(0, -2)
    grad_weight = (flat * away.flatten(0, -2)).sum(0)
    grad_bias = flat.sum(0) if centered else torch.zeros_like(grad_weight)
    return inverse_rms * grad_away, grad_weight.to(norm_weight.dtype), grad_bias.to(norm_bias.dtype)


def pre_norm(
    streams: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    layer_eps: float,
    centered: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Run `pre`, and the norm of its layer input.

    Args:
        streams: [*, n, C].
        norm_weight: [C], any floating dtype.
        norm_bias: [C]; an RMSNorm does not read it, and its gradient is zero.
        phi: as scale, bias and the next four in `reference.pre`.
        scale: [3] or [2].
        bias: [rows].
        iters: Sinkhorn iterations.
        norm_eps: of the coefficients.
        eps: of the coefficients.
        manifold: a name of `MANIFOLDS`.
        layer_eps: the norm's epsilon, added to the mean square.
        centered: subtract the mean and add `norm_bias`: LayerNorm.
        rest: anchored, transposed and sinkhorn_eps, as in `reference.pre`.

    Returns:
        the normed layer input [*, C] in the streams' dtype; post [*, n], res [*, n, n], the projection [*, rows + 1]
        and the norm's statistics [*, 2], the last two not differentiable.
    """
    site: tuple[Any, ...] = (iters, norm_eps, eps, manifold, *rest)
    layer_input, post, res, projection = reference.pre(_wide(streams), phi, scale, bias, *site)
    normed, statistics = norm(layer_input, norm_weight, norm_bias, layer_eps, centered)
    return normed.to(streams.dtype), post, res, projection, statistics.detach()


def collapse_norm(
    streams: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    post: Tensor,
    res: Tensor,
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    layer_eps: float,
    centered: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Return what `pre_norm` returns, given what `measure` did; see `reference.collapse`."""
    site: tuple[Any, ...] = (iters, norm_eps, eps, manifold, *rest)
    layer_input, *copies = reference.collapse(_wide(streams), phi, scale, bias, post, res, projection, *site)
    normed, statistics = norm(layer_input, norm_weight, norm_bias, layer_eps, centered)
    return normed.to(streams.dtype), *copies, statistics.detach()


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
    eps: float,
    manifold: str,
    layer_eps: float,
    centered: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Return the gradients of `pre_norm` with respect to its six tensors, given its projection and statistics."""
    site: tuple[Any, ...] = (iters, norm_eps, eps, manifold, *rest)
    wide, nothing = _wide(streams), projection.new_empty(0)
    layer_input, *_ = reference.collapse(wide, phi, scale, bias, nothing, nothing, projection, *site)
    grad_input, *grad_norm = norm_backward(grad_normed, layer_input, norm_weight, norm_bias, statistics, centered)
    grads = (grad_input, grad_post, grad_res)
    grad_streams, *grad_mapping = reference.pre_backward(*grads, wide, phi, scale, bias, projection, *site)
    return grad_streams.to(streams.dtype), *grad_norm, *grad_mapping


def post_pre_norm(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Run a site's `post`, then the next site's `pre_norm`, which `rest` is for; the new streams come first."""
    fresh = reference.post(streams, branch, post, res)
    return (fresh, *pre_norm(fresh, *rest))


def post_collapse_norm(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Return what `post_pre_norm` returns, given what `post_measure` did; `rest` is for `collapse_norm`."""
    fresh = reference.post(streams, branch, post, res)
    return (fresh, *collapse_norm(fresh, *rest))


def post_pre_norm_backward(
    grad_fresh: Tensor,
    grad_normed: Tensor,
    grad_next_post: Tensor,
    grad_next_res: Tensor,
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Return the gradients of `post_pre_norm`'s nine tensors, making the new streams again; `rest` as it has it."""
    fresh = reference.post(streams, branch, post, res)
    through, *others = pre_norm_backward(grad_normed, grad_next_post, grad_next_res, fresh, *rest)
    return (*reference.post_backward(grad_fresh + through, streams, branch, post, res), *others)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor))
