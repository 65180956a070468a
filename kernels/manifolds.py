"""The table of manifolds: where a site's n×n mixing matrix lives.

A manifold maps the affine logits `A[out, in]` of a token to its mixing matrix `res[out, in]`. To add one, from
anywhere:

    MANIFOLDS["row"] = Manifold(
        name="row", project=row_softmax, project_backward=row_softmax_backward, rest_bias=..., help="rows sum to 1"
    )

The name is then a value of the option `manifold`. Plain PyTorch runs it. A manifold of this table whose
`kernel_matrix` is named has device functions in `gpu/coefficients.py` (`matrix_tile`, `matrix_tile_backward`) too.

Torch is imported only where it is used: the command line reads this table for its help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Project = Callable[["Tensor", int, float], "Tensor"]
ProjectBackward = Callable[["Tensor", "Tensor", int, float], "Tensor"]

# What the kernels cover, and what the option `n_streams` allows.
MAX_STREAMS = 8

# At 8 the product of 60 matrices softmaxed around the identity still keeps .94 on its diagonal;
# at 4 it has collapsed to the mean of the streams.
_REST_LOGIT = 8.0


def _no_flops(n: Any, iters: Any) -> Any:
    return 0 * n


@dataclass(frozen=True)
class Manifold:
    """One choice of mixing matrices.

    Attributes:
        name: the value of the option `manifold`.
        project: `(logits [*, n, n], iters, eps) -> res [*, n, n]`; rows index the output stream.
        project_backward: `(grad_res, logits, iters, eps) -> grad_logits`, the exact derivative of `project`.
        rest_bias: `n -> [n, n]` logits whose matrix is near the identity and has exact row sums of 1.
        gated: pre and post pass through sigmoids (mHC); otherwise they stay affine (hyper-connections).
        exact_rows: with eps = 0, rows of res sum to 1 because `project` ends on a row normalization, or is constant.
        mixes: False when res is the constant identity, which then needs no rows in phi.
        kernel_matrix: what the kernels make of the matrix's logits, a value of the constant MATRIX of
            `gpu/coefficients.py`; None if no kernel covers the manifold, and plain PyTorch runs it.
        flops: `(n, iters) -> multiplications and additions` of `project` for a token; the arguments may be numbers or
            symbols.
        help: what the matrices are, in a few words, for help texts.
    """

    name: str
    project: Project
    project_backward: ProjectBackward
    rest_bias: Callable[[int], Tensor]
    gated: bool = True
    exact_rows: bool = False
    mixes: bool = True
    kernel_matrix: str | None = None
    flops: Callable[[Any, Any], Any] = _no_flops
    help: str = ""

    def rows(self, n_streams: Any) -> Any:
        """Return the number of rows of phi, pre, post and, where streams mix, res, for a number or a symbol."""
        return 2 * n_streams + (n_streams * n_streams if self.mixes else 0)

    @property
    def scales(self) -> int:
        """Number of learnable scales: one each for pre, post and res."""
        return 3 if self.mixes else 2

    def rows_are_exact(self, eps: float) -> bool:
        """Whether rows of res sum to 1 by construction, so that no rounding of their sums need be carried along."""
        return self.exact_rows and (eps == 0.0 or not self.mixes)


def sinkhorn_project(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Project onto the doubly stochastic matrices by Sinkhorn-Knopp (arXiv 2512.24880, Eq. 9).

    Columns (sums over `out`, dim -2) are normalized first and rows (sums over `in`, dim -1) last, so that rows
    sum to 1 exactly. `eps` is added to the first matrix and to every later sum, as DeepSeek-V4 does.

    Args:
        logits: [*, n, n], float32 or float64.
        iters: column-then-row normalizations, at least 1.
        eps: 0 for exact row sums.

    Returns:
        [*, n, n] in the dtype of `logits`.
    """
    res, _ = _sinkhorn_trace(logits, iters, eps)
    return res


def _sinkhorn_trace(logits: Tensor, iters: int, eps: float) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
    """Run Sinkhorn, keeping (normalized matrix, sums, dim) of every normalization after the first column one.

    With eps = 0 the first column and row normalizations stay in the log domain: exp would underflow a whole row
    to 0/0 once logits differ by more than about 100. After these two every sum lies in [1/n², n], so the rest
    is safe in the linear domain.
    """
    trace: list[tuple[Tensor, Tensor, int]] = []
    columns = logits.log_softmax(-2)
    if eps == 0.0:
        matrix = columns.softmax(-1)
    else:
        matrix = columns.exp() + eps
        matrix = _normalize(matrix, -1, eps, trace)
    for _ in range(iters - 1):
        matrix = _normalize(matrix, -2, eps, trace)
        matrix = _normalize(matrix, -1, eps, trace)
    return matrix, trace


def _normalize(matrix: Tensor, dim: int, eps: float, trace: list[tuple[Tensor, Tensor, int]]) -> Tensor:
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
    for normalized, sums, dim in reversed(trace):
        grad = (grad - (grad * normalized).sum(dim, keepdim=True)) / sums
    columns = logits.log_softmax(-2)
    probabilities = columns.exp()
    if eps == 0.0:
        first = columns.softmax(-1)
        grad_columns = first * (grad - (grad * first).sum(-1, keepdim=True))
    else:
        grad_columns = grad * probabilities
    return grad_columns - probabilities * grad_columns.sum(-2, keepdim=True)


def _sinkhorn_flops(n: Any, iters: Any) -> Any:
    """exp, then a sum and a division for each entry, over columns and over rows."""
    return n**2 * (4 * iters + 1)


def _keep(logits: Tensor, iters: int, eps: float) -> Tensor:
    return logits.clone()


def _keep_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    return grad_res.clone()


def _identity(n: int) -> Tensor:
    import torch

    return torch.eye(n)


MANIFOLDS: dict[str, Manifold] = {
    manifold.name: manifold
    for manifold in (
        Manifold(
            name="sinkhorn",
            project=sinkhorn_project,
            project_backward=sinkhorn_project_backward,
            rest_bias=lambda n: _REST_LOGIT * _identity(n),
            exact_rows=True,
            kernel_matrix="sinkhorn",
            flops=_sinkhorn_flops,
            help="doubly stochastic",
        ),
        Manifold(
            name="none",
            project=_keep,
            project_backward=_keep_backward,
            rest_bias=_identity,
            gated=False,
            kernel_matrix="logits",
            help="unconstrained",
        ),
        Manifold(
            name="identity",
            project=_keep,
            project_backward=_keep_backward,
            rest_bias=_identity,
            exact_rows=True,
            mixes=False,
            kernel_matrix="logits",
            help="streams do not mix",
        ),
    )
}

_BUILT_IN = tuple(MANIFOLDS.values())


def is_built_in(name: str) -> bool:
    """Whether a name of `MANIFOLDS` is defined in this file; registered anew, it is another manifold."""
    return MANIFOLDS[name] in _BUILT_IN
