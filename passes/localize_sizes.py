"""Read sizes anew where they are used.

A graph that is cut hands tensors from one piece to the next: a size that crosses the cut would be a symbolic integer in
the graph and a plain one in the piece that returns it, which AOTAutograd cannot return.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from .fx.dataflow import is_size


def localize_sizes(graph_module: GraphModule) -> GraphModule:
    """Give every user of a size, or of what is computed of sizes, a copy of its own, in place; return the graph."""
    graph = graph_module.graph

    def copied(node: Node) -> Node:
        return graph.node_copy(node, copied) if _tells_sizes(node) else node

    for node in list(graph.nodes):
        if node.op == "output" or _tells_sizes(node):
            continue
        for source in node.all_input_nodes:
            if _tells_sizes(source):
                with graph.inserting_before(node):
                    node.replace_input_with(source, copied(source))
    for node in reversed(graph.nodes):
        if _tells_sizes(node) and not node.users:
            graph.erase_node(node)
    graph.lint()
    graph_module.recompile()
    return graph_module


def _tells_sizes(node: Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    value: Any = node.meta.get("example_value")
    if isinstance(value, tuple | list):
        return bool(value) and all(isinstance(item, int | torch.SymInt) for item in value)
    return is_size(node)
