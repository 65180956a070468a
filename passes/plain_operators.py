"""Prepare a rewritten graph for export: no region of autocast around the operators, and no names of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import SymInt
from torch.fx import GraphModule, Node

from ..kernels.inlined import FUNCTIONS


def without_autocast_regions(graph_module: GraphModule) -> None:
    """Call the inlined operators' own functions, in place: exported without autocast, there is none to switch off."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in FUNCTIONS:
            node.target = node.target.__wrapped__
    graph_module.recompile()


def size_inputs(graph_module: GraphModule) -> dict[int, tuple[int, int]]:
    """Return for each input of a graph that is a size: the number of the input that it is a size of, and the dim."""
    inputs: Sequence[Node] = graph_module.graph.find_nodes(op="placeholder")
    known: dict[Any, tuple[int, int]] = {}
    for number, node in enumerate(inputs):
        for dim, size in enumerate(getattr(node.meta.get("example_value"), "shape", ())):
            if isinstance(size, SymInt):
                known.setdefault(size.node.expr, (number, dim))
    found = {}
    for number, node in enumerate(inputs):
        value = node.meta.get("example_value")
        if isinstance(value, SymInt) and value.node.expr in known:
            found[number] = known[value.node.expr]
    return found
