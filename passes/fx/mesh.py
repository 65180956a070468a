"""Bring parameters in a graph to a device mesh."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from ..residual import MeshLayout
from .added_nodes import Role, mark


def enter_mesh(graph: Graph, layout: MeshLayout, parameters: Sequence[Node]) -> list[Node]:
    """Add what makes parameters that are the same on every rank fit a stream that is divided over the ranks.

    Args:
        graph: grows at its insertion point.
        layout: of the stream.
        parameters: nodes of the graph.

    Returns:
        The parameters as the stream's operators take them, in order.
    """
    # Most graphs know no mesh, and torch.distributed.tensor takes its time to import.
    from ...kernels import sharding

    sharding.register_sharding_rules()
    function = sharding.replicated if layout.distributed else sharding.sum_gradients
    target = functools.partial(function, mesh=layout.mesh, dims=layout.divided)
    # Functions that a graph calls are asked for their name.
    functools.update_wrapper(target, function)
    examples = [node.meta["example_value"] for node in parameters]
    with torch.no_grad():
        made = target(*examples)
    together = graph.call_function(target, tuple(parameters))
    together.meta = {"example_value": made}
    entered = []
    for index, example in enumerate(made):
        node = graph.call_function(operator.getitem, (together, index))
        node.meta = {"example_value": example}
        entered.append(mark(node, Role.STREAM))
    mark(together, Role.STREAM)
    return entered
