"""Form the regions again that `open_regions` opened, over the rewritten nodes.

The operator is called as the user's code called it, so what it promises still holds: a checkpointed body is recomputed
in the backward, by the policy that was given for it, and what lies at its border are the streams. Nothing is searched:
a region is a run of nodes that carry it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from .fx.graph_copy import attribute_of, copy_node, module_like
from .fx.regions import Region, put_into, regions_of


def close_regions(graph_module: GraphModule) -> GraphModule:
    """Return a graph in which every opened region is a call of its operator again.

    A graph without opened regions is returned as it is. Regions of `invoke_subgraph` stay open.
    """
    if not any(regions_of(node) for node in graph_module.graph.nodes):
        return graph_module
    return _Closer(graph_module).run()


class _Closer:
    """The state of one closing: the attributes of the new graph and of its bodies."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.attributes: dict[str, Any] = {
            str(node.target): attribute_of(graph_module, str(node.target))
            for node in graph_module.graph.nodes
            if node.op in ("get_attr", "call_module")
        }
        self.bodies = 0

    def run(self) -> GraphModule:
        graph = Graph()
        self._copy(graph, list(self.graph_module.graph.nodes), {}, depth=0)
        return module_like(self.graph_module, graph, self.attributes)

    def _copy(self, graph: Graph, nodes: list[Node], values: dict[Node, Node], depth: int) -> None:
        for region, members in _runs(nodes, depth):
            if region is None:
                for node in members:
                    values[node] = copy_node(graph, node, values.__getitem__)
                    put_into(values[node], ())
            elif not region.closes:
                self._copy(graph, members, values, depth + 1)
            else:
                self._close(graph, region, members, values, depth)

    def _close(self, graph: Graph, region: Region, members: list[Node], values: dict[Node, Node], depth: int) -> None:
        inside = set(members)
        # In order of first use, without doubles.
        inputs = list(dict.fromkeys(value for node in members for value in node.all_input_nodes if value not in inside))
        outputs = [node for node in members if any(user not in inside for user in node.users)]
        if not outputs:
            # Nothing reads the region: what is left of it are side effects.
            self._copy(graph, members, values, depth + 1)
            return
        target = f"mhc_body_{self.bodies}"
        self.bodies += 1
        self.attributes[target] = self._body(region, members, inputs, outputs, depth)
        holder = graph.get_attr(target)
        arguments = (*region.leading, holder, *(values[value] for value in inputs))
        call = graph.call_function(region.operator, arguments, dict(region.keywords))
        call.meta = {**region.call_meta, "example_value": tuple(node.meta.get("example_value") for node in outputs)}
        put_into(call, ())
        for index, node in enumerate(outputs):
            values[node] = graph.call_function(operator.getitem, (call, index))
            values[node].meta = dict(node.meta)
            put_into(values[node], ())

    def _body(
        self, region: Region, members: list[Node], inputs: list[Node], outputs: list[Node], depth: int
    ) -> GraphModule:
        graph = Graph()
        values: dict[Node, Node] = {}
        for value in inputs:
            values[value] = graph.placeholder(value.name)
            values[value].meta = {key: entry for key, entry in value.meta.items() if key != "grapharg"}
            put_into(values[value], ())
        self._copy(graph, members, values, depth + 1)
        graph.output(tuple(values[node] for node in outputs))
        body = GraphModule(self.attributes, graph)
        body.meta = dict(region.body_meta)
        return body


def _runs(nodes: list[Node], depth: int) -> Iterator[tuple[Region | None, list[Node]]]:
    """Yield consecutive nodes of one region, `depth` regions below the graph; None where there is none that deep."""

    def at_depth(node: Node) -> Region | None:
        regions = regions_of(node)
        return regions[depth] if len(regions) > depth else None

    for region, members in itertools.groupby(nodes, at_depth):
        yield region, list(members)
