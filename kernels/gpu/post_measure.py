"""`post_measure`: the coefficients of the site behind a `post`, whose streams stay in registers; see `measure`."""

from __future__ import annotations

from torch import Tensor

from ..epsilons import Eps
from ..orientation import ROWS_FIRST, PhiLayout
from .coefficients import manifold_constants
from .launch import geometry_of
from .measure import measure_by


def post_measure(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return post, res and the projection of `post_pre`; see `boundary.post_measure`."""
    return measure_by(
        streams.contiguous(), phi.contiguous(), scale.contiguous(), bias.contiguous(), iters, norm_eps, eps,
        manifold_constants(manifold, eps), geometry_of(streams, phi, anchored, layout),
        mixing=(branch.contiguous(), post.contiguous(), res.contiguous()),
    )  # fmt: skip
