"""Open the bodies of higher-order operators: their nodes move into the graph, each remembering its region.

What is found behind this pass is what would be found without the regions. `close_regions` is the way back.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Set
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .fx.dataflow import output_of
from .fx.graph_copy import attribute_of, copy_node, module_like
from .fx.regions import Region, RegionCall, put_into, region_call
from .fx.sources import source_name

_ATTRIBUTE = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")


def open_regions(graph_module: GraphModule, closed: Set[tuple[str, ...]] = frozenset()) -> GraphModule:
    """Return a graph without the openable regions; `graph_module` itself, if it has none.

    Args:
        graph_module: Dynamo's graph; it is not changed.
        closed: paths of regions to leave as they are.
    """
    if not any(region_call(node, graph_module) for node in graph_module.graph.nodes):
        return graph_module
    return _Opener(graph_module, closed).run()


class _Opener:
    """The state of one opening: the new graph, its attributes, and how each body was called first."""

    def __init__(self, graph_module: GraphModule, closed: Set[tuple[str, ...]]) -> None:
        self.graph_module = graph_module
        self.closed = closed
        self.graph = Graph()
        self.attributes: dict[str, Any] = {}
        self.first_calls: dict[GraphModule, tuple[Any, ...]] = {}

    def run(self) -> GraphModule:
        self._copy(self.graph_module, (), {}, {})
        return module_like(self.graph_module, self.graph, self.attributes)

    def _copy(
        self, source: GraphModule, around: tuple[Region, ...], values: dict[Node, Any], renamed: dict[str, str]
    ) -> None:
        """Copy a graph's nodes, opening what can be opened; `values` maps its placeholders and fills up."""
        path = around[-1].path if around else ()
        calls = {node: region_call(node, source, path) for node in source.graph.nodes}
        opened = {node: call for node, call in calls.items() if call and call.region.path not in self.closed}
        for node in source.graph.nodes:
            if node in opened:
                values[node] = self._open(opened[node], around, values, renamed)
            elif node.target is operator.getitem and node.args[0] in opened:
                values[node] = values[node.args[0]][node.args[1]]
            elif node in values or (around and node.op == "output"):
                continue
            elif not (node.op == "get_attr" and node.users and all(user in opened for user in node.users)):
                values[node] = self._copied(source, node, around, values, renamed)

    def _open(
        self, call: RegionCall, around: tuple[Region, ...], values: dict[Node, Any], renamed: dict[str, str]
    ) -> tuple[Any, ...]:
        operands = map_arg(call.operands, values.__getitem__)
        first = self.first_calls.setdefault(call.body, operands)
        names = {**renamed, **_renamed_modules(first, operands)}
        placeholders = (node for node in call.body.graph.nodes if node.op == "placeholder")
        inner: dict[Node, Any] = dict(zip(placeholders, operands, strict=True))
        self._copy(call.body, (*around, call.region), inner, names)
        results: Any = output_of(call.body).args[0]
        return tuple(map_arg(results, inner.__getitem__))

    def _copied(
        self,
        source: GraphModule,
        node: Node,
        around: tuple[Region, ...],
        values: dict[Node, Any],
        renamed: dict[str, str],
    ) -> Node:
        copied = copy_node(self.graph, node, values.__getitem__)
        put_into(copied, around)
        if node.op in ("get_attr", "call_module"):
            # Two bodies may both have an attribute of this name.
            target = "_".join((*(around[-1].path if around else ()), str(node.target).replace(".", "_")))
            copied.target = target if around else node.target
            self.attributes[str(copied.target)] = attribute_of(source, str(node.target))
        if renamed and "nn_module_stack" in node.meta:
            copied.meta["nn_module_stack"] = _renamed_stack(node.meta["nn_module_stack"], renamed)
        return copied


def _renamed_modules(first: tuple[Any, ...], operands: tuple[Any, ...]) -> dict[str, str]:
    """Tell which modules a body stands for in this call, by the module paths in its first call.

    `invoke_subgraph` traces a body once: in the second block's call its nodes still name the first block's modules.
    The parameters that the two calls hand over tell which is which.
    """
    found: dict[str, str] = {}
    for before, now in zip(first, operands, strict=True):
        old, new = _path_of(before), _path_of(now)
        while old != new and old and new and old[-1] == new[-1]:
            old, new = old[:-1], new[:-1]
            found.setdefault(".".join(old), ".".join(new))
    return found


def _path_of(value: Any) -> tuple[str, ...]:
    """Return where an operand is read from, as parts: L['self']._modules['stem']… is ("L['self']", "stem", …)."""
    name = source_name(value)
    return () if name is None else tuple(_ATTRIBUTE.sub(r".\1", name).split("."))


def _renamed_stack(stack: dict[str, Any], renamed: dict[str, str]) -> dict[str, Any]:
    """Put other modules into a module stack; a renamed entry is keyed by its path, for its id is the old module's."""
    result: dict[str, Any] = {}
    for key, (path, *rest) in stack.items():
        parts = str(path).split(".")
        depths = range(len(parts), 0, -1)
        known = next((depth for depth in depths if ".".join(parts[:depth]) in renamed), 0)
        if known:
            path = ".".join((renamed[".".join(parts[:known])], *parts[known:]))
        result[path if known else key] = (path, *rest)
    return result
