"""Spell every residual add the same way: `operator.add(left, right)` that returns a new value.

Handles `torch.add` and `Tensor.add` (with `alpha`), `addcmul`, `operator.iadd` and `Tensor.add_`. An in-place add
becomes an ordinary one where no alias of the changed value is read afterwards; elsewhere it stays, and the finder
says so. Other elementwise operations in place likewise: a branch that begins with `relu_(x)` changes the skip, too.
Slices that are put together again are the value that they were cut from.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .fx.dataflow import is_float, is_in_place_add, is_sentinel, op_name, tensor_of
from .fx.graph_copy import copy_node, module_like
from .join_slices import joined_whole

_OUT_OF_PLACE_ADDS = {torch.add, "add"}
_ADDCMULS = {torch.addcmul, "addcmul"}

# Other in-place operations on single elements; those that take `inplace=True` are known by it.
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.imul: operator.mul, operator.itruediv: operator.truediv, operator.isub: operator.sub,
    torch.relu_: torch.relu, torch.tanh_: torch.tanh, torch.sigmoid_: torch.sigmoid, torch.clamp_: torch.clamp,
    **{f"{name}_": name for name in ("mul", "div", "sub", "relu", "tanh", "sigmoid", "clamp", "neg")},
}  # fmt: skip

# What may return its input itself, or a view of it.
_ALIASING_NAMES = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "moveaxis", "squeeze", "unsqueeze",
    "swapaxes", "swapdims", "t", "view_as", "reshape_as", "contiguous", "alias", "detach", "to", "float", "half",
    "bfloat16", "double", "type", "type_as", "dropout", "getitem", "chunk", "split", "unbind", "expand", "expand_as",
    "select", "narrow", "real", "imag", "diagonal", "iadd", "add_", "mul_", "imul", "relu_", "clamp_", "masked_fill_",
    "tensor_split", "unfold", "broadcast_to", "slice",
}  # fmt: skip


def normalize(graph_module: GraphModule) -> GraphModule:
    """Return a copy of the graph in which each add that can be has the one spelling.

    Sentinels (`mhc::sentinel`) are dropped: `read_sentinels` has read them by now.
    """
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    graph = Graph()
    values: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        if is_sentinel(node):
            continue
        whole = joined_whole(node)
        if whole is not None:
            values[node] = values[whole]
            continue
        replacement = _respelled(graph, node, values)
        if replacement is None and _changes_in_place(node) and _can_leave_place(node, order):
            replacement = (_add_out_of_place if is_in_place_add(node) else _out_of_place)(graph, node, values)
            # Later readers of the changed value must see the change.
            values[node.args[0]] = replacement
        values[node] = replacement or copy_node(graph, node, values.__getitem__)
    return module_like(graph_module, graph)


def _respelled(graph: Graph, node: Node, values: dict[Node, Node]) -> Node | None:
    """Emit `torch.add`, `Tensor.add` or `addcmul` as `operator.add`; None for any other node."""
    if node.op not in ("call_function", "call_method") or not is_float(node):
        return None
    mapped_args: tuple[Any, ...] = torch.fx.node.map_arg(node.args, values.__getitem__)
    keywords: dict[str, Any] = dict(torch.fx.node.map_arg(dict(node.kwargs), values.__getitem__))
    if node.target in _OUT_OF_PLACE_ADDS:
        if keywords.pop("out", None) is not None:
            return None
        alpha = keywords.pop("alpha", 1)
        left, right = _two(mapped_args, keywords)
        if left is None or right is None:
            return None
        if alpha != 1:
            right = _emit(graph, node, operator.mul, (right, alpha), tensor_of(right))
        return _emit(graph, node, operator.add, (left, right), tensor_of(node))
    if node.target in _ADDCMULS and len(mapped_args) == 3 and set(keywords) <= {"value"}:
        base, left, right = mapped_args
        product = _emit(graph, node, operator.mul, (left, right), tensor_of(node))
        if keywords.get("value", 1) != 1:
            product = _emit(graph, node, operator.mul, (product, keywords["value"]), tensor_of(node))
        return _emit(graph, node, operator.add, (base, product), tensor_of(node))
    return None


def _two(args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
    found = [*args, *(keywords[name] for name in ("input", "other") if name in keywords)]
    return (found[0], found[1]) if len(found) == 2 else (None, None)


def _add_out_of_place(graph: Graph, node: Node, values: dict[Node, Node]) -> Node:
    """Emit an in-place add as an ordinary one, cast back where the in-place form would not promote."""
    left, right = node.args[:2]
    assert isinstance(left, Node)
    mapped_left = values[left]
    mapped_right = values[right] if isinstance(right, Node) else right
    if node.kwargs.get("alpha", 1) != 1:
        mapped_right = _emit(graph, node, operator.mul, (mapped_right, node.kwargs["alpha"]), tensor_of(right))
    left_tensor, right_tensor = tensor_of(left), tensor_of(right)
    assert left_tensor is not None
    promoted = torch.result_type(left_tensor, right_tensor) if right_tensor is not None else left_tensor.dtype
    if promoted != left_tensor.dtype and isinstance(mapped_right, Node):
        cast = right_tensor.to(left_tensor.dtype) if right_tensor is not None else None
        mapped_right = _emit(graph, node, "to", (mapped_right, left_tensor.dtype), cast)
    return _emit(graph, node, operator.add, (mapped_left, mapped_right), tensor_of(node))


def _changes_in_place(node: Node) -> bool:
    """Return whether a node changes its first operand, which a stream may be, element by element."""
    if is_in_place_add(node):
        return True
    if node.op not in ("call_function", "call_method") or tensor_of(node) is None:
        return False
    elementwise = node.target in _OUT_OF_PLACE or node.kwargs.get("inplace") is True
    return elementwise and tensor_of(node.args[0]) is not None and _keeps_dtype(node)


def _keeps_dtype(node: Node) -> bool:
    """Return whether the out-of-place form has the same dtype: the in-place one would not promote."""
    tensors = [tensor_of(operand) for operand in node.args if tensor_of(operand) is not None]
    return all(tensor.dtype == tensors[0].dtype for tensor in tensors if tensor is not None and tensors[0] is not None)


def _out_of_place(graph: Graph, node: Node, values: dict[Node, Node]) -> Node:
    """Emit an in-place activation or product as an ordinary one."""
    args: tuple[Any, ...] = torch.fx.node.map_arg(node.args, values.__getitem__)
    keywords: dict[str, Any] = dict(torch.fx.node.map_arg(dict(node.kwargs), values.__getitem__))
    keywords.pop("inplace", None)
    target: Any = _OUT_OF_PLACE.get(node.target, node.target)
    kind = "call_method" if isinstance(target, str) else "call_function"
    emitted = graph.create_node(kind, target, args, keywords, name=node.name)
    emitted.meta = dict(node.meta)
    return emitted


def _emit(graph: Graph, origin: Node, target: Any, args: tuple[Any, ...], example: Any) -> Node:
    kind = "call_method" if isinstance(target, str) else "call_function"
    emitted = graph.create_node(kind, target, args, {}, name=origin.name)
    emitted.meta = {**origin.meta, "example_value": example}
    return emitted


def _can_leave_place(node: Node, order: dict[Node, int]) -> bool:
    """Return whether nothing can see the difference between an in-place add and an ordinary one.

    The changed value must be made in this graph, and no other name for its memory may be read later.
    """
    changed = node.args[0]
    if not isinstance(changed, Node) or not is_float(changed) or not is_float(node):
        return False
    family, stack = {changed}, [changed]
    while stack:
        member = stack.pop()
        if member.op in ("placeholder", "get_attr"):
            return False
        # An alias made later is one of the replacement.
        relatives = [user for user in member.users if order[user] < order[node] and _may_alias(user, member)]
        origin = member.args[0] if member.args else None
        if isinstance(origin, Node) and _may_alias(member, origin):
            relatives.append(origin)
        for relative in relatives:
            if relative not in family:
                family.add(relative)
                stack.append(relative)
    position = order[node]
    return all(order[user] <= position for member in family if member is not changed for user in member.users)


def _may_alias(user: Node, source: Node) -> bool:
    aliases = op_name(user) in _ALIASING_NAMES or user.kwargs.get("inplace") is True
    return aliases and bool(user.args) and user.args[0] is source
