"""Carriers: what may stand on a stream between two residual adds, what one is made of, and how streams pass it.

Casts, views, dropout, a factor that is constant or learned (one for all features, or one for each), a norm, an
activation. Each stream passes them alone; where a carrier does the same to stacked streams [*, n, C], or to differences
of streams, all pass it at once.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from ..residual import Carrier
from .dataflow import (
    ACTIVATION_NAMES,
    CAST_NAMES,
    DROPOUT_NAMES,
    NORM_NAMES,
    PRODUCT_NAMES,
    SUM_NAMES,
    VIEW_NAMES,
    is_activation,
    is_activation_input,
    is_float,
    is_norm,
    is_parameter_expression,
    norm_input,
    op_name,
    operands,
    output_values,
    shape_of,
    sizes_of,
    tensor_of,
)

_POINTWISE_NAMES = {
    "to", "float", "half", "bfloat16", "double", "clone", "contiguous", "detach", "pow", "rsqrt", "sqrt", "square",
    "neg", "abs", "reciprocal", "mul", "imul", "multiply", "div", "truediv", "itruediv", "add", "sub", "clamp", "type",
    "nan_to_num",
}  # fmt: skip
_LAST_DIM_REDUCTIONS = {"mean", "var", "std"}
_LAST_DIM_NORMS = {"layer_norm", "rms_norm"}


def carried_from(node: Node) -> Node | None:
    """Return the stream value that a carrier was computed from; None if the node is no carrier.

    Carriers may stand on the stream between two residual adds: casts, views, dropout, a constant factor, a norm, an
    activation. Each stream passes them alone.
    """
    if node.op not in ("call_function", "call_method") or not is_float(node):
        return None
    name = op_name(node)
    source: Any = None
    if name in CAST_NAMES | VIEW_NAMES | DROPOUT_NAMES | ACTIVATION_NAMES | NORM_NAMES:
        source = node.args[0] if node.args else node.kwargs.get("input")
    elif name in PRODUCT_NAMES:
        source = _carried_through_product(node)
    elif name in SUM_NAMES:
        source = _carried_through_sum(node)
    if isinstance(source, Node) and is_float(source) and source.op != "get_attr":
        return source
    return None


def _carried_through_product(node: Node) -> Node | None:
    left, right = operands(node)
    normalized = norm_input(node)
    if normalized is not None:
        return normalized
    for value, factor in ((left, right), (right, left)):
        if not isinstance(value, Node):
            continue
        if factor is right or op_name(node) in ("mul", "imul", "mul_", "multiply"):
            if _is_number(factor) or (is_parameter_expression(factor) and _has_one_element(factor)):
                return value
            if is_parameter_expression(factor) and (_is_normalized(value) or is_feature_scale(node, value, factor)):
                return value
    return None


def is_feature_scale(node: Node, value: Node, factor: Node) -> bool:
    """Return whether a product scales a value by one learned factor a feature."""
    sizes = shape_of(factor)
    return (
        shape_of(node) == shape_of(value) and sum(size != 1 for size in sizes) == 1 and is_parameter_expression(factor)
    )


def scales_features(carrier: Node) -> bool:
    """Return whether a carrier is a product with one learned factor a feature, and no norm's own weight."""
    if op_name(carrier) not in PRODUCT_NAMES:
        return False
    left, right = operands(carrier)
    pairs = ((left, right), (right, left))
    return norm_input(carrier) is None and any(
        isinstance(value, Node) and isinstance(factor, Node) and not _is_normalized(value)
        and is_feature_scale(carrier, value, factor)
        for value, factor in pairs
    )  # fmt: skip


def _carried_through_sum(node: Node) -> Node | None:
    left, right = operands(node)
    normalized = norm_input(node)
    if normalized is not None:
        return normalized
    for value, term in ((left, right), (right, left)):
        both = isinstance(value, Node) and isinstance(term, Node)
        if both and is_parameter_expression(term) and _is_normalized(value):
            return value
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, int | float):
        return True
    tensor = tensor_of(value)
    return tensor is not None and isinstance(value, Node) and value.op == "get_attr" and _has_one_element(value)


def _has_one_element(value: Any) -> bool:
    tensor = tensor_of(value)
    return tensor is not None and all(size == 1 for size in sizes_of(tensor))


def _is_normalized(node: Node) -> bool:
    """Return whether a value came from a norm over casts and the norm's own weight."""
    for _ in range(4):
        if is_norm(node):
            return True
        if op_name(node) in PRODUCT_NAMES | CAST_NAMES:
            left, right = operands(node) if op_name(node) in PRODUCT_NAMES else (node.args[0], None)
            inner = right if is_parameter_expression(left) else left
            if isinstance(inner, Node):
                node = inner
                continue
        return False
    return False


def carrier_between(source: Node, node: Node, order: dict[Node, int]) -> Carrier:
    """Return the carrier that leads from one stream value to the next; a norm written out is several nodes."""
    floor = order[source]
    behind, stack = {node}, [node]
    while stack:
        for value in stack.pop().all_input_nodes:
            if order[value] > floor and value not in behind:
                behind.add(value)
                stack.append(value)
    inside = {source}
    for value in sorted(behind, key=order.__getitem__):
        if any(operand in inside for operand in value.all_input_nodes):
            inside.add(value)
    inside.discard(source)
    nodes = tuple(sorted(inside, key=order.__getitem__))
    absorbed = {node}
    for value in reversed(nodes[:-1]):
        if all(user in absorbed for user in value.users):
            absorbed.add(value)
    return Carrier(node, source, nodes, frozenset(absorbed))


def keeps_layout(carrier: Carrier, features_last: bool) -> bool:
    """Return whether every node of a carrier acts the same on [*, C] and on [*, n, C]."""
    inside = {carrier.source, *carrier.nodes}
    return all(_keeps(node, inside, features_last) for node in carrier.nodes)


def is_linear(carrier: Carrier) -> bool:
    """Return whether a carrier does to a difference of two streams what it does to the streams: casts, views, …"""
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
    """Return whether a node normalizes over the batch and updates running statistics."""
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
    """Return whether an operand from outside, a weight or a number, lines up with stacked streams as well."""
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


def outputs_over_carriers(node: Node) -> tuple[tuple[int, tuple[Node, ...]], ...]:
    """Return where a stream value leaves the graph, over carriers alone.

    Returns:
        Positions of the graph's outputs, each with the values that lead there, the first carrier first.
    """
    steps: dict[Node, tuple[Node, ...]] = {node: ()}
    values = [node]
    leaving = False
    while values:
        value = values.pop()
        for user in value.users:
            leaving |= user.op == "output"
            if user not in steps and carried_from(user) is value:
                steps[user] = (*steps[value], user)
                values.append(user)
    if not leaving:
        return ()
    returned = output_values(node.graph)
    return tuple((position, steps[value]) for position, value in enumerate(returned) if value in steps)


def inputs_over_carriers(graph: Graph) -> tuple[tuple[int, int], ...]:
    """Return which of a graph's outputs are, over one carrier or more, one of its activation inputs.

    Returns:
        Pairs of the output's and the input's position.
    """
    inputs = {node: index for index, node in enumerate(node for node in graph.nodes if node.op == "placeholder")}
    found = []
    for position, value in enumerate(output_values(graph)):
        source = value if isinstance(value, Node) else None
        while source is not None and source not in inputs:
            source = carried_from(source)
        if source is not None and source is not value and is_activation_input(source):
            found.append((position, inputs[source]))
    return tuple(found)
