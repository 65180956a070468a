"""What becomes of a stream that reaches over several graphs.

With `on_graph_break="carry"` the streams go on beside the visible value: the roles that `attach` gave the sites tell
where a stream comes in and where it goes on. A model that was never attached has no roles, and one graph does not show
what the next one holds: there a cut is an error. "error" makes every cut one. "collapse" averages the streams at a cut
and expands them again behind it, which is another model, and one that changes whenever the cut moves; the report then
says where. With `strict=False` what lies behind a cut stays plain, with a warning, where nothing is attached.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, replace
from typing import NoReturn

from torch import nn

from ..attachment.site_parameters import READOUT_SUFFIX, parameters_of, site_parameters
from ..config import MHCConfig
from ..dynamo.frames import Frame, is_sharded
from ..errors import MHCWarning, StreamCutError
from ..memory import MEMORY
from ..passes.analyze import Analysis
from ..passes.residual import Reason, Rejection
from .sites import Plan, PlannedChain, refuse_split_calls


@dataclass(frozen=True)
class Break:
    """A graph that ended early, or a frame that Dynamo gave up on.

    Attributes:
        root: the module whose frame it was.
        reason: why, with the source line.
        stream_left: a stream value left the graph.
        branch_left: a value left the graph together with something mixed from it: half a residual block.
    """

    root: weakref.ref[nn.Module]
    reason: str
    stream_left: bool
    branch_left: bool = False


def forget_breaks(root: nn.Module) -> None:
    """Forget the breaks of a model: a new call begins."""
    MEMORY.breaks[:] = [entry for entry in MEMORY.breaks if entry.root() is not None and entry.root() is not root]


def given_up(root: nn.Module) -> str | None:
    """Return why Dynamo gave up on a frame of `root`, if it did and no new call has begun since."""
    return next((entry.reason for entry in reversed(MEMORY.breaks) if entry.root() is root), None)


def remember_given_up(root: nn.Module, reason: str) -> None:
    """Remember that Dynamo gave up on a frame of `root`: whatever is compiled inside it, is a piece."""
    forget_breaks(root)
    MEMORY.breaks.append(Break(weakref.ref(root), reason, stream_left=True))


def has_open_breaks(frame: Frame) -> bool:
    """Return whether a graph break in a caller is open; a frame of a plain function shows no module, any will do."""
    return any(entry.root() is not None for entry in MEMORY.breaks if not frame.roots) or any(
        _below(root, entry.root()) for entry in MEMORY.breaks for root in frame.roots
    )


def check_graph_breaks(analysis: Analysis, plan: Plan, frame: Frame, config: MHCConfig, looking: bool = False) -> Plan:
    """Check a graph against the graph breaks around it, and remember the one that ends it.

    Args:
        analysis: what is known of the graph.
        plan: what was planned for it.
        frame: the frame behind it.
        config: `on_graph_break` and `strict` decide.
        looking: `attach` or `explain` looks at the whole model; where the streams go is then found out afterwards.

    Returns:
        The plan, with the streams that its chains get from other graphs and hand on to them, or with the cuts that its
        streams cross, or without the chains behind a cut.

    Raises:
        StreamCutError: the stream enters this graph, or leaves it, and is not carried. What this call has attached so
            far is taken off again.
    """
    piece = frame.resumed or frame.break_reason is not None or frame.outer is not None
    if frame.outer is not None and not frame.resumed and frame.break_reason is None:
        refuse_split_calls(plan, frame)
    carries = config.on_graph_break == "carry" and (looking or _is_attached(plan))
    if carries and not looking:
        _remember_break(analysis, plan, frame)
        return _carried(plan, frame, piece)
    if not frame.roots:
        inside = [entry.reason for entry in MEMORY.breaks if entry.branch_left and entry.root() is not None]
        if looking and inside and analysis.ends.halves and config.strict and config.on_graph_break != "collapse":
            _refuse(frame, inside[-1], "inside a residual block")
        return plan
    root = frame.root
    _begin_call(frame)
    entering = [chain for chain in plan.chains if chain.start is not None]
    leaving = [chain for chain in plan.chains if chain.sites[-1].add.exits]
    around = [entry for entry in MEMORY.breaks if _below(root, entry.root())]
    reasons = [entry.reason for entry in around if entry.stream_left and entering]
    if not reasons and not looking and (reason := _why_alone(frame, bool(entering), bool(leaving), config)):
        reasons = [reason]
    halves = [entry.reason for entry in around if entry.branch_left]
    halved = [*analysis.ends.halves] if halves else []
    if carries:
        if halved and config.strict:
            _refuse(frame, halves[-1], "inside a residual block")
    elif reasons or halved:
        plan = _settled(plan, entering, reasons, halved, halves, frame, config)
    if frame.break_reason is not None:
        left = any(site.add.exits for site in plan.sites)
        MEMORY.breaks.append(Break(weakref.ref(root), frame.break_reason, left, analysis.ends.branch_leaves))
    # A graph that ends early, or that of a module inside a forward that runs as plain Python.
    goes_on = frame.break_reason is not None or frame.caller is not None
    return _read_out_by_mean(plan, config) if goes_on and not carries else plan


def _begin_call(frame: Frame) -> None:
    """Forget the breaks of a model whose forward begins anew with this frame."""
    nested = any(entry.root() is not frame.root and _below(frame.root, entry.root()) for entry in MEMORY.breaks)
    if not frame.resumed and not nested:
        forget_breaks(frame.root)


def _remember_break(analysis: Analysis, plan: Plan, frame: Frame) -> None:
    """Remember the break behind a graph of an attached model.

    Its streams are carried, so what follows loses nothing; unless this very call has attached it, graph by graph, and
    nobody knows yet what follows.
    """
    if not frame.roots:
        return
    _begin_call(frame)
    if frame.break_reason is not None:
        owned = [parameters_of(site.owner) for site in plan.sites]
        unseen = any(child is not None and child.on_first_call for child in owned)
        left = unseen and any(site.add.exits for site in plan.sites)
        branch_left = unseen and analysis.ends.branch_leaves
        MEMORY.breaks.append(Break(weakref.ref(frame.root), frame.break_reason, left, branch_left))


def _is_attached(plan: Plan) -> bool:
    """Return whether a plan's sites have parameters."""
    return any(site_parameters(site.owner, site.label) is not None for site in plan.sites)


