"""Where in a graph gradients are off: `torch.no_grad()` in a forward leaves nodes that switch the mode."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

_SWITCH = torch._C._set_grad_enabled


def grad_modes(graph_module: GraphModule) -> dict[Node, bool]:
    """Return, for each node, whether gradients are on where it runs.

    The graph begins in the mode that is on now: while a backend runs, that is the mode of the frame's first line.
    """
    mode = torch.is_grad_enabled()
    modes: dict[Node, bool] = {}
    for node in graph_module.graph.nodes:
        if node.target is _SWITCH:
            mode = bool(node.args[0])
        modes[node] = mode
    return modes


def set_grad_mode(graph: Graph, mode: bool) -> Node:
    """Add a node that switches gradients on or off."""
    return graph.call_function(_SWITCH, (mode,))
