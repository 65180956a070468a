"""`post_collapse_norm`: a site's `post` and the next site's normed collapse in one pass; see `collapse_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..epsilons import Eps
from ..manifolds import MANIFOLDS
from ..orientation import ROWS_FIRST, PhiLayout
from .collapse_norm import collapse_norm_by
from .launch import geometry_of


def post_collapse_norm(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    next_post: Tensor,
    next_res: Tensor,
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    layer_eps: float,
    centered: bool,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """Return what `post_pre_norm` returns, given what `post_measure` did; see `normed.post_collapse_norm`."""
    fresh = torch.empty_like(streams, memory_format=torch.contiguous_format)
    made = collapse_norm_by(
        streams.contiguous(), (norm_weight.contiguous(), norm_bias.contiguous()), scale.contiguous(),
        bias.contiguous(), projection.contiguous(), norm_eps, eps, layer_eps, centered, MANIFOLDS[manifold].gated,
        geometry_of(streams, phi, anchored, layout),
        mixing=(branch.contiguous(), post.contiguous(), res.contiguous()), fresh_streams=fresh,
        measured=(next_post.contiguous(), next_res.contiguous()),
    )  # fmt: skip
    return (fresh, *made)
