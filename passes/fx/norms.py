"""Norms that read one value alone: LayerNorm and RMSNorm as functions, and RMSNorm as models write it out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .dataflow import CAST_NAMES, op_name, operands, shape_of, tensor_of

_PRODUCTS = {"mul", "multiply"}


@dataclass(frozen=True)
class Norm:
    """A norm that reads a layer input.

    Attributes:
        weight: [C], None for one without.
        bias: [C], None for one without.
        eps: added to the mean square.
        centered: it is LayerNorm.
        nodes: all of it, in graph order; the last one is the normed value.
    """

    weight: Node | None
    bias: Node | None
    eps: float
    centered: bool
    nodes: tuple[Node, ...]

    @property
    def vectors(self) -> tuple[Node, ...]:
        """Those of weight and bias that there are."""
        return tuple(vector for vector in (self.weight, self.bias) if vector is not None)


def norm_of(value: Node, readers: Collection[Node]) -> Norm | None:
    """Return the norm over the last dimension that `readers`, those of a value that count, are all of."""
    width = shape_of(value)[-1]
    norm = _functional(value, readers) or _written_out(value, readers)
    if norm is None or not isinstance(width, int):
        return None
    same = shape_of(norm.nodes[-1]) == shape_of(value)
    return norm if same and all(shape_of(vector) == (width,) for vector in norm.vectors) else None


def made_late(norm: Norm, begin: int, order: dict[Node, int]) -> tuple[Node, ...] | None:
    """Return what makes a norm's weight and bias from position `begin` on, in graph order.

    Those are casts and added numbers, such as Gemma's `1 + weight`, which may as well run earlier; None where it takes
    more.
    """
    found: set[Node] = set()
    for vector in norm.vectors:
        while order[vector] >= begin:
            source = vector.args[0] if op_name(vector) in CAST_NAMES else _added_to(vector)
            if not isinstance(source, Node) or set(vector.all_input_nodes) != {source}:
                return None
            found.add(vector)
            vector = source
    return tuple(sorted(found, key=order.__getitem__))


_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


def _functional(value: Node, readers: Collection[Node]) -> Norm | None:
    node = next(iter(readers)) if len(readers) == 1 else None
    names = _ARGUMENTS.get(op_name(node)) if node is not None else None
    if node is None or names is None or len(node.args) > len(names):
        return None
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    centered = "bias" in names
    eps = given.get("eps", 1e-5 if centered else None)
    # Without an epsilon RMSNorm takes that of a dtype, which depends on how it is run.
    if len(tuple(given["normalized_shape"])) != 1 or not isinstance(eps, int | float) or given["input"] is not value:
        return None
    return Norm(given.get("weight"), given.get("bias"), float(eps), centered, (node,))


def _written_out(value: Node, readers: Collection[Node]) -> Norm | None:
    """Match `weight * (x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))`, with casts in between."""
    same = [value, *(reader for reader in readers if _casts(reader, value, value))]
    read = [(member, user) for member in same for user in (readers if member is value else member.users)]
    squares = [user for member, user in read if _is_square(user, member)]
    mean = _only_user(squares[0]) if len(squares) == 1 else None
    raised = _only_user(mean) if mean is not None and _is_mean_of_last(mean) else None
    eps = _added_number(raised) if raised is not None else None
    inverse = _only_user(raised) if raised is not None and eps is not None else None
    product = _only_user(inverse) if inverse is not None and _is_inverse_root(inverse, raised) else None
    if product is None or eps is None or _partner(product, inverse) not in same:
        return None
    casts = [*_casts_behind(product, value)]
    scaled = _only_user([product, *casts][-1])
    weight = _partner(scaled, [product, *casts][-1]) if scaled is not None else None
    if scaled is None or weight is None:
        return None
    ends = [*_casts_behind(scaled, value)]
    while ends and _dtype(ends[-1]) != _dtype(value):
        ends.pop()
    chain = (*same[1:], squares[0], mean, raised, inverse, product, *casts, scaled, *ends)
    nodes = tuple(node for node in chain if node is not None)
    alone = all(user in nodes for _, user in read)
    return Norm(weight, None, float(eps), False, nodes) if alone else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _casts(node: Node, source: Node, value: Node) -> bool:
    """Return whether a node casts `source` to the dtype of `value` or to one that holds more: no integers, say."""
    plain, cast = tensor_of(value), tensor_of(node)
    if op_name(node) not in CAST_NAMES or node.args[0] is not source or plain is None or cast is None:
        return False
    # `type_as` reads another tensor for its dtype.
    if any(read not in (source, value) for read in node.all_input_nodes):
        return False
    return cast.dtype in (plain.dtype, torch.float32, torch.float64) and cast.device == plain.device


def _casts_behind(node: Node, value: Node) -> Iterator[Node]:
    """Yield casts of a node, each the only reader of the one before."""
    user = _only_user(node)
    while user is not None and _casts(user, node, value):
        yield user
        node, user = user, _only_user(user)


def _is_square(node: Node, value: Node) -> bool:
    name = op_name(node)
    if name == "pow":
        return operands(node) == (value, 2)
    return name == "square" or (name in _PRODUCTS and operands(node) == (value, value))


def _is_inverse_root(node: Node, value: Node | None) -> bool:
    return op_name(node) == "rsqrt" or (op_name(node) == "pow" and operands(node) == (value, -0.5))


def _is_mean_of_last(node: Node) -> bool:
    arguments: dict[str, Any] = {**dict(zip(("input", "dim", "keepdim"), node.args, strict=False)), **node.kwargs}
    dim = arguments.get("dim")
    dims = dim if isinstance(dim, list | tuple) else (dim,)
    last = len(shape_of(node)) - 1
    return op_name(node) == "mean" and arguments.get("keepdim") is True and tuple(dims) in ((-1,), (last,))


def _added_number(node: Node) -> float | None:
    if op_name(node) != "add" or "alpha" in node.kwargs:
        return None
    return next((operand for operand in operands(node) if isinstance(operand, int | float)), None)


def _added_to(node: Node) -> Node | None:
    """Return what a number is added to."""
    if _added_number(node) is None:
        return None
    return next((operand for operand in operands(node) if isinstance(operand, Node)), None)


def _partner(node: Node, operand: Node | None) -> Node | None:
    """Return what a product multiplies an operand with."""
    left, right = operands(node)
    if op_name(node) not in _PRODUCTS or operand not in (left, right):
        return None
    other = right if left is operand else left
    return other if isinstance(other, Node) else None


def _dtype(node: Node) -> Any:
    tensor = tensor_of(node)
    return tensor.dtype if tensor is not None else None
