"""What a node of a captured graph does to a residual stream: the vocabulary of the finder.

Everything here reads; nothing mutates. Sizes are compared as expressions, never as SymInt values: comparing two
SymInts would add a guard, and with it a recompilation, to the user's model.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from enum import IntFlag
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

IN_PLACE_ADDS = {operator.iadd, "add_"}
PRODUCT_NAMES = {"mul", "imul", "mul_", "multiply", "div", "truediv", "itruediv", "div_", "true_divide"}
SUM_NAMES = {"add", "iadd", "add_", "sub", "isub", "sub_", "rsub", "subtract"}

# Mixes over features with learned weights, or over tokens.
_MIXING_NAMES = {
    "linear", "matmul", "imatmul", "bmm", "mm", "mv", "addmm", "baddbmm", "addbmm", "einsum", "bilinear", "tensordot",
    "multi_head_attention_forward", "scaled_dot_product_attention", "_transformer_encoder_layer_fwd",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "embedding_bag", "fold", "grid_sample",
}  # fmt: skip
_MIXING_MARKS = ("conv", "pool", "fft_", "attention", "grouped_mm")

# What a size is taken for that no trace shows (it depends on data).
_UNKNOWN_SIZE = 1024

NORM_NAMES = {
    "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm", "normalize", "local_response_norm",
    "native_layer_norm",
}  # fmt: skip
CAST_NAMES = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy"}
VIEW_NAMES = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "moveaxis", "squeeze", "unsqueeze",
    "swapaxes", "t", "view_as", "reshape_as", "contiguous", "clone", "alias", "detach", "swapdims", "rearrange",
}  # fmt: skip
DROPOUT_NAMES = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
ACTIVATION_NAMES = {
    "relu", "relu_", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardswish", "hardtanh",
    "hardsigmoid", "tanh", "sigmoid", "softplus", "log_sigmoid", "prelu", "clamp", "clip", "clamp_", "nan_to_num",
    "clamp_min", "clamp_max", "relu6_", "square",
}  # fmt: skip
# Nodes of the longest written-out norm seen; the search for one stops there.
_LONGEST_NORM = 24

_SHAPE_READERS = {
    "size", "dim", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "sym_size",
}  # fmt: skip
_LIKE_SECOND = {"expand_as", "view_as", "reshape_as", "type_as"}
_REDUCTION_NAMES = {"mean", "var", "std", "norm", "linalg_vector_norm", "vector_norm", "var_mean", "sum"}


class Reach(IntFlag):
    """How a value reached a node, as bits: unmixed, unmixed but normalized, mixed."""

    PLAIN = 1
    NORMED = 2
    MIXED = 4


def op_name(node: Node) -> str:
    """Return the bare name of the operation: "linear", "add", "scaled_dot_product_attention"; of a value, nothing.

    An input bears the name of what it comes from, such as a parameter of a module called `convnext`.
    """
    target = node.target
    if node.op in ("placeholder", "get_attr", "output"):
        return ""
    if isinstance(target, str):
        return target.rsplit(".", 1)[-1]
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rsplit("::", 1)[-1]
    return getattr(target, "__name__", str(target))


def tensor_of(node: Any) -> Tensor | None:
    """Return the example value of a tensor node, else None."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def is_size(node: Node) -> bool:
    """Return whether a node is a number of entries, not data."""
    return isinstance(node.meta.get("example_value"), int | torch.SymInt)


def size_hint(size: int | torch.SymInt) -> int:
    """Return a size, or what it was traced with; `int(size)` would guard on it, and the graph would serve it alone."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    hint = size.node.hint
    return int(hint) if hint is not None else _UNKNOWN_SIZE


def sizes_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return the shape with symbolic sizes as expressions, comparable without guards; what is known is an int."""
    return tuple(size if isinstance(size, int) else _known(size.node.expr) for size in tensor.shape)


def _known(expression: Any) -> Any:
    return int(expression) if expression.is_Integer else expression


def shape_of(node: Any) -> tuple[Any, ...]:
    """Return the shape of a tensor node as expressions; () for anything else."""
    tensor = tensor_of(node)
    return sizes_of(tensor) if tensor is not None else ()


