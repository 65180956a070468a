"""In which dimension of a residual add's result the features lie. Reads only."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from .dataflow import holds_data, is_parameter_expression, op_name, shape_of, size_hint, tensor_of

_LAST = {"linear", "matmul", "layer_norm", "rms_norm", "addmm", "embedding"}
_CHANNELS_FIRST_NAMES = {"batch_norm", "group_norm", "instance_norm"}
# Counted from behind by the number of dimensions that they run over.
_SPATIAL = re.compile(r"(?:conv|pool)\w*?(\d)d")
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
_PERMUTES = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t"}
_PERMUTING_ATTRIBUTES = {"T", "mT", "H", "mH"}

# Nodes between what makes a branch's features and the add.
_LONGEST_EXIT = 24


def feature_dim_of(add: Node, branch: Node) -> int:
    """Return the dimension of an add's result that holds features, counted from the front.

    Follows the branch back to the operation that produced its features, convolutions before the dimensions that they
    run over, batch norms in dimension 1, linear maps and layer norms last, and that dimension forward again through the
    permutes and reshapes in between. A factor or a term beside them has produced nothing. Where it cannot be told, as
    behind a view that splits the features, it is the last.
    """
    tensor = tensor_of(add)
    assert tensor is not None
    passed: list[Node] = []
    node: Node | None = branch
    while node is not None and len(passed) < _LONGEST_EXIT:
        dim = _dim_made(node)
        if dim is not None:
            found = _followed(dim, node, passed)
            return tensor.dim() - 1 if found is None else found
        passed.append(node)
        node = _features_before(node)
    return tensor.dim() - 1


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


def _features_before(node: Node) -> Node | None:
    """Return the input that a node has its features from: of several, the one of its own shape."""
    inputs = [source for source in node.all_input_nodes if holds_data(source) and not is_parameter_expression(source)]
    whole = (source for source in inputs if shape_of(source) == shape_of(node))
    return next(whole, next(iter(inputs), None))


def _followed(dim: int, made: Node, passed: Sequence[Node]) -> int | None:
    """Return where a dimension of `made` lies behind the last of `passed`, None where it cannot be told."""
    before = _hints(made)
    at: int | None = dim
    for node in reversed(passed):
        if tensor_of(node) is None:
            # Several values at once: the one that is picked shows its sizes.
            continue
        after = _hints(node)
        order = _order(node, len(before))
        if order is not None:
            at = order.index(at)
        elif op_name(node) in _RESHAPES:
            at = _reshaped(at, before, after)
        elif len(after) != len(before):
            at = _kept(at, before, after)
        if at is None:
            return None
        before = after
    return at


def _hints(node: Node) -> list[int]:
    tensor = tensor_of(node)
    assert tensor is not None
    return [size_hint(size) for size in tensor.shape]


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


def _reshaped(dim: int, before: Sequence[int], after: Sequence[int]) -> int | None:
    """Return where a dimension lies behind a reshape: as large, with as many entries in front of it."""
    size, front = before[dim], math.prod(before[:dim])
    fitting = (new for new, wide in enumerate(after) if wide == size and math.prod(after[:new]) == front)
    return next(fitting, None)


def _kept(dim: int, before: Sequence[int], after: Sequence[int]) -> int | None:
    """Return where a dimension lies once others were taken away or put in: counted from behind, or from the front."""
    shifted = dim + len(after) - len(before)
    if shifted >= 0 and list(after[shifted:]) == list(before[dim:]):
        return shifted
    return dim if list(after[: dim + 1]) == list(before[: dim + 1]) else None
