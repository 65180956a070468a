"""Build new graphs from old ones without losing what Dynamo and AOTAutograd hang on nodes."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Graph, GraphModule, Node

_PARAMETER_SOURCES = "_param_name_to_source"


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
    """Wrap a graph over the same attributes as `graph_module`, with its metadata and Dynamo's sources of parameters.

    AOTAutograd asks for the sources only to tell a Dynamo graph from others. Without them it takes parameters for
    activations: CUDA graphs then copy them at every call, and the partitioner counts saving them as memory.
    """
    graph.lint()
    result = GraphModule(graph_module, graph, class_name=type(graph_module).__name__)
    result.meta = dict(graph_module.meta)
    if hasattr(graph_module, _PARAMETER_SOURCES):
        setattr(result, _PARAMETER_SOURCES, getattr(graph_module, _PARAMETER_SOURCES))
    return result
