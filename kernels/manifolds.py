"""The registry of manifolds: where a site's n×n mixing matrix lives.

A manifold maps the affine logits `A[out, in]` of a token to its mixing matrix `res[out, in]`. To add one:

    MANIFOLDS["row"] = Manifold(
        name="row", project=row_softmax, project_backward=row_softmax_backward, rest_bias=..., gated=True
    )

The name is then a value of the option `manifold`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Project = Callable[[Tensor, int, float], Tensor]
ProjectBackward = Callable[[Tensor, Tensor, int, float], Tensor]

# At 8 the product of 60 matrices softmaxed around the identity still keeps .94 on its diagonal;
# at 4 it has collapsed to the mean of the streams.
_REST_LOGIT = 8.0


@dataclass(frozen=True)
class Manifold:
    """One choice of mixing matrices.

    Attributes:
        name: the value of the option `manifold`.
        project: `(logits [*, n, n], iters, eps) -> res [*, n, n]`; rows index the output stream.
        project_backward: `(grad_res, logits, iters, eps) -> grad_logits`, the exact derivative of `project`.
        rest_bias: `n -> [n, n]` logits whose matrix is near the identity and has exact row sums of 1.
        gated: pre and post pass through sigmoids (mHC); otherwise they stay affine (hyper-connections).
        exact_rows: with eps = 0, rows of res sum to 1 because `project` ends on a row normalisation, or is constant.
        mixes: False when res is the constant identity, which then needs no rows in phi.
    """

    name: str
    project: Project
    project_backward: ProjectBackward
    rest_bias: Callable[[int], Tensor]
    gated: bool = True
    exact_rows: bool = False
    mixes: bool = True

    def rows(self, n_streams: int) -> int:
        """Number of rows of phi: pre, post and, where streams mix, res."""
        return 2 * n_streams + (n_streams * n_streams if self.mixes else 0)

    @property
    def scales(self) -> int:
        """Number of learnable scales: one each for pre, post and res."""
        return 3 if self.mixes else 2


def sinkhorn_project(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Project onto the doubly stochastic matrices by Sinkhorn-Knopp (arXiv 2512.24880, Eq. 9).

    Columns (sums over `out`, dim -2) are normalised first and rows (sums over `in`, dim -1) last, so that rows
    sum to 1 exactly. `eps` is added to the first matrix and to every later sum, as DeepSeek-V4 does.

    Args:
        logits: [*, n, n], float32 or float64.
        iters: column-then-row normalisations, at least 1.
        eps: 0 for exact row sums.

    Returns:
        [*, n, n] in the dtype of `logits`.
    """
    res, _ = _sinkhorn_trace(logits, iters, eps)
    return res


def _sinkhorn_trace(logits: Tensor, iters: int, eps: float) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
    """Run Sinkhorn, keeping (normalised matrix, sums, dim) of every normalisation after the first column one.

    With eps = 0 the first column and row normalisations stay in the log domain: exp would underflow a whole row
    to 0/0 once logits differ by more than about 100. After these two every sum lies in [1/n², n], so the rest
    is safe in the linear domain.
    """
    trace: list[tuple[Tensor, Tensor, int]] = []
    columns = torch.log_softmax(logits, dim=-2)
    if eps == 0.0:
        matrix = torch.softmax(columns, dim=-1)
    else:
        matrix = columns.exp() + eps
        matrix = _normalise(matrix, -1, eps, trace)
    for _ in range(iters - 1):
        matrix = _normalise(matrix, -2, eps, trace)
        matrix = _normalise(matrix, -1, eps, trace)
    return matrix, trace


def _normalise(matrix: Tensor, dim: int, eps: float, trace: list[tuple[Tensor, Tensor, int]]) -> Tensor:
    sums = matrix.sum(dim, keepdim=True) + eps
    matrix = matrix / sums
    trace.append((matrix, sums, dim))
    return matrix


def sinkhorn_project_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """Differentiate `sinkhorn_project` exactly, through every iteration.

    Implicit differentiation of the limit is off by 60 % at a logit standard deviation of 4; the iterates are
    replayed instead.
    """
    _, trace = _sinkhorn_trace(logits, iters, eps)
    grad = grad_res
    for normalised, sums, dim in reversed(trace):
        grad = (grad - (grad * normalised).sum(dim, keepdim=True)) / sums
    columns = torch.log_softmax(logits, dim=-2)
    probabilities = columns.exp()
    if eps == 0.0:
        first = torch.softmax(columns, dim=-1)
        grad_columns = first * (grad - (grad * first).sum(-1, keepdim=True))
    else:
        grad_columns = grad * probabilities
    return grad_columns - probabilities * grad_columns.sum(-2, keepdim=True)


def _keep(logits: Tensor, iters: int, eps: float) -> Tensor:
    return logits.clone()


def _keep_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    return grad_res.clone()


MANIFOLDS: dict[str, Manifold] = {
    "sinkhorn": Manifold(
        name="sinkhorn",
        project=sinkhorn_project,
        project_backward=sinkhorn_project_backward,
        rest_bias=lambda n: _REST_LOGIT * torch.eye(n),
        exact_rows=True,
    ),
    "none": Manifold(name="none", project=_keep, project_backward=_keep_backward, rest_bias=torch.eye, gated=False),
    "identity": Manifold(
        name="identity",
        project=_keep,
        project_backward=_keep_backward,
        rest_bias=torch.eye,
        mixes=False,
        exact_rows=True,
    ),
}
