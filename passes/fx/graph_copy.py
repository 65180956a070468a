"""Build new graphs from old ones without losing what Dynamo and AOTAutograd hang on nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node

from .cache_key import ATTRIBUTE

_KEPT_ATTRIBUTES = ("_param_name_to_source", ATTRIBUTE)


def copy_node(graph: Graph, node: Node, argument: Callable[[Node], Node]) -> Node:
    """Copy a node with its metadata, and a placeholder's `_dynamo_source`, which `Graph.node_copy` forgets.

    AOTAutograd asserts that every placeholder of a Dynamo graph has one, if only None.
    """
    copied = graph.node_copy(node, argument)
    if hasattr(node, "_dynamo_source"):
        copied._dynamo_source = node._dynamo_source
    return copied


def module_like(graph_module: GraphModule, graph: Graph, attributes: dict[str, Any] | None = None) -> GraphModule:
    """Wrap a graph over the attributes of `graph_module`, or those given, with its metadata and Dynamo's sources.

    AOTAutograd asks for the sources only to tell a Dynamo graph from others. Without them it takes parameters for
    activations: CUDA graphs then copy them at every call, and the partitioner counts saving them as memory.
    """
    graph.lint()
    root = graph_module if attributes is None else attributes
    result = GraphModule(root, graph, class_name=type(graph_module).__name__)
    result.training = graph_module.training
    result.meta = dict(graph_module.meta)
    for name in _KEPT_ATTRIBUTES:
        if hasattr(graph_module, name):
            setattr(result, name, getattr(graph_module, name))
    return result


def attribute_of(graph_module: GraphModule, target: str) -> Any:
    """Return what a `get_attr` or `call_module` node of this target means."""
    return operator.attrgetter(target)(graph_module)
