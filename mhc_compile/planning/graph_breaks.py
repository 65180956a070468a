"""What becomes of a stream that a graph break or a DDP bucket cuts.

Each piece is a correct graph of its own, but the streams are averaged at every cut and expanded again behind it:
another model, and one that changes whenever the break moves. So a cut is an error, unless `on_boundary="collapse"` asks
for that model; the report then says where. With `strict=False` what lies behind the cut stays plain instead.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from typing import NoReturn

from torch import nn
from torch.fx import GraphModule, Node

from ..attachment.site_parameters import READOUT_SUFFIX, has_parameters
from ..config import MHCConfig
from ..dynamo.frames import Frame, is_split_by_ddp
from ..errors import MHCWarning, StreamCutError
from ..passes.fx.carriers import carried_from
from ..passes.fx.dataflow import data_inputs, is_add, is_float, is_norm, mixes, operands, output_of
from ..passes.residual import Reason, Rejection
from .sites import Plan, PlannedChain


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


def check_graph_breaks(captured: GraphModule, plain: GraphModule, plan: Plan, frame: Frame, config: MHCConfig) -> Plan:
    """Check a graph against the graph breaks before it, and remember the one that ends it.

    Args:
        captured: the graph as the backend was given it.
        plain: the same, normalized.
        plan: what was found in it.
        frame: the frame behind it.
        config: `on_boundary` and `strict` decide.

    Returns:
        The plan, with the cuts that its streams cross, or without the chains behind a cut.

    Raises:
        StreamCutError: the stream enters this graph from before a graph break. What this call has attached so far is
            taken off again.
    """
    if is_split_by_ddp(captured):
        return _in_bucket(plain, plan, config)
    if not frame.roots:
        return plan
    root = frame.root
    nested = any(entry.root() is not root and _below(root, entry.root()) for entry in _OPEN)
    if not frame.resumed and not nested:
        forget_breaks(root)
    entering = [chain for chain in plan.chains if _is_input(chain.head)]
    around = [entry for entry in _OPEN if _below(root, entry.root())]
    reasons = [entry.reason for entry in around if entry.stream_left and entering]
    leaving = any(_leaves(site.add.add) for site in plan.sites)
    if not reasons and entering and leaving and not frame.resumed and frame.caller is not None:
        reasons = [f"Dynamo compiles {type(root).__name__} alone, because {frame.caller} runs as plain Python"]
    halves = [entry.reason for entry in around if entry.branch_left]
    halved = _joins(plain, plan) if halves else []
    if reasons or halved:
        plan = _settled(plan, entering, reasons, halved, halves, config)
    if frame.break_reason is not None:
        left = any(_leaves(site.add.add) for site in plan.sites)
        _OPEN.append(_Break(weakref.ref(root), frame.break_reason, left, _branch_leaves(plain)))
    # A graph that ends early, or that of a module inside a forward that runs as plain Python.
    goes_on = frame.break_reason is not None or frame.caller is not None
    return _read_out_by_mean(plan, config) if goes_on else plan


def _settled(
    plan: Plan,
    entering: list[PlannedChain],
    reasons: list[str],
    halved: list[Rejection],
    halves: list[str],
    config: MHCConfig,
) -> Plan:
    """Refuse, collapse, or leave plain what graph breaks cut."""
    collapses = config.on_boundary == "collapse"
    lost = [] if collapses else [site for chain in entering if reasons for site in chain.sites if site.selected]
    if not collapses and (config.strict or any(has_parameters(site.owner, site.label) for site in lost)):
        _refuse((reasons or halves)[-1])
    # An add whose two operands both come from before the break can no longer be told from any other sum.
    why = {entry: replace(entry, reason=Reason.CUT, detail=halves[-1]) for entry in halved}
    rejections = [why.get(entry, entry) for entry in plan.rejections]
    if collapses:
        return replace(plan, cuts=tuple(dict.fromkeys(reasons)), rejections=tuple(rejections))
    rejections += [Rejection(site.add.add.name, site.site.location, Reason.CUT, detail=reasons[-1]) for site in lost]
    if lost:
        warnings.warn(
            f"{len(lost)} residual adds stay plain, because a graph break cuts their stream: {reasons[-1]}. Take the "
            "break away, or use on_boundary='collapse'.",
            MHCWarning,
            stacklevel=2,
        )
    kept = tuple(chain for chain in plan.chains if not reasons or chain not in entering)
    return replace(plan, chains=kept, rejections=tuple(rejections))


def _in_bucket(plain: GraphModule, plan: Plan, config: MHCConfig) -> Plan:
    """Settle one of the graphs that DDPOptimizer has cut a graph into.

    Raises:
        StreamCutError: `on_boundary="error"`, or the cut lies inside a residual block, which no readout can mend.
    """
    way_out = "Set torch._dynamo.config.optimize_ddp = False (or 'python_reducer') before the first call"
    if config.on_boundary != "collapse":
        raise StreamCutError(
            "DistributedDataParallel is splitting the graph into buckets, which would cut the residual stream. "
            f"{way_out}, or use on_boundary='collapse' to average the streams between buckets, which is another model."
        )
    if _joins(plain, plan) or _branch_leaves(plain, {site.add.add for site in plan.sites}):
        raise StreamCutError(
            "DistributedDataParallel is splitting the graph into buckets inside a residual block: its branch is in one "
            f"bucket and its add in another, which on_boundary='collapse' cannot mend. {way_out}, or choose another "
            "bucket_cap_mb."
        )
    if any(_is_input(chain.head) for chain in plan.chains):
        plan = replace(plan, cuts=("DistributedDataParallel splits the graph into buckets",))
    return _read_out_by_mean(plan, config)


def _read_out_by_mean(plan: Plan, config: MHCConfig) -> Plan:
    """Have streams that leave at a cut averaged, whichever the readout: what is behind the cut expands them again.

    Whether something behind does, is not known yet. A chain that `attach` has given a readout ends here.
    """
    if config.on_boundary != "collapse":
        return plan

    def averaged(chain: PlannedChain) -> bool:
        last = chain.sites[-1]
        return _leaves(last.add.add) and not has_parameters(last.owner, last.label + READOUT_SUFFIX)

    return replace(plan, chains=tuple(replace(chain, averaged=averaged(chain)) for chain in plan.chains))


def ends_are_ends(plans: list[Plan]) -> list[Plan]:
    """Let the last chains of a model be read out as its options say: no graph behind them expands them again."""
    last_cut = max((index for index, plan in enumerate(plans) if plan.cuts), default=0)
    return [
        replace(plan, chains=tuple(replace(chain, averaged=False) for chain in plan.chains))
        if index >= last_cut
        else plan
        for index, plan in enumerate(plans)
    ]


def cut_message(reason: str) -> str:
    """Say that a graph break cuts the stream, what that would mean, and every way out."""
    return (
        f"a graph break cuts the residual stream: {reason}. The streams would be averaged there. Take the break away "
        "(TORCH_LOGS=graph_breaks shows why Dynamo breaks; printing, .item() and data-dependent branches are the usual "
        "causes), or move it outside the residual blocks, or use on_boundary='collapse' to average the streams at the "
        "break and expand them again behind it, which is another model."
    )


def _refuse(reason: str) -> NoReturn:
    for entry in _OPEN:
        for undo in entry.undo:
            undo()
    _OPEN.clear()
    raise StreamCutError(cut_message(reason))


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


def _branch_leaves(graph_module: GraphModule, behind: Set[Node] | None = None) -> bool:
    """Tell whether a value leaves the graph together with something that was mixed from it: half a residual block.

    Args:
        graph_module: the normalized graph.
        behind: given the residual adds, a branch counts from its norm on, and ends at an add: between two whole blocks
            nothing leaves but the stream.
    """
    output = output_of(graph_module)
    leaving = {node for node in output.all_input_nodes if is_float(node)}
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


def _joins(graph_module: GraphModule, plan: Plan) -> list[Rejection]:
    """Return the adds that join an input with something computed from other inputs alone: halves of a block."""
    independent = {entry.add: entry for entry in plan.rejections if entry.reason is Reason.INDEPENDENT}
    found = []
    for node in graph_module.graph.nodes:
        if node.name in independent and is_add(node):
            left, right = operands(node)
            if any(
                _is_input(_origin(skip)) and _depends_on_inputs(other) for skip, other in ((left, right), (right, left))
            ):
                found.append(independent[node.name])
    return found


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
