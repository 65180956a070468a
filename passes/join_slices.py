"""Recognize a value that is cut into slices and put together again: the concatenation is the value itself.

Blocks that work on two sequences at once, such as Flux's single blocks, hand them on apart and join them anew; the
stream between two blocks is one all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .fx.dataflow import op_name, tensor_of

_CATS = {torch.cat, torch.concat, torch.concatenate}
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "setitem"}


def joined_whole(node: Node) -> Node | None:
    """Return the value whose slices, all of them and in order, a node concatenates; None for any other node.

    Nothing may change that value, its slices or the result in place: they would share memory then, and did not before.
    """
    args: Any = node.args
    if node.op != "call_function" or node.target not in _CATS or not args or not isinstance(args[0], list | tuple):
        return None
    parts = list(args[0])
    dim = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
    result = tensor_of(node)
    if result is None or not isinstance(dim, int) or len(parts) < 2:
        return None
    cuts = [_slice(part, dim % result.dim()) for part in parts]
    if any(cut is None or cut.source is not cuts[0].source for cut in cuts if cuts[0] is not None) or cuts[0] is None:
        return None
    ends = [None, *(cut.stop for cut in cuts if cut is not None)]
    starts = [*(cut.start for cut in cuts if cut is not None), None]
    source = cuts[0].source
    whole = tensor_of(source)
    if ends != starts or any(end is None for end in ends[1:-1]) or source.op == "placeholder" or whole is None:
        return None
    # By the sizes, too: a slice that ends beyond the next one's start would show a piece twice.
    sizes = zip(whole.shape, result.shape, strict=False)
    same = len(whole.shape) == len(result.shape) and all(bool(left == right) for left, right in sizes)
    readers = (user for one in (source, node, *parts) for user in one.users)
    return source if same and not any(_writes(user) for user in readers) else None


def _writes(user: Node) -> bool:
    """Return whether a node may change an operand in place."""
    name = op_name(user)
    return user.kwargs.get("inplace") is True or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


@dataclass(frozen=True)
class _Cut:
    """`source[:, start:stop]` with the slice at one dim; an open end is None."""

    source: Node
    start: Any
    stop: Any


def _slice(part: Any, dim: int) -> _Cut | None:
    if not isinstance(part, Node) or op_name(part) != "getitem" or len(part.args) < 2:
        return None
    source: Any = part.args[0]
    index: Any = part.args[1]
    value = tensor_of(source) if isinstance(source, Node) else None
    if value is None:
        return None
    index = list(index) if isinstance(index, tuple | list) else [index]
    if Ellipsis in [entry for entry in index if not isinstance(entry, Node)]:
        place = index.index(Ellipsis)
        index[place : place + 1] = [slice(None)] * (value.dim() - len(index) + 1)
    if len(index) <= dim or any(not isinstance(entry, slice) for entry in index):
        return None
    cut = index.pop(dim)
    if cut.step is not None or any((entry.start, entry.stop, entry.step) != (None, None, None) for entry in index):
        return None
    return _Cut(source, cut.start, cut.stop)