def _carried(plan: Plan, frame: Frame, piece: bool) -> Plan:
    """Say where the streams of a piece of an attached model come in, and where they go on."""
    chains = []
    for chain in plan.chains:
        first, last = chain.selected[0], chain.selected[-1]
        known = any(site_parameters(site.owner, site.label) for site in chain.selected)
        if piece and not known and chain.start is not None:
            raise StreamCutError(
                f"{first.site.name} has no mHC parameters yet, and its stream comes into this graph from another one: "
                "the input that the model was attached with did not run it. Call mhc_compile.attach(model, "
                "example_input) again, with the input that it is called with now."
            )
        entry = None if first.role.begins else chain.start
        if entry is None and piece and not first.role.begins:
            raise StreamCutError(
                f"{first.site.name} lies in the middle of its stream, but in this graph the stream is computed anew at "
                f"{chain.chain.head}, and what the sites before have made of it would be lost. The model was attached "
                "with another forward: call mhc_compile.attach(model, example_input) again, with the input that it is "
                "called with now."
            )
        exits = () if last.role.ends else chain.sites[-1].add.exits
        chains.append(replace(chain, entry=entry, exits=exits))
    return replace(plan, chains=tuple(chains))


def _why_alone(frame: Frame, entering: bool, leaving: bool, config: MHCConfig) -> str | None:
    """Say why a graph whose stream comes in or leaves is a piece of a model; None where it is a whole one."""
    root = frame.root
    if frame.resumed or not (entering or leaving):
        return None
    if frame.caller is not None and entering and leaving:
        return f"Dynamo compiles {type(root).__name__} alone, because {frame.caller} runs as plain Python"
    if frame.outer is not None and (entering or leaving) and frame.break_reason is None:
        return f"{type(root).__name__} is compiled alone, inside a {type(frame.outer).__name__}"
    if is_sharded(root) and (entering or leaving):
        return f"fully_shard has Dynamo compile {type(root).__name__} piece by piece"
    return None


