"""In which dimension of a residual add's result the features lie. Reads only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .dataflow import holds_data, is_parameter_expression, op_name, operands, shape_of, size_hint, tensor_of

_LAST = {"linear", "layer_norm", "rms_norm", "addmm", "embedding"}
_CHANNELS_FIRST_NAMES = {"batch_norm", "group_norm", "instance_norm"}
# Counted from behind by the number of dimensions that they run over.
_SPATIAL = re.compile(r"(?:conv|pool)\w*?(\d)d")
_PRODUCTS = {"matmul", "bmm", "mm"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
_PERMUTES = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t"}
_PERMUTING_ATTRIBUTES = {"T", "mT", "H", "mH"}

# Nodes between what makes a branch's features and the add.
_LONGEST_EXIT = 24


@dataclass(frozen=True)
class _Features:
    """Where a value of some sizes holds features.

    Attributes:
        dims: in none of its dimensions, as attention scores, in one, or in two.
        sizes: of all its dimensions.
        merged: features that a reshape has merged with other dimensions or split: the number of entries in front of
            them, and theirs. Another reshape may bring them back.
    """

    dims: frozenset[int]
    sizes: tuple[int, ...]
    merged: frozenset[tuple[int, int]] = frozenset()


def feature_dim_of(add: Node, branch: Node) -> int:
    """Return the dimension of an add's result that holds features, counted from the front.

    Convolutions put features before the dimensions that they run over, batch norms in dimension 1, linear maps and
    layer norms last, products where the operand with features has them. From there the dimension is followed through
    permutes and reshapes to the end of the branch. A factor or a term beside them has none to give. Where it cannot be
    told, as behind heads that are put together again, it is the last.
    """
    tensor = tensor_of(add)
    assert tensor is not None
    found = _Walk().features(branch, _LONGEST_EXIT)
    last = tensor.dim() - 1
    return max((dim for dim in found.dims if dim <= last), default=last) if found is not None else last


class _Walk:
    """Follows values back to what made their features."""

    def __init__(self) -> None:
        self.known: dict[Node, _Features | None] = {}

    def features(self, node: Node, limit: int) -> _Features | None:
        """Return where a value has features, None where that cannot be told."""
        if node not in self.known:
            self.known[node] = None
            self.known[node] = self._found(node, limit) if limit else None
        return self.known[node]

    def _found(self, node: Node, limit: int) -> _Features | None:
        dim = _dim_made(node)
        if dim is not None:
            return _Features(frozenset({dim}), _hints(node))
        letters = _letters(node)
        if letters is not None:
            return self._multiplied(node, *letters, limit)
        for source in _sources(node):
            before = self.features(source, limit - 1)
            if before is not None and (before.dims or before.merged):
                return _behind(node, before)
        return None

    def _multiplied(self, node: Node, factors: Sequence[tuple[Node, str]], result: str, limit: int) -> _Features | None:
        """Return where a product has features: what its factors have and it does not sum over.

        Learned weights make new ones, in what only they have; else they scale.
        """
        data = [(factor, letters) for factor, letters in factors if not is_parameter_expression(factor)]
        held = "".join(letters for _, letters in data)
        made = {letter for factor, letters in factors if is_parameter_expression(factor) for letter in letters}
        kept = made - set(held)
        unknown = False
        if not kept & set(result):
            for factor, letters in data:
                found = self.features(factor, limit - 1)
                unknown |= found is None or bool(found.merged)
                kept |= {letters[dim] for dim in found.dims} if found is not None else set()
        dims = frozenset(dim for dim, letter in enumerate(result) if letter in kept)
        return None if unknown and not dims else _Features(dims, _hints(node))


def _dim_made(node: Node) -> int | None:
    """Return the dimension that an operation puts its features in, None for one that makes none."""
    tensor, name = tensor_of(node), op_name(node)
    if tensor is None:
        return None
    if name in _LAST:
        return tensor.dim() - 1
    spatial = _SPATIAL.search(name)
    if spatial is not None:
        return tensor.dim() - 1 - int(spatial[1])
    return 1 if name in _CHANNELS_FIRST_NAMES or "conv" in name else None


def _letters(node: Node) -> tuple[list[tuple[Node, str]], str] | None:
    """Return a product's factors, each with a letter a dimension, and the letters of the result; None for others."""
    name = op_name(node)
    if tensor_of(node) is None:
        return None
    if name in _PRODUCTS:
        left, right = operands(node)
        ranks = len(shape_of(left)), len(shape_of(right))
        if min(ranks) < 2:
            return None
        batch = "abcdefgh"[: max(ranks) - 2]
        letters = (batch[len(batch) - rank + 2 :] + end for rank, end in zip(ranks, ("xy", "yz"), strict=True))
        return list(zip((left, right), letters, strict=True)), batch + "xz"
    if name == "einsum" and isinstance(node.args[0], str):
        terms, arrow, result = node.args[0].replace(" ", "").partition("->")
        factors = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
        pairs = list(zip(factors, terms.split(","), strict=False))
        if arrow and all(len(term) == len(shape_of(factor)) for factor, term in pairs):
            return pairs, result
    return None


