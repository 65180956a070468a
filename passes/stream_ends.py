"""What leaves a graph that ends in the middle of a model, and what such a graph begins with. Reads only."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from .fx.carriers import carried_from, inputs_over_carriers
from .fx.dataflow import (
    data_inputs,
    is_activation_input,
    is_add,
    is_float,
    is_norm,
    mixes,
    operands,
    output_of,
)
from .residual import Findings, Reason, Rejection


@dataclass(frozen=True)
class StreamEnds:
    """What lies at a graph's ends. Half residual blocks are what no readout of streams can mend.

    Attributes:
        branch_leaves: a value leaves the graph together with something that was mixed from it.
        block_leaves: the same, counted from a branch's norm on, and up to its add: between two whole blocks nothing
            leaves but the stream.
        halves: adds that join an input with something computed from other inputs alone.
        passing: outputs that are, over carriers alone, an input: positions of both.
    """

    branch_leaves: bool
    block_leaves: bool
    halves: tuple[Rejection, ...]
    passing: tuple[tuple[int, int], ...]


def find_stream_ends(graph_module: GraphModule, findings: Findings) -> StreamEnds:
    """Look at the ends of a normalized graph in which the residual adds have been found."""
    adds = {add.node for chain in findings.chains for add in chain.adds}
    return StreamEnds(
        branch_leaves=_branch_leaves(graph_module),
        block_leaves=_branch_leaves(graph_module, adds),
        halves=_halves(graph_module, findings),
        passing=inputs_over_carriers(graph_module.graph),
    )


def _branch_leaves(graph_module: GraphModule, behind: Set[Node] | None = None) -> bool:
    leaving = {node for node in output_of(graph_module).all_input_nodes if is_float(node)}
    for start in leaving:
        stack: list[tuple[Node, bool]] = [(start, False)]
        seen: set[tuple[Node, bool]] = set()
        while stack:
            node, mixed = stack.pop()
            for user in node.users:
                if user.op == "output" or (behind is not None and user in behind):
                    continue
                begun = mixes(user, graph_module) or (behind is not None and is_norm(user))
                step = (user, mixed or begun)
                if step not in seen:
                    if step[1] and user in leaving:
                        return True
                    seen.add(step)
                    stack.append(step)
    return False


def _halves(graph_module: GraphModule, findings: Findings) -> tuple[Rejection, ...]:
    independent = {entry.add: entry for entry in findings.rejections if entry.reason is Reason.INDEPENDENT}
    found = []
    for node in graph_module.graph.nodes:
        if node.name in independent and is_add(node):
            left, right = operands(node)
            pairs = ((left, right), (right, left))
            if any(is_activation_input(_origin(skip)) and _depends_on_inputs(other) for skip, other in pairs):
                found.append(independent[node.name])
    return tuple(found)


def _origin(node: Node) -> Node:
    while (source := carried_from(node)) is not None:
        node = source
    return node


def _depends_on_inputs(node: Node) -> bool:
    stack, seen = [node], {node}
    while stack:
        for source in data_inputs(current := stack.pop()):
            if source not in seen:
                seen.add(source)
                stack.append(source)
        if is_activation_input(current):
            return True
    return False
