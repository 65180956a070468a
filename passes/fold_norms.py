"""Let a site's operator write the norm of its layer input, where that norm alone reads it.

In a pre-norm block the branch begins with a norm, and nobody else reads what `pre` or `post_pre` collapsed. With
`pre_norm` and `post_pre_norm` the layer input never goes to memory: 2C elements a token less in the forward, and 3C in
the backward, which neither reads it nor writes its gradient.

A norm is LayerNorm or RMSNorm over the features, as a function or as Hugging Face's models write RMSNorm out: Llama
casts back and then multiplies by its weight, Gemma multiplies by `1 + weight` in float32 and then casts, as the kernels
do. Any other reader, a copy for a residual or a second branch, leaves the site as it is. So does what the kernels do
not cover: there a norm is left to the inner compiler.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels import dispatch, ops
from ..kernels.fusions import MOST_NORMED_STREAMS, NORMED
from ..kernels.reference import accumulation_dtype
from .fx.dataflow import shape_of, tensor_of
from .fx.grad_modes import grad_modes
from .fx.graph_copy import copy_node, module_like
from .fx.norms import Norm, made_late, norm_of
from .fx.regions import regions_of
from .residual import ResidualAdd

_FOLDED = {getattr(torch.ops.mhc, name).default: name for name in NORMED}


@dataclass(frozen=True)
class _Folded:
    """A norm that a site's operator can write, and the nodes that make its weight and bias, to be run before it."""

    norm: Norm
    late: tuple[Node, ...]


def fold_norms(graph_module: GraphModule) -> GraphModule:
    """Return a graph in which `pre` and `post_pre` write normed layer inputs; `graph_module` itself if none can."""
    folded = _all_folded(graph_module)
    if not folded:
        return graph_module
    graph = Graph()
    values: dict[Node, Node] = {}
    constants: dict[Any, Node] = {}
    inside = {node for one in folded.values() for node in one.norm.nodes}
    for node in graph_module.graph.nodes:
        if node in folded:
            for late in (part for part in folded[node].late if part not in values):
                values[late] = copy_node(graph, late, values.__getitem__)
            values[node] = _emit(graph, node, folded[node].norm, values, constants)
        elif node not in inside and node not in values:
            values[node] = copy_node(graph, node, values.__getitem__)
            site = node.args[0] if node.args else None
            if isinstance(site, Node) and site in folded and _is_layer_input(node):
                values[folded[site].norm.nodes[-1]] = values[node]
    return module_like(graph_module, graph)


def would_fold(add: ResidualAdd, n_streams: int, manifold: str) -> bool:
    """Return whether a site that has not been rewritten has a norm that would be folded where the kernels run."""
    if add.fork is None or not add.readers or n_streams > MOST_NORMED_STREAMS:
        return False
    if add.fork_dim != len(shape_of(add.fork)) - 1:
        return False
    order = _order(add.node.graph)
    folded = _foldable(add.fork, add.readers, add.node, min(order[reader] for reader in add.readers), order)
    if folded is None:
        return False
    tensors = _held(add.fork, folded.norm)
    return tensors is not None and dispatch.covered(tensors, n_streams, manifold)


def _all_folded(graph_module: GraphModule) -> dict[Node, _Folded]:
    """Return the norm of each site's operator that can write it."""
    order, modes = _order(graph_module.graph), grad_modes(graph_module)
    found: dict[Node, _Folded] = {}
    for node in graph_module.graph.nodes:
        if node.target not in _FOLDED:
            continue
        layer_inputs = [user for user in node.users if _is_layer_input(user)]
        if len(layer_inputs) != 1:
            continue
        folded = _foldable(layer_inputs[0], layer_inputs[0].users, node, order[node], order)
        if (
            folded is not None
            and all(modes[part] == modes[node] for part in (*folded.norm.nodes, *folded.late))
            and _is_covered(node, layer_inputs[0], folded.norm)
        ):
            found[node] = folded
    return found


def _order(graph: Graph) -> dict[Node, int]:
    return {node: index for index, node in enumerate(graph.nodes)}


def _foldable(value: Node, readers: Collection[Node], site: Node, begin: int, order: dict[Node, int]) -> _Folded | None:
    """Return the norm that is all that reads a value, if it can run at position `begin` in the regions of `site`."""
    norm = norm_of(value, readers)
    late = made_late(norm, begin, order) if norm is not None else None
    if norm is None or late is None:
        return None
    # Across the border of a checkpointed body one half runs where the other does not.
    if any(regions_of(part) != regions_of(site) for part in (*norm.nodes, *late)):
        return None
    return _Folded(norm, late)


def _is_layer_input(node: Node) -> bool:
    """Return whether a node takes the layer input of a site's operator."""
    site = node.args[0] if node.target is operator.getitem else None
    if not isinstance(site, Node) or site.target not in _FOLDED:
        return False
    return bool(node.args[1] == ops.OPERATORS[_FOLDED[site.target]].signature.results.index("layer_input"))


def _is_covered(site: Node, layer_input: Node, norm: Norm) -> bool:
    """Return whether the kernels run the folded operator, and it gives what the norm gave."""
    tensors = _held(layer_input, norm)
    streams = tensor_of(site.args[0])
    assert streams is not None
    n = int(streams.shape[-2])
    signature = ops.OPERATORS[_FOLDED[site.target]].signature
    manifold = signature.manifold(site.args[len(signature.tensors) :])
    return (
        tensors is not None and n <= MOST_NORMED_STREAMS and dispatch.implementation(tensors, n, manifold) == "triton"
    )


def _held(layer_input: Node, norm: Norm) -> tuple[Tensor, ...] | None:
    """Return example values of what the folded operator reads and writes, None if they are none that it could."""
    found = tuple(tensor_of(value) for value in (layer_input, norm.nodes[-1], *norm.vectors))
    held = tuple(tensor for tensor in found if tensor is not None)
    if len(held) != len(found) or any(is_traceable_wrapper_subclass(tensor) for tensor in held):
        return None
    return held if held[1].dtype == held[0].dtype else None


def _emit(graph: Graph, site: Node, norm: Norm, values: dict[Node, Node], constants: dict[Any, Node]) -> Node:
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
