"""Join each site's `post` with the next site's `pre` into one `post_pre`.

The new streams are then written once, and the next site's projection need not read them back. Other readers of the
streams (a readout, a carrier) take the fused operator's first output.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..kernels import ops
from .fx.grad_modes import grad_modes
from .fx.graph_copy import copy_node, module_like
from .fx.regions import regions_of

assert ops.OPERATORS, "importing the table registers torch.ops.mhc"

_POST = torch.ops.mhc.post.default
_PRE = torch.ops.mhc.pre.default
_POST_PRE = torch.ops.mhc.post_pre.default


def fuse_boundaries(graph_module: GraphModule) -> GraphModule:
    """Return a new graph in which every `post` that a `pre` reads directly is one `post_pre` with it.

    Where two sites read the same streams (parallel branches), the first `pre` is fused and the other stays.
    """
    partners = _partners(graph_module)
    fused_at: dict[Node, Node] = {}
    graph = Graph()
    values: dict[Node, Node] = {}
    for node in graph_module.graph.nodes:
        if node in partners:
            fused = _fuse(graph, node, partners[node], values)
            fused_at[partners[node]] = fused
            values[node] = _item(graph, fused, 0, node)
        elif node in fused_at:
            continue
        elif node.target is operator.getitem and node.args[0] in fused_at:
            # post_pre returns the new streams first, then what pre returns.
            pre, index = node.args
            assert isinstance(pre, Node)
            assert isinstance(index, int)
            values[node] = _item(graph, fused_at[pre], index + 1, node)
        else:
            values[node] = copy_node(graph, node, values.__getitem__)
    return module_like(graph_module, graph)


def _partners(graph_module: GraphModule) -> dict[Node, Node]:
    """Return, for each `post`, the first `pre` that reads its streams; its parameters are known before the `post`."""
    partners: dict[Node, Node] = {}
    modes = grad_modes(graph_module)
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        if node.target is not _PRE:
            continue
        streams, *parameters = node.args[:4]
        # Across the border of a checkpointed body, one half would be recomputed without the other.
        if (
            isinstance(streams, Node)
            and streams.target is _POST
            and all(isinstance(value, Node) and order[value] < order[streams] for value in parameters)
            and regions_of(streams) == regions_of(node)
            # Fused, a `pre` behind `no_grad` would run under it, and its parameters would get no gradient.
            and modes[streams] == modes[node]
        ):
            partners.setdefault(streams, node)
    return partners


def _fuse(graph: Graph, post: Node, pre: Node, values: dict[Node, Node]) -> Node:
    arguments: tuple[Any, ...] = map_arg((*post.args, *pre.args[1:]), values.__getitem__)
    fused = graph.call_function(_POST_PRE, arguments)
    fused.meta = {**post.meta, "example_value": (post.meta["example_value"], *pre.meta["example_value"])}
    return fused


def _item(graph: Graph, fused: Node, index: int, origin: Node) -> Node:
    item = graph.call_function(operator.getitem, (fused, index))
    item.meta = dict(origin.meta)
    return item