def _settled(
    plan: Plan,
    entering: list[PlannedChain],
    reasons: list[str],
    halved: list[Rejection],
    halves: list[str],
    frame: Frame,
    config: MHCConfig,
) -> Plan:
    """Refuse, collapse, or leave plain what graph breaks cut."""
    collapses = config.on_graph_break == "collapse"
    cut = entering if entering else [*plan.chains]
    lost = [] if collapses else [site for chain in cut if reasons for site in chain.selected]
    if not collapses and (config.strict or any(site_parameters(site.owner, site.label) for site in lost)):
        _refuse(frame, (reasons or halves)[-1], "inside a residual block" if halved else "")
    # An add whose two operands both come from before the break can no longer be told from any other sum.
    why = {entry: replace(entry, reason=Reason.CUT, detail=halves[-1]) for entry in halved}
    rejections = [why.get(entry, entry) for entry in plan.rejections]
    if collapses:
        return replace(plan, cuts=tuple(dict.fromkeys(reasons)), rejections=tuple(rejections))
    rejections += [Rejection(site.add.node.name, site.site.location, Reason.CUT, detail=reasons[-1]) for site in lost]
    if lost:
        warnings.warn(
            f"{len(lost)} residual adds stay plain, because a graph break cuts their stream: {reasons[-1]}. Call "
            "mhc_compile.attach(model, example_input) before the first call, and the streams are carried across it.",
            MHCWarning,
            stacklevel=2,
        )
    kept = tuple(chain for chain in plan.chains if not reasons or chain not in cut)
    return replace(plan, chains=kept, rejections=tuple(rejections))


def _read_out_by_mean(plan: Plan, config: MHCConfig) -> Plan:
    """Have streams that leave at a cut averaged, whichever the readout: what is behind the cut expands them again.

    Whether something behind does, is not known yet. A chain that `attach` has given a readout ends here.
    """
    if config.on_graph_break != "collapse":
        return plan

    def averaged(chain: PlannedChain) -> bool:
        last = chain.sites[-1]
        return bool(last.add.exits) and site_parameters(last.owner, last.label + READOUT_SUFFIX) is None

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


def cut_message(reason: str, where: str = "") -> str:
    """Say that a graph break cuts the stream, what that would mean, and every way out."""
    if where:
        return (
            f"a graph break cuts a residual branch: {reason}. It lies {where}, where streams cannot be carried from "
            "one graph to the next. Take the break away (TORCH_LOGS=graph_breaks shows why Dynamo breaks; printing, "
            ".item() and data-dependent branches are the usual causes), or move it between two residual blocks."
        )
    return (
        f"a graph break cuts the residual stream: {reason}. Call mhc_compile.attach(model, example_input) on the whole "
        "model first: it sees what lies behind the break, and the streams are then carried across it "
        "(on_graph_break='carry', the default). Or take the break away (TORCH_LOGS=graph_breaks shows why Dynamo "
        "breaks; printing, .item() and data-dependent branches are the usual causes), or use "
        "on_graph_break='collapse' to average the streams at the break and expand them again behind it, which is "
        "another model."
    )


def _refuse(frame: Frame, reason: str, where: str = "") -> NoReturn:
    for entry in MEMORY.breaks:
        if (root := entry.root()) is not None:
            MEMORY.take_back(root)
    if frame.roots:
        MEMORY.take_back(frame.root)
    MEMORY.breaks.clear()
    raise StreamCutError(cut_message(reason, where))


def _below(module: nn.Module, root: nn.Module | None) -> bool:
    return root is not None and any(candidate is module for candidate in root.modules())
