"""The table of manifolds: where a site's n×n mixing matrix lives.

A manifold maps the affine logits of a token, `A[out, in]` or another number of them, to its mixing matrix
`res[out, in]`. To add one, from
anywhere:

    MANIFOLDS["column"] = Manifold(
        name="column", project=softmax, project_backward=softmax_backward, rest_bias=..., help="columns sum to 1"
    )

The name is then a value of the option `manifold`. Plain PyTorch runs it. A manifold of this table whose
`kernel_matrix` is named has device functions too: `matrix_of` or `matrix_of_row` of `gpu/coefficients.py`, and
`coefficients` of `cpu/coefficients.h`.

Torch is imported only where it is used: the command line reads this table for its help.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .epsilons import Eps, Epsilons, epsilons

if TYPE_CHECKING:
    from torch import Tensor

# A manifold of others, and any but Sinkhorn's, is given a number as eps.
Project = Callable[["Tensor", int, Any], "Tensor"]
ProjectBackward = Callable[["Tensor", "Tensor", int, Any], "Tensor"]

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
        project: `(logits, iters, eps) -> res [*, n, n]`; rows index the output stream. The logits are [*, n, n], or
            [*, k] where `logits` is given.
        project_backward: `(grad_res, logits, iters, eps) -> grad_logits`, the exact derivative of `project`.
        rest_bias: `n -> ` [n, n] or [k] logits whose matrix is near the identity and has exact row sums of 1.
        gated: pre and post pass through sigmoids (mHC); otherwise they stay affine (hyper-connections).
        exact_rows: with eps = 0, rows of res sum to 1 because `project` ends on a row normalization, or is constant.
        uses_eps: `project` adds eps to its sums, which are then not exact.
        logits: `n -> k`, where the matrix is not made of n×n logits.
        sizes: the numbers of streams that it is defined for.
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
    uses_eps: bool = True
    logits: Callable[[Any], Any] | None = None
    sizes: tuple[int, ...] = tuple(range(1, MAX_STREAMS + 1))
    mixes: bool = True
    kernel_matrix: str | None = None
    flops: Callable[[Any, Any], Any] = _no_flops
    help: str = ""

    def rows(self, n_streams: Any) -> Any:
        """Return the number of rows of phi, pre, post and, where streams mix, res, for a number or a symbol."""
        if not self.mixes:
            return 2 * n_streams
        return 2 * n_streams + (n_streams * n_streams if self.logits is None else self.logits(n_streams))

    @property
    def scales(self) -> int:
        """Number of learnable scales: one each for pre, post and res."""
        return 3 if self.mixes else 2

    def rows_are_exact(self, eps: Eps) -> bool:
        """Whether rows of res sum to 1 by construction, so that no rounding of their sums need be carried along."""
        return self.exact_rows and (not epsilons(eps).within or not self.uses_eps)


def sinkhorn_project(logits: Tensor, iters: int, eps: Eps) -> Tensor:
    """Project onto the doubly stochastic matrices by Sinkhorn-Knopp (arXiv 2512.24880, Eq. 9).

    Columns (sums over `out`, dim -2) are normalized first and rows (sums over `in`, dim -1) last, so that rows
    sum to 1 exactly. A number `eps` is added to the first matrix and to every later sum, as DeepSeek-V4 does.

    Args:
        logits: [*, n, n], float32 or float64.
        iters: column-then-row normalizations, at least 1.
        eps: 0 for exact row sums; `Epsilons` for other places.

    Returns:
        [*, n, n] in the dtype of `logits`.
    """
    given = epsilons(eps)
    res, _ = _sinkhorn_trace(logits, iters, given, _first_columns(logits, given))
    return res


def _first_columns(logits: Tensor, eps: Epsilons) -> Tensor:
    """Return the first column normalization: exp(logits) by its sums, to which `eps.first` is added."""
    columns = logits.softmax(-2)
    if eps.first == 0.0:
        return columns
    # s / (s + first) for the sums s, which may be beyond what the dtype holds.
    return columns * (logits.logsumexp(-2, keepdim=True) - math.log(eps.first)).sigmoid()


def _first_rows(logits: Tensor) -> Tensor:
    return logits.log_softmax(-2).softmax(-1)


def _sinkhorn_trace(
    logits: Tensor, iters: int, eps: Epsilons, columns: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor, int]]]:
    """Run Sinkhorn, keeping (normalized matrix, sums, dim) of every normalization after the first column one.

    Without eps the first column and row normalizations stay in the log domain: exp would underflow a whole row
    to 0/0 once logits differ by more than about 100. After these two every sum lies in [1/n², n], so the rest
    is safe in the linear domain.
    """
    trace: list[tuple[Tensor, Tensor, int]] = []
    matrix = columns + eps.matrix
    matrix = _normalize(matrix, -1, eps.sums, trace) if eps.within else _first_rows(logits)
    for _ in range(iters - 1):
        matrix = _normalize(matrix, -2, eps.sums, trace)
        matrix = _normalize(matrix, -1, eps.sums, trace)
    return matrix, trace


def _normalize(matrix: Tensor, dim: int, eps: float, trace: list[tuple[Tensor, Tensor, int]]) -> Tensor:
    sums = matrix.sum(dim, keepdim=True) + eps
    matrix = matrix / sums
    trace.append((matrix, sums, dim))
    return matrix


def sinkhorn_project_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: Eps) -> Tensor:
    """Differentiate `sinkhorn_project` exactly, through every iteration.

    Implicit differentiation of the limit is off by 60 % at a logit standard deviation of 4; the iterates are
    replayed instead.
    """
    given = epsilons(eps)
    probabilities = _first_columns(logits, given)
    _, trace = _sinkhorn_trace(logits, iters, given, probabilities)
    grad = grad_res
    for normalized, sums, dim in reversed(trace):
        grad = (grad - (grad * normalized).sum(dim, keepdim=True)) / sums
    # Divided by a sum with an eps in it, exponentials have the derivative of a softmax: p(δ - p).
    grad_columns = grad * probabilities if given.within else _softmax_backward(grad, _first_rows(logits))
    return grad_columns - probabilities * grad_columns.sum(-2, keepdim=True)


def _sinkhorn_flops(n: Any, iters: Any) -> Any:
    """exp, then a sum and a division for each entry, over columns and over rows."""
    return n**2 * (4 * iters + 1)


def _keep(logits: Tensor, iters: int, eps: float) -> Tensor:
    return logits.clone()


def _keep_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    return grad_res.clone()


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    return weights * (grad - (grad * weights).sum(-1, keepdim=True))


def row_project(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Softmax each row of [*, n, n]: rows sum to 1, columns to anything. No eps is added."""
    return logits.softmax(-1)


