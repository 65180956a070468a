"""Refuse to rewrite a stream that a graph break or a DDP bucket cuts.

Each piece would be a correct graph of its own, but the streams would be averaged at every cut: another model, and one
that changes whenever the break moves.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from .capture import Frame
from .config import MHCConfig
from .errors import StreamCutError
from .passes.dataflow import carried_from, data_inputs, is_add, is_float, mixes, operands
from .planning import Plan
from .residual import Reason


@dataclass(frozen=True)
class _Break:
    """A graph that ended early while a stream, or the makings of a residual add, were still alive."""

    root: weakref.ref[nn.Module]
    reason: str
    stream_left: bool


_OPEN: list[_Break] = []


def forget_breaks(root: nn.Module) -> None:
    """Forget the breaks of a model: a new call begins."""
    _OPEN[:] = [entry for entry in _OPEN if entry.root() is not None and entry.root() is not root]


def has_open_breaks(frame: Frame) -> bool:
    """Tell whether a graph break in a caller is still open."""
    return any(_below(root, entry.root()) for entry in _OPEN for root in frame.roots)


def refuse_cut_streams(graph_module: GraphModule, plan: Plan, frame: Frame, config: MHCConfig) -> None:
    """Check a graph against the graph breaks before it, and remember the one that ends it.

    Raises:
        StreamCutError: the stream enters this graph from before a graph break.
    """
    if not frame.roots:
        return
    root = frame.root
    continues = frame.resumed or any(entry.root() is not root and _below(root, entry.root()) for entry in _OPEN)
    if not continues:
        forget_breaks(root)
    for entry in _OPEN:
        if not _below(root, entry.root()):
            continue
        enters = entry.stream_left and any(_is_input(chain.head) for chain in plan.chains)
        if enters or (config.strict and _straddles(graph_module, plan)):
            _OPEN.clear()
            raise StreamCutError(
                f"a graph break cuts the residual stream: {entry.reason}. The streams would be averaged there. Take "
                "the break away (TORCH_LOGS=graph_breaks shows why Dynamo breaks; printing, .item() and "
                "data-dependent branches are the usual causes), or move it outside the residual blocks."
            )
    if frame.break_reason is not None:
        left = any(_leaves(site.add.add) for site in plan.sites)
        _OPEN.append(_Break(weakref.ref(root), frame.break_reason, left))


def _below(module: nn.Module, root: nn.Module | None) -> bool:
    return root is not None and any(candidate is module for candidate in root.modules())


def _is_input(node: Node) -> bool:
    """Tell whether a value enters the graph as an activation: a placeholder that is no parameter or buffer."""
    return (
        node.op == "placeholder"
        and is_float(node)
        and "_dynamo_static_input_type" not in (node.meta.get("tensor_dict") or {})
    )


def _leaves(add: Node) -> bool:
    """Tell whether a stream value leaves the graph, over carriers."""
    stack, seen = [add], {add}
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                return True
            if user not in seen and carried_from(user) is not None:
                seen.add(user)
                stack.append(user)
    return False


def _straddles(graph_module: GraphModule, plan: Plan) -> bool:
    """Tell whether an add joins an input with something mixed from other inputs alone: half a residual block."""
    independent = {entry.add for entry in plan.rejections if entry.reason is Reason.INDEPENDENT}
    for node in graph_module.graph.nodes:
        if node.name not in independent or not is_add(node):
            continue
        for skip, branch in (operands(node), operands(node)[::-1]):
            if _is_input(_origin(skip)) and _mixed_from_inputs(branch, graph_module):
                return True
    return False


def _origin(node: Node) -> Node:
    while (source := carried_from(node)) is not None:
        node = source
    return node


def _mixed_from_inputs(branch: Node, graph_module: GraphModule) -> bool:
    stack, seen, mixed, fed = [branch], {branch}, False, False
    while stack:
        node = stack.pop()
        mixed |= mixes(node, graph_module)
        fed |= _is_input(node)
        for source in data_inputs(node):
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return mixed and fed