def dim_of_size(width: int, sizes: tuple[Any, ...]) -> int:
    """Return the last dimension of this size, or -1."""
    return max((dim for dim, size in enumerate(sizes) if size == width), default=-1)


def selected_from(node: Node) -> Node | None:
    """Return the tensor that a node picks a part of by an index."""
    return node.all_input_nodes[0] if op_name(node) in ("getitem", "select") else None


def behind_views(node: Node, *more: str) -> Node:
    """Return what a value is a view, a cast or a copy of, also through the operations named."""
    while op_name(node) in {*VIEW_NAMES, *CAST_NAMES, *more} and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def is_float(node: Node) -> bool:
    """Return whether a node holds a real floating-point tensor."""
    tensor = tensor_of(node)
    return tensor is not None and tensor.dtype.is_floating_point


def holds_data(node: Node) -> bool:
    """Return whether a node may hold features: a floating-point tensor, or several values at once."""
    return is_float(node) or isinstance(node.meta.get("example_value"), tuple | list)


def operands(node: Node) -> tuple[Any, Any]:
    """Return the two operands of a binary node, whether given by position or by name."""
    arguments = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
    return (arguments[0], arguments[1]) if len(arguments) > 1 else (arguments[0] if arguments else None, None)


def is_add(node: Node) -> bool:
    """Return whether a node is an add in the one spelling that `normalize` leaves."""
    return node.op == "call_function" and node.target is operator.add


def is_in_place_add(node: Node) -> bool:
    """Return whether a node adds in place."""
    return node.op in ("call_function", "call_method") and node.target in IN_PLACE_ADDS


def is_sentinel(node: Node) -> bool:
    """Return whether a node is the sentinel that hands a site's parameters to the graph."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name == "mhc::sentinel"


def is_higher_order(node: Node) -> bool:
    """Return whether a node runs a body graph of its own."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def output_of(graph_module: GraphModule) -> Node:
    """Return a graph's output node."""
    return next(node for node in reversed(graph_module.graph.nodes) if node.op == "output")


def output_values(graph: Graph) -> list[Any]:
    """Return what a graph returns, in order: nodes and constants."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    returned: Any = output.args[0]
    return list(returned) if isinstance(returned, tuple | list) else [returned]


def is_static_input(node: Node) -> bool:
    """Return whether a placeholder is a tensor that belongs to a module; Dynamo marks these and no others."""
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def is_activation_input(node: Node) -> bool:
    """Return whether a value comes into the graph as an activation: a placeholder that is no parameter or buffer."""
    return node.op == "placeholder" and is_float(node) and not is_static_input(node)


def data_inputs(node: Node) -> list[Node]:
    """Return the inputs whose values matter: `expand_as(x, like)` reads only the shape of `like`."""
    name = op_name(node)
    if name in _SHAPE_READERS:
        return []
    if name in _LIKE_SECOND:
        return [source for source in node.args[:1] if isinstance(source, Node)]
    return node.all_input_nodes


def bodies(node: Node, graph_module: GraphModule) -> Iterator[GraphModule]:
    """Yield the body graphs that a higher-order node runs."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            body = getattr(graph_module, str(argument.target), None)
            if isinstance(body, GraphModule):
                yield body


def mixes(node: Node, graph_module: GraphModule) -> bool:
    """Return whether a node mixes features with learned weights, or mixes tokens."""
    if node.op == "call_module":
        return any(True for _ in graph_module.get_submodule(str(node.target)).parameters())
    if node.op not in ("call_function", "call_method"):
        return False
    if is_higher_order(node):
        return any(mixes(inner, body) for body in bodies(node, graph_module) for inner in body.graph.nodes)
    if _namespace(node) not in ("aten", "prims", "prim"):
        return True
    return _is_mixing_name(node)


