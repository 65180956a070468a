"""Put the items of a tuple right behind the operator that returns it.

A graph that is cut hands tensors from one piece to the next, and no tuples: nothing may be cut between the two.
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule


def gather_items(graph_module: GraphModule) -> GraphModule:
    """Move every `getitem` of a tuple-valued node up to that node, in place, and return the graph."""
    for node in list(graph_module.graph.nodes):
        if isinstance(node.meta.get("example_value"), tuple | list):
            last = node
            for item in [user for user in node.users if user.target is operator.getitem]:
                last.append(item)
                last = item
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module
