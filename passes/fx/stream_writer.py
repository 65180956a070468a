"""Write streams into a graph: in one piece or in n, in the regions and the grad mode of the value that they are for.

Streams are held anchored: stream 0 and the others' differences from it (`kernels.anchored`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.fx.node import map_arg

from .added_nodes import Role, mark
from .dataflow import sizes_of, tensor_of
from .grad_modes import grad_modes, set_grad_mode
from .regions import Region, put_into


@dataclass
class Streams:
    """The n anchored streams of one value: stacked [*, n, C], or as n values of the plain layout, or both.

    Attributes:
        dim: the feature dimension of the plain value that the stacked form has moved last.
    """

    dim: int
    stacked: Node | None = None
    parts: list[Node] | None = None


class StreamWriter:
    """A new graph, and the place in it where nodes are written.

    Attributes:
        graph: the new graph.
        n: number of streams.
        regions: those that are open.
        modes: for each node of the old graph, whether gradients are recorded there.
        mode: whether they are, where nodes are written.
    """

    def __init__(self, graph_module: GraphModule, n: int) -> None:
        """Begin an empty graph for the rewrite of another one."""
        self.graph = Graph()
        self.n = n
        self.regions: tuple[Region, ...] = ()
        self.modes = grad_modes(graph_module)
        self.mode = True

    def mean(self, stacked: Node, origin: Node) -> Node:
        """Collapse streams to their mean: the anchor and the mean of the differences, whose zeros keep it exact."""
        n = self.n
        first = self.one_of(stacked, 0, origin)
        others = self.emit(origin, torch.narrow, stacked, -2, 1, n - 1)
        return self.emit(origin, torch.add, first, self.emit(origin, torch.sum, others, -2), alpha=1.0 / n)

    def stacked(self, streams: Streams, dim: int, origin: Node) -> Node:
        """Return streams as one [*, n, C] value whose features come from dimension `dim`."""
        if streams.stacked is None or streams.dim != dim:
            parts = [self.moved(part, dim, -1, origin) for part in self.parts(streams, origin)]
            streams.stacked, streams.dim = self.emit(origin, torch.stack, parts, -2), dim
        return streams.stacked

    def parts(self, streams: Streams, origin: Node) -> list[Node]:
        """Return streams as n values of the plain layout."""
        if streams.parts is None:
            assert streams.stacked is not None
            stacked = streams.stacked
            streams.parts = [
                self.unstacked(self.one_of(stacked, index, origin), streams.dim, origin) for index in range(self.n)
            ]
        return streams.parts

    def one_of(self, stacked: Node, index: int, origin: Node) -> Node:
        """Return one of n stacked values."""
        # Counted from the front: DTensor's rule for the backward of `select` takes no negative dimension.
        return self.emit(origin, torch.select, stacked, len(sizes_at(stacked)) - 2, index)

    def released(self, streams: Streams, origin: Node) -> list[Node]:
        """Return the streams themselves as n values of the plain layout."""
        first, *others = self.parts(streams, origin)
        return [first, *(self.emit(origin, torch.add, part, first) for part in others)]

    def anchored(self, released: list[Node], origin: Node) -> list[Node]:
        """Return what `released` was given: the first stream, and the others' differences from it."""
        first, *others = released
        return [first, *(self.emit(origin, torch.sub, part, first) for part in others)]

    def unstacked(self, value: Node, dim: int, origin: Node) -> Node:
        """Return a value of the stacked form, its features last, in the plain layout."""
        return self.moved(value, -1, dim, origin)

    def moved(self, value: Node, start: int, end: int, origin: Node) -> Node:
        """Return a value with one dimension moved."""
        rank = len(sizes_at(value))
        if start % rank == end % rank:
            return value
        return self.emit(origin, torch.movedim, value, start, end)

    def spelled(self, origin: Node, function: Callable[..., Tensor], value: Node, *constants: Any) -> Node:
        """Add what a function of this package computes, operation by operation.

        A graph that calls a Python function which is not torch's own is never taken from the compilers' caches.
        """
        made: dict[Node, Node] = {}
        for node in symbolic_trace(lambda traced: function(traced, *constants)).graph.nodes:
            if node.op == "placeholder":
                made[node] = value
            elif node.op != "output":
                arguments = map_arg((node.args, node.kwargs), made.__getitem__)
                made[node] = self.emit(origin, node.target, *arguments[0], **arguments[1])
        return made[node.args[0]]

    def emit(self, origin: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a node that speaks for `origin`: its metadata, with the example value of its own computation."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        wanted = self.modes[origin]
        if wanted != self.mode:
            put_into(set_grad_mode(self.graph, wanted), self.regions)
        node = self.graph.create_node(kind, target, args, kwargs)
        node.meta = {key: value for key, value in origin.meta.items() if key != "grapharg"}
        node.meta["example_value"] = _evaluate(target, args, kwargs)
        put_into(node, self.regions)
        if wanted != self.mode:
            put_into(set_grad_mode(self.graph, self.mode), self.regions)
        return mark(node, Role.STREAM)


def sizes_at(node: Node) -> tuple[Any, ...]:
    """Return the sizes of a node's value."""
    tensor = tensor_of(node)
    assert tensor is not None, f"{node} has no example value"
    return sizes_of(tensor)


def _evaluate(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation on example values (fake tensors: shapes and dtypes, no arithmetic)."""
    values = map_arg(args, lambda node: node.meta["example_value"])
    keywords = map_arg(kwargs, lambda node: node.meta["example_value"])
    with torch.no_grad():
        if isinstance(target, str):
            return getattr(values[0], target)(*values[1:], **keywords)
        return target(*values, **keywords)
