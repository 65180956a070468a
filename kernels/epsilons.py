"""What is added in a site so that nothing is divided by zero: to pre, and in each of its places within Sinkhorn.

Models differ in the places. DeepSeek-V4 has one eps for pre, for the matrix behind its first softmax and for every
later sum. Who writes `M = exp(A)` and `M / (M.sum(...) + eps)` adds it to the first sums, too, of exponentials as they
are, and mostly has none in pre.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Epsilons(NamedTuple):
    """What is added where.

    Attributes:
        pre: to the weights that collapse the streams.
        first: to Sinkhorn's first sums, those of exp(logits).
        matrix: to the matrix after the first normalization.
        sums: to every later sum.
    """

    pre: float
    first: float
    matrix: float
    sums: float

    @property
    def within(self) -> bool:
        """Whether anything is added within Sinkhorn."""
        return self.first != 0.0 or self.matrix != 0.0 or self.sums != 0.0


# A number is an eps as DeepSeek-V4 has it.
Eps = float | Epsilons


def epsilons(eps: Eps) -> Epsilons:
    """Return what is added where."""
    return eps if isinstance(eps, Epsilons) else Epsilons(eps, 0.0, eps, eps)


def eps_of_site(eps: float, sinkhorn_eps: Sequence[float], manifold: str) -> Eps:
    """Return what a site adds, given two constants of its operators.

    Args:
        eps: added to pre; also within Sinkhorn, as DeepSeek-V4 does, if `sinkhorn_eps` is empty.
        sinkhorn_eps: `first`, `matrix` and `sums` of `Epsilons`, or empty.
        manifold: a name of `MANIFOLDS`.

    Raises:
        ValueError: `sinkhorn_eps` holds another number of numbers, or the manifold is not Sinkhorn's.
    """
    if not sinkhorn_eps:
        return eps
    if len(sinkhorn_eps) != 3:
        raise ValueError(
            f"sinkhorn_eps={list(sinkhorn_eps)}: give three numbers (added to the first sums, to the matrix behind "
            "them, to later sums), or none"
        )
    if manifold != "sinkhorn":
        raise ValueError(f"sinkhorn_eps={list(sinkhorn_eps)} needs manifold='sinkhorn', not {manifold!r}: leave it out")
    return Epsilons(eps, *sinkhorn_eps)
