"""Matrices that are made of a row of logits: weighted permutations, and Kronecker products (see `manifolds`).

Tiles are [logits, tokens] and [out, in, tokens], one token a thread: picking a logit out of a tile moves nothing.
"""

# mypy: disable-error-code="assignment"
# ruff: noqa: N803

from __future__ import annotations

import itertools

import triton
import triton.language as tl

from .primitives import LOWEST, largest, total


def _packed(n: int) -> int:
    """Return all orders of n streams, in lexicographic order, in 8 bits each: 2 bits for every output's input."""
    orders = enumerate(itertools.permutations(range(n)))
    return sum(source << (8 * index + 2 * out) for index, order in orders for out, source in enumerate(order))


_ORDERS_OF_2 = tl.constexpr(_packed(2))
_ORDERS_OF_3 = tl.constexpr(_packed(3))
_ORDERS_OF_4 = tl.constexpr(_packed(4))


@triton.jit
def _moves(index: tl.constexpr, o: tl.tensor, i: tl.tensor, n: tl.constexpr) -> tl.tensor:
    """Whether a permutation takes output stream o from input stream i."""
    orders: tl.constexpr = _ORDERS_OF_2 if n == 2 else (_ORDERS_OF_3 if n == 3 else _ORDERS_OF_4)
    here = (o == 0) & (i == ((orders >> (8 * index)) & 3))
    for out in tl.static_range(1, n):
        here = here | ((o == out) & (i == ((orders >> (8 * index + 2 * out)) & 3)))
    return here


@triton.jit
def _picked(values: tl.tensor, row: tl.tensor, index: tl.constexpr) -> tl.tensor:
    """Return row `index` of a tile [rows, tokens]."""
    return total(tl.where(row == index, values, 0.0), 0)


@triton.jit
def permutation_weights(logits: tl.tensor, row: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """Softmax over the first COUNT rows of [rows, tokens]; zeros behind them."""
    shown = tl.where(row < COUNT, logits, LOWEST)
    weights = tl.where(row < COUNT, tl.exp(shown - largest(shown, 0)[None, :]), 0.0)
    return weights / total(weights, 0)[None, :]


@triton.jit
def permuted(
    weights: tl.tensor, row: tl.tensor, o: tl.tensor, i: tl.tensor, n: tl.constexpr, COUNT: tl.constexpr
) -> tl.tensor:
    """Return [out, in, tokens]: the permutation matrices of n streams, weighted by [rows, tokens]."""
    matrix = tl.where(_moves(0, o, i, n), 1.0, 0.0) * _picked(weights, row, 0)[None, None, :]
    for index in tl.static_range(1, COUNT):
        here = tl.where(_moves(index, o, i, n), 1.0, 0.0)
        matrix += here * _picked(weights, row, index)[None, None, :]
    return matrix


@triton.jit
def permuted_backward(
    grad: tl.tensor, row: tl.tensor, o: tl.tensor, i: tl.tensor, n: tl.constexpr, COUNT: tl.constexpr
) -> tl.tensor:
    """Return the gradient [rows, tokens] of the weights; the padding of `grad` must be zero."""
    slopes = tl.where(row == 0, 1.0, 0.0) * _met(grad, 0, o, i, n)[None, :]
    for index in tl.static_range(1, COUNT):
        slopes += tl.where(row == index, 1.0, 0.0) * _met(grad, index, o, i, n)[None, :]
    return slopes


@triton.jit
def _met(grad: tl.tensor, index: tl.constexpr, o: tl.tensor, i: tl.tensor, n: tl.constexpr) -> tl.tensor:
    """Sum the entries of a gradient where a permutation has its ones."""
    return total(total(grad * tl.where(_moves(index, o, i, n), 1.0, 0.0), 0), 0)


@triton.jit
def _factor(stay: tl.tensor, index: tl.constexpr, o: tl.tensor, i: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """Return one factor's entries [out, in, tokens]: `stay` [tokens] where its bit of o and i agrees, else the rest."""
    apart = ((o ^ i) >> (COUNT - 1 - index)) & 1
    return tl.where(apart == 0, stay[None, None, :], 1.0 - stay[None, None, :])


@triton.jit
def kronecker(stay: tl.tensor, row: tl.tensor, o: tl.tensor, i: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """Return [out, in, tokens]: the Kronecker product of [[a, 1 - a], [1 - a, a]] for a in [rows, tokens]."""
    matrix = _factor(_picked(stay, row, 0), 0, o, i, COUNT)
    for index in tl.static_range(1, COUNT):
        matrix *= _factor(_picked(stay, row, index), index, o, i, COUNT)
    return matrix


@triton.jit
def kronecker_backward(
    grad: tl.tensor, stay: tl.tensor, row: tl.tensor, o: tl.tensor, i: tl.tensor, COUNT: tl.constexpr
) -> tl.tensor:
    """Return the gradient [rows, tokens] of `stay`; the padding of `grad` must be zero."""
    slopes = stay * 0.0
    for index in tl.static_range(COUNT):
        apart = ((o ^ i) >> (COUNT - 1 - index)) & 1
        through = grad * tl.where(apart == 0, 1.0, -1.0)
        for other in tl.static_range(COUNT):
            if other != index:
                through *= _factor(_picked(stay, row, other), other, o, i, COUNT)
        slopes += tl.where(row == index, 1.0, 0.0) * total(total(through, 0), 0)[None, :]
    return slopes
