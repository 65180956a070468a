"""Look at a whole model as a compilation would see it, without running its arithmetic or keeping anything compiled."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.exc import ShortenTraceback
from torch.fx import GraphModule

from .attachment.entrances import BACKEND_NAME
from .attachment.sentinels import plain_calls_allowed
from .config import MHCConfig
from .dynamo.code_resets import reset_codes
from .dynamo.error_passing import errors_reach_the_user
from .dynamo.frames import Frame, current_frame, pin_to_modules
from .dynamo.skipped_frames import watch_skipped_frames
from .errors import MHCError, StreamCutError
from .passes.analyze import analyze
from .passes.count_branch_work import BranchWork, count_branch_work
from .passes.native import NativeRow
from .passes.shapes_only import shapes_only
from .planning.graph_breaks import check_graph_breaks, cut_message, ends_are_ends, forget_breaks, given_up
from .planning.pieces import Piece, pieces_of
from .planning.sites import Plan, plan_sites
from .planning.stream_links import StreamLinks
from .reports.reporting import Report, graph_report, new_report

_NO_LIMIT = 1 << 30


class _Seen(ShortenTraceback):
    """Ends a look: raised inside the backend, it leaves no compiled code behind."""


@dataclass
class Look:
    """What a look at a model found, graph by graph, and the work counted in them, if it was asked for.

    Dynamo keeps every backend it was ever given, and with it this: `forget` has to be called, or the model would never
    be freed.
    """

    report: Report
    links: StreamLinks = field(default_factory=StreamLinks)
    plans: list[Plan] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    native: list[tuple[NativeRow, ...]] = field(default_factory=list)
    work: BranchWork = field(default_factory=lambda: BranchWork(0, 0))
    pieces: list[tuple[Piece, ...]] = field(default_factory=list)

    def merged(self) -> Plan:
        """Return one plan over all graphs."""
        return Plan(
            chains=tuple(chain for plan in self.plans for chain in plan.chains),
            rejections=tuple(entry for plan in self.plans for entry in plan.rejections),
        )

    def forget(self) -> None:
        """Let go of the model."""
        self.links = StreamLinks()
        self.plans.clear()


def look(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: MHCConfig,
    count_work: bool = False,
    count_pieces: bool = False,
) -> Look:
    """Trace a model as a compilation would, without running or keeping anything.

    Args:
        root: the model itself, no wrapper around it.
        args: one example input; with no `kwargs` either, the model's own `dummy_inputs`.
        kwargs: the example input's keyword arguments.
        config: the options.
        count_work: also count the model's own work.
        count_pieces: count that of each block, too.

    Raises:
        MHCError: any of its subclasses.
    """
    if not args and not kwargs:
        args, kwargs = (), _dummy_inputs(root)
    kwargs = {**kwargs, **_without_cache(root, kwargs)}
    seen = Look(new_report(root, config), StreamLinks(config.strict))
    codes: list[CodeType] = []

    @errors_reach_the_user
    def backend(graph_module: GraphModule, example_inputs: Any) -> Any:
        frame = current_frame(graph_module)
        analysis = analyze(graph_module)
        plan = plan_sites(
            analysis.findings, frame, config, in_pieces=not _is_whole(frame) and config.on_graph_break == "carry"
        )
        plan = check_graph_breaks(analysis, plan, frame, config, looking=True)
        number = seen.links.add(plan, frame)
        if count_work:
            seen.work += count_branch_work(graph_module)
        if count_pieces:
            seen.pieces.append(pieces_of(analysis.plain, plan))
        seen.nodes.append(analysis.nodes)
        seen.native.append(analysis.native.rows(frame.name_of))
        if _is_whole(frame) and number == 0:
            raise _Seen("seen", first_useful_frame=None)
        codes.append(frame.code)
        # Where Dynamo compiles block after block alone, the first block's graph would serve for all, unseen.
        pin_to_modules(frame)
        return _followed(shapes_only(graph_module), seen.links, number, analysis.ends.passing, config)

    # Dynamo's name for a backend that is a function, by which the watch for frames that it gives up on knows its own.
    backend.__name__ = BACKEND_NAME
    backend.mhc_look = config  # type: ignore[attr-defined]
    watch_skipped_frames()
    # `forward`, not `__call__`: a module that was compiled in place would run that compilation.
    compiled = torch.compile(root.forward, backend=backend)
    try:
        # A look leaves no code behind, so it may not run into the limit that other models' code has used up, nor may
        # the example's sizes make the first real call's look like changed ones, which Dynamo compiles dynamically.
        with (
            torch._dynamo.config.patch(
                suppress_errors=False, recompile_limit=_NO_LIMIT, automatic_dynamic_shapes=False
            ),
            plain_calls_allowed(),
            _compiled_nowhere(root),
        ):
            compiled(*args, **kwargs)
    except _Seen:
        pass
    finally:
        reason = given_up(root)
        forget_breaks(root)
        # What a look that a graph break cut left compiled would count towards the recompile limit of the real thing.
        cut = codes or not seen.links.plans or seen.links.plans[0][1].resumed
        reset_codes(code for code in [*codes, *_codes_of(root.forward)] if cut or _holds_dead_entries(code))
    captured = [plan for plan, _ in seen.links.plans]
    seen.plans = seen.links.placed_plans(config) if config.on_graph_break == "carry" else ends_are_ends(captured)
    for plan, (_, frame), nodes, rows in zip(seen.plans, seen.links.plans, seen.nodes, seen.native, strict=True):
        seen.report.graphs.append(graph_report(frame.function, nodes, plan, frame.break_reason, native=rows))
    if (
        reason is not None
        and not (seen.report.sites or seen.report.native)
        and config.strict
        and config.on_graph_break != "collapse"
    ):
        raise StreamCutError(cut_message(f"{reason}, and Dynamo gave up on the model's forward"))
    if not seen.links.plans:
        raise MHCError(
            "Dynamo captured no graph of this model: is compilation switched off (TORCHDYNAMO_DISABLE, "
            "torch.compiler.disable, set_stance('force_eager'))?"
        )
    return seen


def _codes_of(function: Any) -> list[CodeType]:
    """Return the code of a function and of what its decorators wrap: Dynamo may have compiled each."""
    codes: list[CodeType] = []
    while function is not None:
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        codes += [code] if code is not None else []
        function = getattr(function, "__wrapped__", None)
    return codes


def _holds_dead_entries(code: CodeType) -> bool:
    """Return whether code was compiled for a module that is gone by now.

    A look's graphs are pinned to their modules, and Dynamo counts the graphs of dead ones towards its recompile limit:
    without this, the ninth model of one class in a process could not be compiled.
    """
    entries = _debug_get_cache_entry_list(code)
    return any(type(entry.guard_manager).__name__ == "DeletedGuardManagerWrapper" for entry in entries)


def _without_cache(root: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """On the meta device, switch off a cache of keys and values that the caller did not ask for.

    Dynamo cannot trace the empty tensor that such a cache begins with there (`torch.tensor([], device="meta")` is not
    turned into a fake tensor); it changes no residual add.
    """
    parameter = next(root.parameters(), None)
    if parameter is None or not parameter.is_meta or "use_cache" in kwargs:
        return {}
    return {"use_cache": False} if "use_cache" in inspect.signature(root.forward).parameters else {}


def _dummy_inputs(root: nn.Module) -> dict[str, Any]:
    example = getattr(root, "dummy_inputs", None)
    if not isinstance(example, dict) or not example:
        raise MHCError(
            "an example input is needed to trace the model: mhc_compile.attach(model, input_ids=…), with the arguments "
            "that you would call the model with."
        )
    device = next((parameter.device for parameter in root.parameters()), torch.device("cpu"))
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in example.items()}


def _is_whole(frame: Frame) -> bool:
    """Return whether a frame's graph is all of a forward."""
    return frame.break_reason is None and not frame.resumed and frame.caller is None


def _followed(
    stand_in: Any, links: StreamLinks, number: int, passing: tuple[tuple[int, int], ...], config: MHCConfig
) -> Any:
    """Note which streams a graph is given and which it returns."""
    if config.on_graph_break != "carry":
        return stand_in

    def run(*inputs: Any) -> Any:
        links.enter(number, inputs)
        outputs = stand_in(*inputs)
        links.leave(number, inputs, outputs, passing)
        return outputs

    return run


@contextlib.contextmanager
def _compiled_nowhere(root: nn.Module) -> Iterator[None]:
    """Inside, modules that were compiled in place run their plain forward: this look is to see it, no other backend."""
    compiled = [(module, module._compiled_call_impl) for module in root.modules() if module is not root]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