def row_project_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """Differentiate `row_project`."""
    return _softmax_backward(grad_res, logits.softmax(-1))


def _permutation_matrices(logits: Tensor) -> Tensor:
    """Return all permutation matrices [n!, n·n] for logits [*, n!], each row by row; the identity first."""
    import torch

    count = logits.shape[-1]
    n = next(size for size in range(1, MAX_STREAMS + 1) if math.factorial(size) == count)
    # Made from the logits, they are fake tensors where those are.
    unit = torch.diag_embed(logits.new_ones(n)).unbind(0)
    rows = [unit[source] for order in itertools.permutations(range(n)) for source in order]
    return torch.stack(rows).reshape(count, n * n)


def permutation_project(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Weigh all permutation matrices by a softmax: exactly doubly stochastic (mHC-lite, arXiv 2601.05732).

    By Birkhoff's theorem every doubly stochastic matrix is such a sum. No eps is added.

    Args:
        logits: [*, n!], the identity's first, the others in lexicographic order.
        iters: not used.
        eps: not used.
    """
    matrices = _permutation_matrices(logits)
    n = math.isqrt(matrices.shape[-1])
    return (logits.softmax(-1) @ matrices).unflatten(-1, (n, n))


def permutation_project_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """Differentiate `permutation_project`."""
    return _softmax_backward(grad_res.flatten(-2) @ _permutation_matrices(logits).mT, logits.softmax(-1))


def _kronecker(factors: list[Tensor]) -> Tensor:
    """Return the Kronecker product of [*, 2, 2] matrices, the first one's indices the slowest."""
    product = factors[0]
    for factor in factors[1:]:
        spread = product.unsqueeze(-1).unsqueeze(-3) * factor.unsqueeze(-2).unsqueeze(-4)
        product = spread.flatten(-2, -1).flatten(-3, -2)
    return product


def _kronecker_factors(stay: Tensor) -> list[Tensor]:
    """Return [[a, 1 - a], [1 - a, a]] for each a of [*, K]."""
    import torch

    pairs = torch.stack([stay, 1.0 - stay, 1.0 - stay, stay], dim=-1)
    return list(pairs.unflatten(-1, (2, 2)).unbind(-3))


def kronecker_project(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Multiply K matrices [[a, 1 - a], [1 - a, a]] by Kronecker (KromHC, arXiv 2601.21579): exactly doubly stochastic.

    Stream i and stream j mix by how the bits of i and j differ. No eps is added.

    Args:
        logits: [*, K] for n = 2^K streams; a is their sigmoid.
        iters: not used.
        eps: not used.
    """
    return _kronecker(_kronecker_factors(logits.sigmoid()))


def kronecker_project_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """Differentiate `kronecker_project`: the derivative by one factor replaces it with [[1, -1], [-1, 1]]."""
    import torch

    stay = logits.sigmoid()
    factors = _kronecker_factors(stay)
    change = torch.ones_like(factors[0])
    change[..., 0, 1] = change[..., 1, 0] = -1.0
    grads = [
        (grad_res * _kronecker([*factors[:index], change, *factors[index + 1 :]])).sum((-2, -1))
        for index in range(len(factors))
    ]
    return torch.stack(grads, dim=-1) * stay * (1.0 - stay)


def _log2(n: Any) -> int:
    return int(n).bit_length() - 1


def _permutation_rest(n: int) -> Tensor:
    import torch

    # Of the identity's n! - 1 rivals, as much weight as of the n - 1 that an entry of a Sinkhorn row has.
    rest = torch.zeros(math.factorial(n))
    rest[0] = _REST_LOGIT + math.log((math.factorial(n) - 1) / (n - 1)) if n > 1 else 0.0
    return rest


def _kronecker_rest(n: int) -> Tensor:
    import torch

    return torch.full((_log2(n),), _REST_LOGIT)


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
            uses_eps=False,
            mixes=False,
            kernel_matrix="logits",
            help="streams do not mix",
        ),
        Manifold(
            name="permutation",
            project=permutation_project,
            project_backward=permutation_project_backward,
            rest_bias=_permutation_rest,
            exact_rows=True,
            uses_eps=False,
            kernel_matrix="permutation",
            logits=lambda n: math.factorial(n),
            sizes=(2, 3, 4),
            flops=lambda n, iters: 2 * math.factorial(n) * (n**2 + 1),
            help="exactly doubly stochastic by weighted permutations, 2 to 4 streams",
        ),
        Manifold(
            name="kronecker",
            project=kronecker_project,
            project_backward=kronecker_project_backward,
            rest_bias=_kronecker_rest,
            exact_rows=True,
            uses_eps=False,
            kernel_matrix="kronecker",
            logits=_log2,
            sizes=(2, 4, 8),
            flops=lambda n, iters: 2 * n**2,
            help="exactly doubly stochastic by a Kronecker product, 2, 4 or 8 streams",
        ),
        Manifold(
            name="row",
            project=row_project,
            project_backward=row_project_backward,
            rest_bias=lambda n: _REST_LOGIT * _identity(n),
            exact_rows=True,
            uses_eps=False,
            kernel_matrix="row",
            flops=lambda n, iters: 3 * n**2,
            help="rows sum to 1, columns are free",
        ),
    )
}

_BUILT_IN = tuple(MANIFOLDS.values())


def is_built_in(name: str) -> bool:
    """Whether a name of `MANIFOLDS` is defined in this file; registered anew, it is another manifold."""
    return MANIFOLDS[name] in _BUILT_IN
