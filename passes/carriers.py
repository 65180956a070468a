"""What a carrier is made of: the nodes that compute a stream value from the one before it."""

from __future__ import annotations

from torch.fx import Node

from mhc_compile.residual import Carrier


def carrier_between(source: Node, node: Node, order: dict[Node, int]) -> Carrier:
    """Return the carrier that leads from one stream value to the next; a norm written out is several nodes."""
    floor = order[source]
    behind, stack = {node}, [node]
    while stack:
        for value in stack.pop().all_input_nodes:
            if order[value] > floor and value not in behind:
                behind.add(value)
                stack.append(value)
    inside = {source}
    for value in sorted(behind, key=order.__getitem__):
        if any(operand in inside for operand in value.all_input_nodes):
            inside.add(value)
    inside.discard(source)
    nodes = tuple(sorted(inside, key=order.__getitem__))
    absorbed = {node}
    for value in reversed(nodes[:-1]):
        if all(user in absorbed for user in value.users):
            absorbed.add(value)
    return Carrier(node, source, nodes, frozenset(absorbed))
