"""How a carrier may be applied to streams: stacked [*, n, C] at once, and to differences of streams alike."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from mhc_compile.residual import Carrier

from .dataflow import CAST_NAMES, PRODUCT_NAMES, VIEW_NAMES, is_activation, op_name, operands, sizes_of, tensor_of

_POINTWISE_NAMES = {
    "to", "float", "half", "bfloat16", "double", "clone", "contiguous", "detach", "pow", "rsqrt", "sqrt", "square",
    "neg", "abs", "reciprocal", "mul", "imul", "multiply", "div", "truediv", "itruediv", "add", "sub", "clamp", "type",
    "nan_to_num",
}  # fmt: skip
_LAST_DIM_REDUCTIONS = {"mean", "var", "std"}
_LAST_DIM_NORMS = {"layer_norm", "rms_norm"}


def keeps_layout(carrier: Carrier, features_last: bool) -> bool:
    """Tell whether every node of a carrier acts the same on [*, C] and on [*, n, C]."""
    inside = {carrier.source, *carrier.nodes}
    return all(_keeps(node, inside, features_last) for node in carrier.nodes)


def is_linear(carrier: Carrier) -> bool:
    """Tell whether a carrier does to a difference of two streams what it does to the streams: casts, views, factors."""
    inside = {carrier.source, *carrier.nodes}
    return all(_scales(node, inside) for node in carrier.nodes)


def _scales(node: Node, inside: set[Node]) -> bool:
    name = op_name(node)
    if name in CAST_NAMES or name in VIEW_NAMES:
        return True
    if name not in PRODUCT_NAMES:
        return False
    left, right = (operand in inside for operand in operands(node))
    # Neither the square of a stream nor a quotient by one is linear.
    return left != right and (left or "div" not in name)


def is_training_batch_norm(node: Node) -> bool:
    """Tell whether a node normalises over the batch and updates running statistics."""
    if op_name(node) != "batch_norm":
        return False
    training = node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False)
    return training is not False


def _keeps(node: Node, inside: set[Node], features_last: bool) -> bool:
    name = op_name(node)
    if name in _LAST_DIM_REDUCTIONS:
        return features_last and _over_last_dim(node)
    if name in _LAST_DIM_NORMS:
        return features_last and _normalises_last_dim(node)
    if name == "prelu" or not (name in _POINTWISE_NAMES or is_activation(node)):
        return False
    outside = [operand for operand in node.all_input_nodes if operand not in inside]
    return all(_broadcasts(operand, features_last) for operand in outside)


def _broadcasts(operand: Node, features_last: bool) -> bool:
    """Tell whether an operand from outside, a weight or a number, lines up with stacked streams as well."""
    tensor = tensor_of(operand)
    if tensor is None:
        return True
    sizes = sizes_of(tensor)
    return all(size == 1 for size in sizes) or (features_last and len(sizes) <= 1)


def _over_last_dim(node: Node) -> bool:
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keepdim: Any = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    if op_name(node) != "mean":
        keepdim = node.kwargs.get("keepdim", False)
    return dim in (-1, (-1,), [-1]) and keepdim is True


def _normalises_last_dim(node: Node) -> bool:
    shape: Any = node.kwargs.get("normalized_shape", node.args[1] if len(node.args) > 1 else None)
    return isinstance(shape, list | tuple) and len(shape) == 1
