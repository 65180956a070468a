"""The operators for hand-written models: differentiable, opaque to Inductor, on any device.

`*` stands for any leading shape. Streams and branches may be float16, bfloat16, float32 or float64; coefficients are
held in float32 (float64 for float64 streams). The definitions are in `mhc_compile.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .kernels import ops
from .kernels.reference import NORM_EPS, PreOutput

__all__ = ["head", "post", "post_pre", "pre", "sinkhorn"]


def sinkhorn(logits: Tensor, *, iters: int = 20, eps: float = 0.0) -> Tensor:
    """Project [*, n, n] logits onto the doubly stochastic matrices (arXiv 2512.24880, Eq. 9).

    Columns (sums over dim -2) are normalized first, rows (sums over dim -1) last: rows sum to 1.
    """
    return ops.sinkhorn(logits, iters, eps)


def pre(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    iters: int = 20,
    norm_eps: float = NORM_EPS,
    eps: float = 0.0,
    manifold: str = "sinkhorn",
    sinkhorn_eps: Sequence[float] = (),
) -> PreOutput:
    """Compute a site's coefficients and collapse the streams into the branch's input (Eq. 5, 7, 8).

    Args:
        streams: [*, n, C].
        phi: [n² + 2n, n·C]; rows ordered pre | post | res (row-major, `res[out, in]`).
        scale: [3].
        bias: [n² + 2n].
        iters: Sinkhorn iterations.
        norm_eps: added to the mean square of a token's streams.
        eps: added to pre, and inside Sinkhorn; DeepSeek-V4 uses 1e-6.
        manifold: a name of `mhc_compile.kernels.manifolds.MANIFOLDS`.
        sinkhorn_eps: what Sinkhorn adds in place of `eps`: to its first sums, to the matrix behind them, and to later
            sums. `(1e-6, 0, 1e-6)` is `M = exp(logits)`, then `M / (M.sum(...) + 1e-6)` in turn.

    Returns:
        layer_input [*, C] in the streams' dtype, post [*, n], res [*, n, n].

    Raises:
        ValueError: `sinkhorn_eps` holds another number of numbers, or the manifold is not Sinkhorn's.
    """
    site = (iters, norm_eps, eps, manifold, False, False, list(sinkhorn_eps))
    return PreOutput(*ops.pre(streams, phi, scale, bias, *site)[:3])


def post(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Mix the streams and write the branch in (Eq. 3): X'_o = Σ_i res[o, i] X_i + post_o · branch.

    Shapes: streams [*, n, C], branch [*, C], post [*, n], res [*, n, n]; returns [*, n, C].
    """
    return ops.post(streams, branch, post, res)


def post_pre(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    iters: int = 20,
    norm_eps: float = NORM_EPS,
    eps: float = 0.0,
    manifold: str = "sinkhorn",
    sinkhorn_eps: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One site's `post` followed by the next site's `pre`; arguments and errors are theirs.

    Returns:
        the new streams [*, n, C], layer_input [*, C], post [*, n] and res [*, n, n] of the next site.
    """
    site = (iters, norm_eps, eps, manifold, False, False, list(sinkhorn_eps))
    made = ops.post_pre(streams, branch, post, res, phi, scale, bias, *site)
    fresh, layer_input, next_post, next_res, _ = made
    return fresh, layer_input, next_post, next_res


def head(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    norm_eps: float = NORM_EPS,
    eps: float = 0.0,
) -> Tensor:
    """Read [*, n, C] streams out as [*, C] by a learned sigmoid-weighted sum (the head of DeepSeek-V4).

    Shapes: phi [n, n·C], scale [1], bias [n].
    """
    return ops.head(streams, phi, scale, bias, norm_eps, eps)[0]
