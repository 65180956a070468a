"""What the values of a graph are made of: constants, looked-up embeddings, or activations. One pass over the nodes."""

from __future__ import annotations

from enum import IntEnum

from torch.fx import Graph, Node

from ..fx.dataflow import is_activation_input, is_float, op_name, tensor_of

_LOOKUPS = {"embedding", "embedding_bag"}


class Kind(IntEnum):
    """What a value depends on; the larger one wins where two meet.

    FIXED: parameters, buffers, integers and constants alone, so that it holds a weight, a mask or positions.
    LOOKED_UP: rows of a table, picked by integers, before anything mixes them.
    ACTIVATION: what a layer computed, or a floating-point input of the model.
    """

    FIXED = 0
    LOOKED_UP = 1
    ACTIVATION = 2


def operand_kinds(graph: Graph, mixing: set[Node]) -> dict[Node, Kind]:
    """Return the kind of every node of a graph."""
    kinds: dict[Node, Kind] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            kinds[node] = Kind.ACTIVATION if is_activation_input(node) else Kind.FIXED
            continue
        # Integers carry no features: positions counted from a mask are as fixed as those of an arange.
        sources = [kinds[source] for source in node.all_input_nodes if _carries_floats(source)]
        kind = max(sources, default=Kind.FIXED)
        if op_name(node) in _LOOKUPS:
            kind = max(kind, Kind.LOOKED_UP)
        elif node in mixing and kind == Kind.LOOKED_UP:
            kind = Kind.ACTIVATION
        kinds[node] = kind
    return kinds


def _carries_floats(node: Node) -> bool:
    return tensor_of(node) is None or is_float(node)
