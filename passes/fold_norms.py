"""Let a site's operator write the norm of its layer input, where that norm alone reads it.

In a pre-norm block the branch begins with a norm, and nobody else reads what `pre` or `post_pre` collapsed. With
`pre_norm` and `post_pre_norm` the layer input never goes to memory: 2C elements a token less in the forward, and 3C in
the backward, which neither reads it nor writes its gradient.

A norm is LayerNorm or RMSNorm over the features, as a function or as Hugging Face's models write RMSNorm out. Any other
reader, a copy for a residual or a second branch, leaves the site as it is. So does what the kernels do not cover: there
a norm is left to the inner compiler.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels import dispatch, ops
from ..kernels.fusions import MOST_NORMED_STREAMS, NORMED
from ..kernels.reference import accumulation_dtype
from .fx.dataflow import CAST_NAMES, op_name, operands, shape_of, tensor_of
from .fx.grad_modes import grad_modes
from .fx.graph_copy import copy_node, module_like
from .fx.regions import regions_of

_FOLDED = {getattr(torch.ops.mhc, name).default: name for name in NORMED}
_PRODUCTS = {"mul", "multiply"}


@dataclass(frozen=True)
class _Norm:
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


def fold_norms(graph_module: GraphModule) -> GraphModule:
    """Return a graph in which `pre` and `post_pre` write normed layer inputs; `graph_module` itself if none can."""
    folded = _folded(graph_module)
    if not folded:
        return graph_module
    graph = Graph()
    values: dict[Node, Node] = {}
    constants: dict[Any, Node] = {}
    inside = {node for norm in folded.values() for node in norm.nodes}
    for node in graph_module.graph.nodes:
        if node in folded:
            values[node] = _emit(graph, node, folded[node], values, constants)
        elif node not in inside:
            values[node] = copy_node(graph, node, values.__getitem__)
            site = node.args[0] if node.args else None
            if isinstance(site, Node) and site in folded and _is_layer_input(node):
                values[folded[site].nodes[-1]] = values[node]
    return module_like(graph_module, graph)


def _folded(graph_module: GraphModule) -> dict[Node, _Norm]:
    """Return the norm of each site's operator that can write it."""
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    modes = grad_modes(graph_module)
    found: dict[Node, _Norm] = {}
    for node in graph_module.graph.nodes:
        if node.target not in _FOLDED:
            continue
        layer_inputs = [user for user in node.users if _is_layer_input(user)]
        norm = _norm_of(layer_inputs[0]) if len(layer_inputs) == 1 else None
        if (
            norm is not None
            and all(value is None or order[value] < order[node] for value in (norm.weight, norm.bias))
            # Across the border of a checkpointed body, or of `no_grad`, one half runs where the other does not.
            and all(regions_of(part) == regions_of(node) and modes[part] == modes[node] for part in norm.nodes)
            and _is_covered(node, layer_inputs[0], norm)
        ):
            found[node] = norm
    return found


def _is_layer_input(node: Node) -> bool:
    """Return whether a node takes the layer input of a site's operator."""
    site = node.args[0] if node.target is operator.getitem else None
    if not isinstance(site, Node) or site.target not in _FOLDED:
        return False
    return bool(node.args[1] == ops.OPERATORS[_FOLDED[site.target]].signature.results.index("layer_input"))


def _is_covered(site: Node, layer_input: Node, norm: _Norm) -> bool:
    """Return whether the kernels run the folded operator, and it gives what the norm gave."""
    plain, normed = tensor_of(layer_input), tensor_of(norm.nodes[-1])
    held = [plain, normed, *(tensor_of(value) for value in (norm.weight, norm.bias) if value is not None)]
    if any(tensor is None or is_traceable_wrapper_subclass(tensor) for tensor in held):
        return False
    assert plain is not None
    assert normed is not None
    streams = tensor_of(site.args[0])
    assert streams is not None
    n = int(streams.shape[-2])
    signature = ops.OPERATORS[_FOLDED[site.target]].signature
    manifold = signature.manifold(site.args[len(signature.tensors) :])
    tensors = tuple(tensor for tensor in held if tensor is not None)
    return (
        normed.dtype == plain.dtype
        and n <= MOST_NORMED_STREAMS
        and dispatch.implementation(tensors, n, manifold) == "triton"
    )


def _emit(graph: Graph, site: Node, norm: _Norm, values: dict[Node, Node], constants: dict[Any, Node]) -> Node:
    """Emit a site's operator with the norm in it."""
    name = _FOLDED[site.target]
    plain, normed = ops.OPERATORS[name].signature, ops.OPERATORS[NORMED[name]].signature
    given: dict[str, Any] = dict(zip((*plain.tensors, *plain.constants), site.args, strict=False))
    example = _layer_example(site)
    given |= {
        "norm_weight": norm.weight or _constant(graph, torch.ones, example, constants),
        "norm_bias": norm.bias or _constant(graph, torch.zeros, example, constants),
        "float layer_eps": norm.eps,
        "bool centered": norm.centered,
    }
    arguments = [given[key] for key in (*normed.tensors, *normed.constants) if key in given]
    mapped = (values.get(argument, argument) if isinstance(argument, Node) else argument for argument in arguments)
    emitted = graph.call_function(getattr(torch.ops.mhc, NORMED[name]).default, tuple(mapped))
    statistics = example.new_empty((*example.shape[:-1], 2), dtype=accumulation_dtype(example))
    emitted.meta = {**site.meta, "example_value": (*site.meta["example_value"], statistics)}
    return emitted


