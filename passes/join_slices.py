"""Recognize a value that is cut into slices and put together again: the concatenation is the value itself.

Blocks that work on two sequences at once, such as Flux's single blocks, hand them on apart and join them anew; the
stream between two blocks is one all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .fx.dataflow import op_name, tensor_of

_CATS = {torch.cat, torch.concat, torch.concatenate}


def joined_whole(node: Node) -> Node | None:
    """Return the value whose slices, all of them and in order, a node concatenates; None for any other node.

    Nothing may change that value, its slices or the result in place: they would share memory then, and did not before.
    """
    if (
        node.op != "call_function"
        or node.target not in _CATS
        or not node.args
        or not isinstance(node.args[0], list | tuple)
    ):
        return None
    parts = list(node.args[0])
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    result = tensor_of(node)
    if result is None or not isinstance(dim, int) or len(parts) < 2:
        return None
    dim %= result.dim()
    source, at = None, None
    for part in parts:
        cut = _slice(part, dim)
        if cut is None or (source is not None and cut[0] is not source) or cut[1] != at:
            return None
        source, at = cut[0], cut[2]
        if at is None and part is not parts[-1]:
            return None
    whole = tensor_of(source) if source is not None else None
    if source is None or at is not None or whole is None or source.op == "placeholder":
        return None
    # By the sizes, too: a slice that ends beyond the next one's start would show a piece twice.
    same = len(whole.shape) == len(result.shape) and all(
        bool(left == right) for left, right in zip(whole.shape, result.shape, strict=True)
    )
    family = [source, node, *(part for part in parts if isinstance(part, Node))]
    changed = any(
        op_name(user).endswith("_") and not op_name(user).endswith("__") for one in family for user in one.users
    )
    inplace = any(user.kwargs.get("inplace") is True or op_name(user).startswith("i") and op_name(user) in _IN_PLACE
                  for one in family for user in one.users)  # fmt: skip
    return source if same and not changed and not inplace else None


_IN_PLACE = {"iadd", "isub", "imul", "itruediv"}


def _slice(part: Any, dim: int) -> tuple[Node, Any, Any] | None:
    """Return value, start and stop of `value[:, start:stop]` with the slice at `dim`; an open end is None."""
    if not isinstance(part, Node) or op_name(part) != "getitem" or len(part.args) < 2:
        return None
    source, index = part.args[:2]
    index = index if isinstance(index, tuple | list) else (index,)
    value = tensor_of(source) if isinstance(source, Node) else None
    if value is None or not isinstance(source, Node):
        return None
    if Ellipsis in [entry for entry in index if not isinstance(entry, Node)]:
        place = list(index).index(Ellipsis)
        index = (*index[:place], *[slice(None)] * (value.dim() - len(index) + 1), *index[place + 1 :])
    if len(index) <= dim or any(not isinstance(entry, slice) for entry in index):
        return None
    others = [entry for number, entry in enumerate(index) if number != dim]
    if any((entry.start, entry.stop, entry.step) != (None, None, None) for entry in others):
        return None
    cut = index[dim]
    return None if cut.step is not None else (source, cut.start, cut.stop)
