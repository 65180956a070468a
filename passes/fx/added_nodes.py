"""What the rewrite adds to a graph, marked on the nodes that it adds; the model's own nodes bear no mark."""

from __future__ import annotations

from enum import Enum

from torch.fx import Node

_KEY = "mhc_role"


class Role(Enum):
    """What an added node is for."""

    HEAD = "a plain value expanded to n equal streams"
    STREAM = "on the streams: operators, carriers, coefficients, layer inputs"
    READOUT = "streams collapsed to one value for whoever else reads them"


def mark(node: Node, role: Role) -> Node:
    """Note on an added node what it is for, in place of an earlier note; copies of the node keep it."""
    node.meta[_KEY] = role
    return node


def role_of(node: Node) -> Role | None:
    """Return what an added node is for; None for a node of the model."""
    return node.meta.get(_KEY)
