"""`post_collapse`: a site's `post` and the next site's collapse in one pass, given coefficients; see `collapse`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..epsilons import Eps
from ..manifolds import MANIFOLDS
from ..orientation import ROWS_FIRST, PhiLayout
from .collapse import collapse_by
from .launch import geometry_of


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
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """Return what `post_pre` returns, given what `post_measure` did; see `boundary.post_collapse`."""
    fresh = torch.empty_like(streams, memory_format=torch.contiguous_format)
    made = collapse_by(
        streams.contiguous(), scale.contiguous(), bias.contiguous(), projection.contiguous(), norm_eps, eps,
        MANIFOLDS[manifold].gated, geometry_of(streams, phi, anchored, layout),
        mixing=(branch.contiguous(), post.contiguous(), res.contiguous()), fresh_streams=fresh,
        measured=(next_post.contiguous(), next_res.contiguous()),
    )  # fmt: skip
    return (fresh, *made)
