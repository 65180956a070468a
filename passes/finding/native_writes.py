"""The write of a site that a model spells itself: X'_o = Σ_i res[o, i] X_i + post_o · branch, known by sizes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...kernels import reference
from ..fx.dataflow import CAST_NAMES, VIEW_NAMES, data_inputs, is_float, op_name, operands, shape_of, tensor_of
from .native_cuts import Surroundings
from .native_pieces import Cut, Piece
from .native_proof import Mismatch, first_difference

# As in `kernels.manifolds`: what the operators cover.
_MOST_STREAMS = 8
_DEEPEST = 10
_INDEXING = {"getitem"}
_REPEATING = {"expand", "repeat", "expand_as", "broadcast_to", "getitem"}
_REORDERING = {"transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "rearrange"}


@dataclass(frozen=True)
class Write:
    """A sum that has the form of a write.

    Attributes:
        node: the new streams [*, n, C].
        cut: the streams that it reads.
        branch: [*, C].
        post: [*, n].
        res: [*, n, n]; None where the streams are added as they are.
    """

    node: Node
    cut: Cut
    branch: Node
    post: Node
    res: Node | None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """Its operands."""
        return tuple(node for node in (self.cut.node, self.branch, self.post, self.res) if node is not None)

    def difference(self, piece: Piece, by_rows: bool) -> Mismatch | None:
        """Return how the write differs from `post` on random float64 inputs, in value or gradient; None if it does not.

        Args:
            piece: from `inputs` to the new streams.
            by_rows: take `res` for res[out, in]; else for its transpose.
        """
        drawn = {node: value.requires_grad_() for node, value in piece.drawn(0, 1.0, 1.0).items()}
        given = [drawn[node] for node in self.inputs]
        theirs = piece.run(dict(drawn))[self.node]
        streams, branch, post = given[:3]
        res = given[3] if self.res is not None else torch.eye(self.cut.n_streams, dtype=torch.float64)
        tokens = streams.shape[:-2]
        res = res if by_rows else res.mT
        if self.res is not None:
            res = res.reshape(*tokens, *res.shape[-2:])
        ours = reference.post(streams, branch.reshape(*tokens, -1), post.reshape(*tokens, -1), res)
        return first_difference(["the write"], [theirs.reshape(ours.shape)], [ours], given)


def cut_of(node: Node) -> Cut | None:
    """Return a value as streams [*, n, C], if by its shape it may be some."""
    shape = shape_of(node)
    if len(shape) < 3 or not all(isinstance(size, int) for size in shape[-2:]) or not 2 <= shape[-2] <= _MOST_STREAMS:
        return None
    return Cut(node, tuple(shape[:-2]), shape[-2], shape[-1]) if shape[-1] != shape[-2] else None


def writes_of(node: Node, surroundings: Surroundings) -> Iterator[Write]:
    """Yield what an add may be a write of, the likely first: nothing, where no operand is a branch spread by post.

    How the streams are mixed is seen where it is a product of a matrix and the streams; else matrices that the other
    operand may be made with are tried.
    """
    left, right = operands(node)
    cut = cut_of(node)
    if cut is None or not isinstance(left, Node) or not isinstance(right, Node):
        return
    n, width = cut.n_streams, cut.width
    for spread, rest in ((left, right), (right, left)):
        outer = _factors(spread, cut, n, width)
        if outer is None:
            continue
        post, branch = _source(outer[0], cut.per_token(n)), _source(outer[1], cut.per_token(width), narrow=False)
        if post is None:
            continue
        mixed = _factors(rest, cut, n * n, cut.flat)
        res = _source(mixed[0], cut.per_token(n, n)) if mixed is not None else None
        streams = _uncast(mixed[1] if mixed is not None else rest, cut)
        if streams is not None and (mixed is None or res is not None):
            whole = _with_all_tokens(Cut(streams, cut.tokens, n, width))
            value = _source(outer[1], whole.per_token(width), narrow=False) or branch
            if value is not None:
                yield Write(node, whole, value, post, res)
        if branch is not None:
            for source, matrix in surroundings.mixings(rest, cut):
                yield Write(node, source, branch, post, matrix)


def _with_all_tokens(cut: Cut) -> Cut:
    """Return streams [tokens, n, C] as the value that they are a view of, where batch and tokens lie apart."""
    node = cut.node
    while len(cut.tokens) == 1 and op_name(node) in (VIEW_NAMES | CAST_NAMES) - _REORDERING:
        source = node.args[0]
        shape = shape_of(source)
        if not isinstance(source, Node) or math.prod(shape[:-2]) != cut.tokens[0]:
            break
        if len(shape) > 3 and shape[-2:] == (cut.n_streams, cut.width):
            return Cut(source, tuple(shape[:-2]), cut.n_streams, cut.width)
        node = source
    return cut


def _factors(node: Node, cut: Cut, small: int, large: int) -> tuple[Node, Node] | None:
    """Return the two factors of a product, by their entries a token; None if a value is no such product.

    What lies behind the product may be views and casts, and a sum over a dimension that only the product has.
    """
    for _ in range(_DEEPEST):
        inputs = [source for source in data_inputs(node) if is_float(source)]
        if len(inputs) != 1:
            break
        if _size(inputs[0], cut) not in (cut.flat, cut.flat * cut.n_streams):
            return None
        node = inputs[0]
    if node.op not in ("call_function", "call_method") or len(inputs) != 2:
        return None
    for first, second in (inputs, inputs[::-1]):
        factors = _unspread(first, cut, small), _unspread(second, cut, large)
        if factors[0] is not None and factors[1] is not None:
            return factors[0], factors[1]
    return None


def _unspread(node: Node, cut: Cut, size: int) -> Node | None:
    """Return the value with so many entries a token that another is, or that it repeats."""
    for _ in range(_DEEPEST):
        if _size(node, cut) == size:
            return node
        if op_name(node) not in _REPEATING | VIEW_NAMES or not isinstance(node.args[0], Node):
            return None
        node = node.args[0]
    return None


def _size(node: Node, cut: Cut) -> int:
    """Return the number of entries a token of a value; -1 where it is not per token."""
    shape = shape_of(node)
    rest = shape[len(cut.tokens) :]
    if shape[: len(cut.tokens)] != cut.tokens or not all(isinstance(size, int) for size in rest):
        return -1
    return math.prod(rest)


def _uncast(node: Node, cut: Cut) -> Node | None:
    """Return the streams that a value is a cast of; None if it has not their shape."""
    while op_name(node) in CAST_NAMES and isinstance(node.args[0], Node) and is_float(node.args[0]):
        node = node.args[0]
    return node if shape_of(node) == cut.per_token(cut.n_streams, cut.width) else None


def _source(node: Node, shape: tuple[Any, ...], narrow: bool = True) -> Node | None:
    """Return the first value of this shape that a value is a view or a cast of, up to a transpose.

    Args:
        node: the value.
        shape: as expressions.
        narrow: undo casts to a narrower dtype, too.
    """
    best = node if shape_of(node) == shape else None
    while op_name(node) in VIEW_NAMES | CAST_NAMES | _INDEXING and node.args and isinstance(node.args[0], Node):
        source = node.args[0]
        before, behind = tensor_of(source), tensor_of(node)
        if before is None or behind is None or op_name(node) in _REORDERING:
            break
        if op_name(node) in CAST_NAMES and not narrow and before.dtype.itemsize > behind.dtype.itemsize:
            break
        node = source
        if shape_of(node) == shape:
            best = node
    return best
