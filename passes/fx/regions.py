"""The regions of a graph: the bodies that higher-order operators run, and which of them can be opened.

Gradient checkpointing, `nested_compile_region` and the like put a part of the model into a body graph of its own. A
residual stream has to cross such bodies, so they are opened before the search and closed again behind the rewrite. In
between, each node carries the regions that it lies in.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from .dataflow import is_higher_order, output_of

_META = "mhc_regions"

# Where the body stands among the operator's arguments, and how many constants stand between it and its operands.
_OPENABLE = {"tag_activation_checkpoint": (0, 0), "invoke_subgraph": (0, 1), "wrap_with_autocast": (4, 0)}

# Only what the region does to its body is worth a region: a subgraph that is compiled once and called often is no
# longer the same for every call, once each call has parameters of its own.
_DISSOLVED = {"invoke_subgraph"}


@dataclass(frozen=True, eq=False)
class Region:
    """One call of a body graph. Two regions are equal only if they are the same call.

    Attributes:
        path: names of the call's node and of those around it, outermost first: what tells regions of one graph apart.
        operator: the higher-order operator.
        leading: its arguments before the body.
        keywords: its keyword arguments, such as `use_reentrant`.
        body_meta: the body's metadata, such as the policy of selective checkpointing.
        call_meta: the metadata of the call's node.
    """

    path: tuple[str, ...]
    operator: Any
    leading: tuple[Any, ...]
    keywords: dict[str, Any] = field(repr=False)
    body_meta: dict[str, Any] = field(repr=False)
    call_meta: dict[str, Any] = field(repr=False)

    @property
    def closes(self) -> bool:
        """Whether the region is to be formed again behind the rewrite."""
        return str(self.operator.name()) not in _DISSOLVED


@dataclass(frozen=True)
class RegionCall:
    """A higher-order node that can be opened.

    Attributes:
        region: what has to be known to close it again.
        body: the body graph.
        operands: what the body's placeholders stand for; constants stay as they are.
    """

    region: Region
    body: GraphModule
    operands: tuple[Any, ...]


def regions_of(node: Node) -> tuple[Region, ...]:
    """Return the opened regions that a node lies in, outermost first."""
    found: tuple[Region, ...] = node.meta.get(_META, ())
    return found


def put_into(node: Node, regions: tuple[Region, ...]) -> None:
    """Say which opened regions a node lies in."""
    node.meta.pop(_META, None)
    if regions:
        node.meta[_META] = regions


def region_call(node: Node, graph_module: GraphModule, around: tuple[str, ...] = ()) -> RegionCall | None:
    """Describe a higher-order call that can be opened; None for any other node.

    What has no plain body (`cond`, `scan`, `flex_attention`) is none, nor is a call whose results are not taken apart
    one by one.

    Args:
        node: a node of `graph_module`.
        graph_module: the graph that holds the node and, as an attribute, the body.
        around: path of the region around the node.
    """
    if not is_higher_order(node) or node.target.name() not in _OPENABLE:  # type: ignore[union-attr]
        return None
    position, constants = _OPENABLE[node.target.name()]  # type: ignore[union-attr]
    holder = node.args[position]
    body = getattr(graph_module, str(holder.target), None) if isinstance(holder, Node) else None
    operands = node.args[position + 1 + constants :]
    if not isinstance(body, GraphModule) or any(isinstance(value, Node) for value in node.kwargs.values()):
        return None
    wanted = sum(inner.op == "placeholder" for inner in body.graph.nodes)
    apart = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    if not apart or wanted != len(operands) or not isinstance(output_of(body).args[0], tuple | list):
        return None
    region = Region(
        path=(*around, node.name),
        operator=node.target,
        leading=tuple(node.args[:position]),
        keywords=dict(node.kwargs),
        body_meta=dict(body.meta),
        call_meta={key: value for key, value in node.meta.items() if key not in ("example_value", "grapharg")},
    )
    return RegionCall(region, body, tuple(operands))
