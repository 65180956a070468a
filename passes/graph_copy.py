"""Build new graphs from old ones without losing what Dynamo and AOTAutograd hang on nodes."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph, GraphModule, Node


def copy_node(graph: Graph, node: Node, argument: Callable[[Node], Node]) -> Node:
    """Copy a node with its metadata, and a placeholder's `_dynamo_source`, which `Graph.node_copy` forgets.

    AOTAutograd asserts that every placeholder of a Dynamo graph has a source.
    """
    copied = graph.node_copy(node, argument)
    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        copied._dynamo_source = source
    return copied


def module_like(graph_module: GraphModule, graph: Graph) -> GraphModule:
    """Wrap a graph over the same attributes as `graph_module`, with its metadata."""
    graph.lint()
    result = GraphModule(graph_module, graph, class_name=type(graph_module).__name__)
    result.meta = dict(graph_module.meta)
    return result
