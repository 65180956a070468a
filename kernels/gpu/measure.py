"""`measure`: a site's coefficients alone, also behind a `post` (`post_measure`) and within `pre` and `post_pre`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..epsilons import Eps
from ..orientation import ROWS_FIRST, PhiLayout
from .coefficients import coefficient_memory, coefficients, manifold_constants
from .configurations import Geometry
from .launch import geometry_of
from .projection import project


def measure_by(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    constants: dict[str, Any],
    geometry: Geometry,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
    fresh_streams: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Project and make coefficients: up to three launches.

    Args:
        streams: contiguous [*, n, C], as all tensors.
        phi: [rows, n·C].
        scale: [3], [2], or [1] for a head.
        bias: [rows].
        iters: Sinkhorn iterations.
        norm_eps: as in `reference.pre`.
        eps: as in `reference.pre`.
        constants: as from `manifold_constants`.
        geometry: of the call.
        mixing: branch [*, C], post [*, n] and res [*, n, n] of a `post` that comes first.
        fresh_streams: [*, n, C], where to write the streams after it, or None.

    Returns:
        post [*, n], res [*, n, n] and the projection [*, rows + 1] in float32.
    """
    outputs = coefficient_memory(streams, geometry)
    if geometry.tokens:
        sums = project(streams, phi, geometry, mixing=mixing, fresh_streams=fresh_streams)
        coefficients(sums, scale, bias, iters, norm_eps, eps, geometry, constants, outputs)
    return outputs


def measure(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return post, res and the projection of `pre`; see `reference.measure`."""
    return measure_by(
        streams.contiguous(), phi.contiguous(), scale.contiguous(), bias.contiguous(), iters, norm_eps, eps,
        manifold_constants(manifold, eps), geometry_of(streams, phi, anchored, layout),
    )  # fmt: skip
