"""Anchored streams: the layout in which a rewritten graph holds its streams.

Stream 0 is stored as it is and the others as their differences from it: Y_0 = X_0, Y_i = X_i - X_0. In matrices,
Y = T X, and a site (arXiv 2512.24880, Eq. 3 and 5) is the same site with other coefficients:

    X' = res X + post · branch        Y' = mix Y + write · branch,   mix = T res T⁻¹,  write = T post
    layer_input = Σ_i pre_i X_i       layer_input = Σ_i read_i Y_i,  read = T⁻ᵀ pre

What it is for: the identity passes through a residual stream unchanged, and rounding must not undo that. Rows of res
that sum to 1 make column 0 of `mix` exactly (1, 0, … 0), so the anchor is carried on without a product. Where the
streams are equal (`init="preserve"`) the differences are exact zeros: the forward is the plain model's, bit for bit,
and since the anchor's gradient is the sum of the streams' gradients, so is the backward. Held as n copies, each
stream's gradient rounds by itself at every site, and their sum drifts from the plain gradient. Small differences also
keep a precision of their own. The price: a stream much smaller than stream 0 rounds as stream 0 does, which is as a
plain residual stream of that size would.

`post` needs no variant: it takes `mix` and `write` for res and post. Operators that project or collapse streams take
the flag `anchored`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def anchor(streams: Tensor) -> Tensor:
    """Return T X: streams [*, n, C] as stream 0 and differences from it."""
    first, others = streams[..., :1, :], streams[..., 1:, :]
    return torch.cat([first, others - first], dim=-2)


def release(anchored: Tensor) -> Tensor:
    """Return T⁻¹ Y: the streams [*, n, C] that an anchored [*, n, C] stands for."""
    first, differences = anchored[..., :1, :], anchored[..., 1:, :]
    return torch.cat([first, differences + first], dim=-2)


def equal_streams(value: Tensor, n: int) -> Tensor:
    """Return [*, n, C]: n streams that all equal a value [*, C], anchored."""
    first = value.unsqueeze(-2)
    # Not F.pad: it fixes a dynamic shape to the size it was traced with.
    return torch.cat([first, *[torch.zeros_like(first)] * (n - 1)], dim=-2)


def release_backward(grad_streams: Tensor) -> Tensor:
    """Return T⁻ᵀ applied to a gradient of streams: the gradient of the anchored [*, n, C]."""
    return torch.cat([grad_streams.sum(-2, keepdim=True), grad_streams[..., 1:, :]], dim=-2)


def read_weights(pre: Tensor) -> Tensor:
    """Return T⁻ᵀ pre [*, n]: weights of the anchored streams that collapse them as `pre` collapses the streams."""
    return torch.cat([pre.sum(-1, keepdim=True), pre[..., 1:]], dim=-1)


def write_weights(post: Tensor) -> Tensor:
    """Return T post [*, n]."""
    return torch.cat([post[..., :1], post[..., 1:] - post[..., :1]], dim=-1)


def write_weights_backward(grad_write: Tensor) -> Tensor:
    """Return the gradient of `post` [*, n] from that of T post."""
    others = grad_write[..., 1:]
    return torch.cat([grad_write[..., :1] - others.sum(-1, keepdim=True), others], dim=-1)


def mixing(res: Tensor, exact_rows: bool) -> Tensor:
    """Return T res T⁻¹ [*, n, n].

    Args:
        res: [*, n, n], `res[out, in]`.
        exact_rows: rows sum to 1 by construction. Column 0 is then a constant, and its rounding is not carried along.
    """
    sums = torch.ones_like(res[..., :1]) if exact_rows else res.sum(-1, keepdim=True)
    summed = torch.cat([sums, res[..., 1:]], dim=-1)
    return anchor(summed)


def mixing_backward(grad_mix: Tensor, exact_rows: bool) -> Tensor:
    """Return the gradient of `res` [*, n, n] from that of T res T⁻¹.

    With `exact_rows` column 0 gets zeros: a row normalization before it takes the same gradient from any two that
    differ by a constant along a row.
    """
    first, others = grad_mix[..., :1, :], grad_mix[..., 1:, :]
    grad = torch.cat([first - others.sum(-2, keepdim=True), others], dim=-2)
    sums = torch.zeros_like(grad[..., :1]) if exact_rows else grad[..., :1]
    return torch.cat([sums, sums + grad[..., 1:]], dim=-1)


def released_mixing(mix: Tensor) -> Tensor:
    """Return T⁻¹ mix T [*, n, n]: the matrix `res` that an anchored site mixes its streams by."""
    res = release(mix)
    return torch.cat([res[..., :1] - res[..., 1:].sum(-1, keepdim=True), res[..., 1:]], dim=-1)
