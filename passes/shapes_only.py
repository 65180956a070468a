"""Stand in for a compiled graph: outputs of the right shapes, no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .fx.dataflow import output_values, size_hint


def shapes_only(graph_module: GraphModule) -> Callable[..., tuple[Any, ...]]:
    """Return a function that takes a graph's inputs and returns zeros in the form of its outputs.

    An input that the graph returns is returned. Floating-point outputs have an autograd node of their own, so that what
    Python code computes from them can be told by it.
    """
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    returned = output_values(graph_module.graph)

    def run(*given: Any) -> tuple[Any, ...]:
        passed = dict(zip(inputs, given, strict=True))
        return tuple(passed[value] if value in passed else _blank(value) for value in returned)

    return run


def _blank(node: Any) -> Any:
    if not isinstance(node, Node):
        return node
    value = node.meta.get("example_value")
    if isinstance(value, Tensor):
        zeros = torch.zeros([size_hint(size) for size in value.shape], dtype=value.dtype, device=value.device)
        # Never a leaf: Python code may change what a graph returns in place.
        return zeros.requires_grad_().clone() if value.dtype.is_floating_point and value.requires_grad else zeros
    return size_hint(value) if isinstance(value, torch.SymInt) else value