def _sources(node: Node) -> Iterable[Node]:
    """Yield the inputs that a node may have its features from, those of its own shape first."""
    inputs = [source for source in node.all_input_nodes if holds_data(source) and not is_parameter_expression(source)]
    return sorted(inputs, key=lambda source: shape_of(source) != shape_of(node))


def _behind(node: Node, before: _Features) -> _Features | None:
    """Return where features lie behind an operation that makes none; None where it has summed them."""
    if tensor_of(node) is None:
        # Several values at once: the one that is picked shows its sizes.
        return before
    after = _hints(node)
    if op_name(node) in _RESHAPES:
        return _reshaped(before, after)
    order = _order(node, len(before.sizes))
    if order is not None:
        return _Features(frozenset(map(order.index, before.dims)), after)
    if len(after) == len(before.sizes):
        return _Features(before.dims, after, before.merged if after == before.sizes else frozenset())
    kept = (_kept(dim, before.sizes, after) for dim in before.dims)
    dims = frozenset(dim for dim in kept if dim is not None)
    return _Features(dims, after) if dims else None


def _reshaped(before: _Features, after: tuple[int, ...]) -> _Features:
    """Return where features lie behind a reshape: as large, with as many entries in front of them."""
    spans = {(math.prod(before.sizes[:dim]), before.sizes[dim]) for dim in before.dims} | before.merged
    places: dict[tuple[int, int], int] = {}
    for dim, size in enumerate(after):
        places.setdefault((math.prod(after[:dim]), size), dim)
    dims = frozenset(places[span] for span in spans if span in places)
    return _Features(dims, after, frozenset(span for span in spans if span not in places))


def _hints(node: Node) -> tuple[int, ...]:
    tensor = tensor_of(node)
    assert tensor is not None
    return tuple(size_hint(size) for size in tensor.shape)


def _order(node: Node, rank: int) -> list[int] | None:
    """Return for each dimension of a permute's result the one that it was, None for any other node."""
    attribute = op_name(node) == "getattr" and node.args[1] in _PERMUTING_ATTRIBUTES
    if not (attribute or op_name(node) in _PERMUTES):
        return None
    # Run on sizes that tell the dimensions apart: the values' own may be equal.
    sizes = list(range(2, rank + 2))
    example = torch.empty(sizes, device="meta")
    target: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    keywords = {name: value for name, value in node.kwargs.items() if name != "input"}
    permuted = target(example, *node.args[1:], **keywords)
    return [sizes.index(size) for size in permuted.shape]


def _kept(dim: int, before: Sequence[int], after: Sequence[int]) -> int | None:
    """Return where a dimension lies once others were taken away or put in: counted from behind, or from the front."""
    shifted = dim + len(after) - len(before)
    if shifted >= 0 and list(after[shifted:]) == list(before[dim:]):
        return shifted
    return dim if list(after[: dim + 1]) == list(before[: dim + 1]) else None