def _layer_example(site: Node) -> Tensor:
    results = ops.OPERATORS[_FOLDED[site.target]].signature.results
    example: Tensor = site.meta["example_value"][results.index("layer_input")]
    return example


def _constant(graph: Graph, make: Any, example: Tensor, constants: dict[Any, Node]) -> Node:
    """Return the weight or bias of a norm without: one node for all norms of a width, at the graph's beginning."""
    width, keywords = int(example.shape[-1]), dict[str, Any](dtype=example.dtype, device=example.device)
    key = (make, width, *keywords.values())
    if key not in constants:
        first = next((node for node in graph.nodes if node.op != "placeholder"), None)
        with graph.inserting_before(first) if first is not None else contextlib.nullcontext():
            constants[key] = graph.call_function(make, ((width,),), keywords)
        constants[key].meta["example_value"] = make((width,), **keywords)
    return constants[key]


def _norm_of(value: Node) -> _Norm | None:
    """Return the norm over the last dimension that is the only reader of a value."""
    width = shape_of(value)[-1]
    norm = _functional(value) or _written_out(value)
    if norm is None or not isinstance(width, int):
        return None
    vectors = (vector for vector in (norm.weight, norm.bias) if vector is not None)
    same = shape_of(norm.nodes[-1]) == shape_of(value)
    return norm if same and all(shape_of(vector) == (width,) for vector in vectors) else None


_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


def _functional(value: Node) -> _Norm | None:
    node = _only_user(value)
    names = _ARGUMENTS.get(op_name(node)) if node is not None else None
    if node is None or names is None or len(node.args) > len(names):
        return None
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    centered = "bias" in names
    eps = given.get("eps", 1e-5 if centered else None)
    # Without an epsilon RMSNorm takes that of a dtype, which depends on how it is run.
    if len(tuple(given["normalized_shape"])) != 1 or not isinstance(eps, int | float) or given["input"] is not value:
        return None
    return _Norm(given.get("weight"), given.get("bias"), float(eps), centered, (node,))


def _written_out(value: Node) -> _Norm | None:
    """Match `weight * (x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))`, with casts in between."""
    same = [value, *(user for user in value.users if _is_cast(user, value))]
    squares = [user for member in same for user in member.users if _is_square(user, member)]
    mean = _only_user(squares[0]) if len(squares) == 1 else None
    raised = _only_user(mean) if mean is not None and _is_mean_of_last(mean) else None
    eps = _added_number(raised) if raised is not None else None
    inverse = _only_user(raised) if raised is not None and eps is not None else None
    product = _only_user(inverse) if inverse is not None and op_name(inverse) == "rsqrt" else None
    if product is None or eps is None or _partner(product, inverse) not in same:
        return None
    if any(user not in (*same[1:], squares[0], product) for member in same for user in member.users):
        return None
    casts = [*_casts_behind(product, value)]
    scaled = _only_user([product, *casts][-1])
    weight = _partner(scaled, [product, *casts][-1]) if scaled is not None else None
    if scaled is None or weight is None:
        return None
    ends = [*_casts_behind(scaled, value)] if _dtype(scaled) != _dtype(value) else []
    nodes = (*same[1:], squares[0], mean, raised, inverse, product, *casts, scaled, *ends)
    return _Norm(weight, None, float(eps), False, tuple(node for node in nodes if node is not None))


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_cast(node: Node, value: Node) -> bool:
    """Return whether a node casts to the dtype of `value` or to one that holds more: no rounding to integers, say."""
    plain, cast = tensor_of(value), tensor_of(node)
    if op_name(node) not in CAST_NAMES or plain is None or cast is None:
        return False
    return cast.dtype in (plain.dtype, torch.float32, torch.float64) and cast.device == plain.device


def _casts_behind(node: Node, value: Node) -> Iterator[Node]:
    """Yield casts of a node, each the only reader of the one before."""
    user = _only_user(node)
    while user is not None and _is_cast(user, value) and user.args[0] is node:
        yield user
        node, user = user, _only_user(user)


def _is_square(node: Node, value: Node) -> bool:
    name = op_name(node)
    if name == "pow":
        return operands(node) == (value, 2)
    return name == "square" or (name in _PRODUCTS and operands(node) == (value, value))


def _is_mean_of_last(node: Node) -> bool:
    arguments: dict[str, Any] = {**dict(zip(("input", "dim", "keepdim"), node.args, strict=False)), **node.kwargs}
    dim = arguments.get("dim")
    dims = dim if isinstance(dim, list | tuple) else (dim,)
    last = len(shape_of(node)) - 1
    return op_name(node) == "mean" and arguments.get("keepdim") is True and tuple(dims) in ((-1,), (last,))


def _added_number(node: Node) -> float | None:
    if op_name(node) != "add":
        return None
    return next((operand for operand in operands(node) if isinstance(operand, int | float)), None)


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
