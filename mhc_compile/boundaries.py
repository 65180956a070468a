"""Refuse to rewrite a stream that a graph break or a DDP bucket cuts.

Each piece would be a correct graph of its own, but the streams would be averaged at every cut: another model, and one
that changes whenever the break moves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from torch import nn
from torch.fx import GraphModule, Node

from .capture import Frame
from .config import MHCConfig
from .errors import StreamCutError
from .passes.dataflow import carried_from, data_inputs, is_add, is_float, mixes, operands, output_of
from .planning import Plan
from .residual import Reason


@dataclass
class _Break:
    """A graph that ended early, or a frame that Dynamo gave up on.

    Attributes:
        root: the module whose frame it was.
        reason: why, with the source line.
        stream_left: a stream value left the graph.
        branch_left: a value left the graph together with something mixed from it: half a residual block.
        undo: takes away the parameters that this call created before.
    """

    root: weakref.ref[nn.Module]
    reason: str
    stream_left: bool
    branch_left: bool = False
    undo: list[Callable[[], None]] = field(default_factory=list)


_OPEN: list[_Break] = []


def forget_breaks(root: nn.Module) -> None:
    """Forget the breaks of a model: a new call begins."""
    _OPEN[:] = [entry for entry in _OPEN if entry.root() is not None and entry.root() is not root]


def given_up(root: nn.Module) -> str | None:
    """Return why Dynamo gave up on a frame of `root`, if it did and no new call has begun since."""
    return next((entry.reason for entry in reversed(_OPEN) if entry.root() is root), None)


def remember_given_up(root: nn.Module, reason: str) -> None:
    """Remember that Dynamo gave up on a frame of `root`: whatever is compiled inside it, is a piece."""
    forget_breaks(root)
    _OPEN.append(_Break(weakref.ref(root), reason, stream_left=True))


def has_open_breaks(frame: Frame) -> bool:
    """Tell whether a graph break in a caller is open; a frame of a plain function shows no module, any will do."""
    return any(entry.root() is not None for entry in _OPEN if not frame.roots) or any(
        _below(root, entry.root()) for entry in _OPEN for root in frame.roots
    )


def undo_with_break(frame: Frame, undo: Callable[[], None]) -> None:
    """Have `undo` run, should the graph break that ends this frame's graph turn out to cut the stream."""
    if frame.break_reason is not None and _OPEN:
        _OPEN[-1].undo.append(undo)


def refuse_cut_streams(graph_module: GraphModule, plan: Plan, frame: Frame, config: MHCConfig) -> None:
    """Check a graph against the graph breaks before it, and remember the one that ends it.

    Raises:
        StreamCutError: the stream enters this graph from before a graph break. What this call has attached so far is
            taken off again.
    """
    if not frame.roots:
        return
    root = frame.root
    nested = any(entry.root() is not root and _below(root, entry.root()) for entry in _OPEN)
    if not frame.resumed and not nested:
        forget_breaks(root)
    enters = any(_is_input(chain.head) for chain in plan.chains)
    for entry in _OPEN:
        if not _below(root, entry.root()):
            continue
        joins = config.strict and entry.branch_left and _joins_inputs(graph_module, plan)
        if (entry.stream_left and enters) or joins:
            _refuse(entry.reason)
    if enters and not frame.resumed and frame.caller is not None and any(_leaves(site.add.add) for site in plan.sites):
        _refuse(f"Dynamo compiles {type(root).__name__} alone, because {frame.caller} runs as plain Python")
    if frame.break_reason is not None:
        left = any(_leaves(site.add.add) for site in plan.sites)
        _OPEN.append(_Break(weakref.ref(root), frame.break_reason, left, _branch_leaves(graph_module)))


def _refuse(reason: str) -> NoReturn:
    for entry in _OPEN:
        for undo in entry.undo:
            undo()
    _OPEN.clear()
    raise StreamCutError(
        f"a graph break cuts the residual stream: {reason}. The streams would be averaged there. Take the break away "
        "(TORCH_LOGS=graph_breaks shows why Dynamo breaks; printing, .item() and data-dependent branches are the usual "
        "causes), or move it outside the residual blocks."
    )


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


def _branch_leaves(graph_module: GraphModule) -> bool:
    """Tell whether a value leaves the graph together with something that was mixed from it."""
    output = output_of(graph_module)
    leaving = {node for node in output.all_input_nodes if is_float(node)}
    for start in leaving:
        stack: list[tuple[Node, bool]] = [(start, False)]
        seen: set[tuple[Node, bool]] = set()
        while stack:
            node, mixed = stack.pop()
            for user in node.users:
                step = (user, mixed or mixes(user, graph_module))
                if step not in seen and user.op != "output":
                    if step[1] and user in leaving:
                        return True
                    seen.add(step)
                    stack.append(step)
    return False


def _joins_inputs(graph_module: GraphModule, plan: Plan) -> bool:
    """Tell whether an add joins an input with something computed from other inputs alone."""
    independent = {entry.add for entry in plan.rejections if entry.reason is Reason.INDEPENDENT}
    for node in graph_module.graph.nodes:
        if node.name in independent and is_add(node):
            left, right = operands(node)
            for skip, branch in ((left, right), (right, left)):
                if _is_input(_origin(skip)) and _depends_on_inputs(branch):
                    return True
    return False


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
        if _is_input(current):
            return True
    return False