def _namespace(node: Node) -> str:
    """Return the library that a node's operator is registered in; torch's own functions count as "aten"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.split("::", 1)[0]
    return target.namespace if isinstance(target, torch._ops.OpOverload) else "aten"


def _is_mixing_name(node: Node) -> bool:
    name = op_name(node).lower()
    return name in _MIXING_NAMES or any(mark in name for mark in _MIXING_MARKS)


def is_norm(node: Node) -> bool:
    """Return whether a node is a norm: a functional one, or the last product of one that is written out.

    Written out, a norm is a value times (or minus) a per-token number computed from that same value, such as
    x * rsqrt(mean(x²) + eps); the products with its weight that follow are a part of it.
    """
    if op_name(node) in NORM_NAMES:
        return True
    return norm_input(node) is not None


def norm_input(node: Node) -> Node | None:
    """Return the value that a written-out norm normalizes, if the node ends one."""
    name = op_name(node)
    if name not in PRODUCT_NAMES and name not in SUM_NAMES:
        return None
    left, right = operands(node)
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    for value, factor in ((left, right), (right, left)):
        if name in SUM_NAMES and factor is left:
            continue
        if _is_statistic_of(factor, value):
            return value
    return None


def _is_statistic_of(factor: Node, value: Node) -> bool:
    """Return whether `factor` is one number per token, reduced from `value` or from what `value` was cast from."""
    factor_tensor, value_tensor = tensor_of(factor), tensor_of(value)
    if factor_tensor is None or value_tensor is None or factor_tensor.dim() != value_tensor.dim():
        return False
    pairs = zip(sizes_of(factor_tensor), sizes_of(value_tensor), strict=True)
    if not any(small == 1 and large != 1 for small, large in pairs):
        return False
    origins = set(_behind_norms(value))
    stack, seen, reduced, found = [factor], {factor}, False, False
    while stack and len(seen) <= _LONGEST_NORM:
        node = stack.pop()
        if _is_mixing_name(node):
            return False
        reduced |= op_name(node) in _REDUCTION_NAMES
        for source in data_inputs(node):
            if source in origins:
                found = True
            elif source not in seen and source.op in ("call_function", "call_method"):
                seen.add(source)
                stack.append(source)
    return found and reduced


def _behind_norms(value: Node) -> Iterator[Node]:
    """Yield a value, and what it was cast from or centred from: x, x - mean(x), x.float() are one origin."""
    node: Any = value
    while isinstance(node, Node):
        yield node
        if op_name(node) in CAST_NAMES | {"contiguous", "clone"} and node.args:
            node = node.args[0]
        elif op_name(node) in SUM_NAMES:
            node = norm_input(node)
        else:
            return


def is_parameter_expression(node: Any, limit: int = 8) -> bool:
    """Return whether a value depends on parameters, buffers and constants alone.

    Dynamo marks the tensors that belong to modules as static inputs; it marks no others.
    """
    if not isinstance(node, Node):
        return True
    if node.op == "get_attr":
        return True
    if node.op == "placeholder":
        return is_static_input(node)
    if limit == 0 or node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return False
    return all(is_parameter_expression(source, limit - 1) for source in node.all_input_nodes)


def sliced_dims(node: Node) -> tuple[int, ...] | None:
    """Return the dimensions that a slice shortens; None if the node is no slice that keeps every dimension."""
    tensor = tensor_of(node)
    if node.target is not operator.getitem or tensor is None or tensor_of(node.args[0]) is None:
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(entry is Ellipsis or isinstance(entry, slice) for entry in index):
        return None
    missing = tensor.dim() - sum(entry is not Ellipsis for entry in index)
    entries: list[Any] = []
    for entry in index:
        entries += [slice(None)] * missing if entry is Ellipsis else [entry]
    return tuple(dim for dim, entry in enumerate(entries) if entry != slice(None))


def is_linear_map(node: Node) -> bool:
    """Return whether a node is a linear map or a pooling: what a projection shortcut is made of."""
    name = op_name(node).lower()
    return name in ("linear", "addmm", "matmul") or "conv" in name or "pool" in name


def is_activation(node: Node) -> bool:
    """Return whether a node is a pointwise nonlinearity or a softmax."""
    return op_name(node) in ACTIVATION_NAMES | {"softmax"}


def is_softmax(node: Node, graph_module: GraphModule) -> bool:
    """Return whether a node is a softmax, or runs a body that holds one, such as one with a gradient of its own."""
    if is_higher_order(node):
        return any(is_softmax(inner, body) for body in bodies(node, graph_module) for inner in body.graph.nodes)
    return op_name(node) in ("softmax", "_softmax")


def is_dropout(node: Node) -> bool:
    """Return whether a node is a dropout."""
    return op_name(node) in DROPOUT_NAMES
