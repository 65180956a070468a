"""The public functions that act on a model: attach, explain, report, parameters, param_groups, detach."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo.exc import ShortenTraceback
from torch.fx import GraphModule

from .attachment import sentinels
from .attachment.site_parameters import CHILD, attached_config, owners_in
from .backend import errors_reach_the_user
from .config import STRUCTURAL, MHCConfig
from .dynamo.frames import Frame, current_frame, pin_to_modules
from .dynamo.skipped_frames import BACKEND_NAME, watch_fallbacks
from .errors import ConfigMismatchError, MHCError, NoResidualError, NotAttachedError, StreamCutError
from .passes.count_branch_work import BranchWork, count_branch_work
from .passes.fx.dataflow import output_of
from .planning.binding import attach_plan
from .planning.chain_sizes import chain_sizes
from .planning.graph_breaks import check_graph_breaks, cut_message, ends_are_ends, forget_breaks, given_up
from .planning.nothing_found import nothing_found
from .planning.sites import Plan, plan_graph
from .prediction import Workload, predict
from .reporting import Report, forget_report, graph_report, keep_report, new_report, report_of


def attach(model: nn.Module, *args: Any, config: MHCConfig | None = None, **kwargs: Any) -> Report:
    """Create the mHC parameters of a model ahead of its first call.

    Do so before building the optimizer, loading a checkpoint, or wrapping the model in DDP. The model is traced with
    the example input; its arithmetic does not run.

    Args:
        model: the model, or `torch.compile(model)`.
        *args: one example input; left out, the model's own `dummy_inputs`.
        config: the options; left out, those already attached, or the defaults.
        **kwargs: the example input's keyword arguments.

    Returns:
        What was found. Attaching again with the same options adds only what is missing.

    Raises:
        ConfigMismatchError: other options are attached.
        NoResidualError: nothing was found, and `config.strict`.
        StreamCutError: a graph break cuts the residual stream.
    """
    root = unwrap(model)
    attached = attached_config(root)
    if attached is not None and config is not None:
        _require_same(attached, config)
    config = config or attached or MHCConfig()
    found = _look(root, args, kwargs, config)
    if config.strict and not found.report.sites:
        raise NoResidualError(nothing_found(found.merged(), config))
    plans = ends_are_ends([plan for plan, _ in found.plans])
    for plan, (_, frame) in zip(plans, found.plans, strict=True):
        attach_plan(plan, frame, config)
    found.plans.clear()
    keep_report(root, found.report)
    return found.report


def explain(
    model: nn.Module,
    *args: Any,
    config: MHCConfig | None = None,
    predict_for: Workload | None = None,
    **kwargs: Any,
) -> Report:
    """Look at a model as `attach` would, and change nothing. Works on the meta device.

    Args and errors are those of `attach`; nothing found is no error here: the report says so. With `predict_for`, a
    `mhc_compile.prediction.Workload`, the report also predicts memory and step time of training on a GPU; it then
    raises MHCOptionError where nothing was found.
    """
    root = unwrap(model)
    found = _look(root, args, kwargs, config or attached_config(root) or MHCConfig(), predict_for is not None)
    if predict_for is not None:
        sizes = chain_sizes(found.merged())
        found.report.prediction = predict(sizes, found.work, found.report.config.n_streams, predict_for)
    found.plans.clear()
    return found.report


def report(model: nn.Module) -> Report:
    """Return what the last compilation (or `attach`) did to a model.

    Raises:
        NotAttachedError: the model was neither attached nor compiled with backend="mhc".
    """
    found = report_of(unwrap(model))
    if found is None:
        raise NotAttachedError(
            "there is no report: the model was neither attached nor called through backend='mhc' yet. "
            "mhc_compile.explain(model, example_input) looks at it without changing it."
        )
    return found


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the mHC parameters by their names in `state_dict()`; empty for a plain model."""
    return {
        ".".join(part for part in (path, CHILD, name) if part): parameter
        for path, _, parameters in owners_in(unwrap(model))
        for name, parameter in parameters.named_parameters()
    }


def param_groups(model: nn.Module, *, weight_decay: float, **kwargs: Any) -> list[dict[str, Any]]:
    """Return optimizer groups of the mHC parameters alone: phi decays, scale and bias do not.

    Decay on `bias` would pull the streams' mixing away from the identity towards the plain mean.

    Args:
        model: a model with mHC parameters.
        weight_decay: for phi.
        **kwargs: further options for both groups, such as `lr`.

    Raises:
        NotAttachedError: the model has no mHC parameters.
    """
    named = parameters(model)
    if not named:
        raise NotAttachedError("the model has no mHC parameters: call mhc_compile.attach(model, example_input).")
    decayed = [parameter for name, parameter in named.items() if name.endswith(".phi")]
    kept = [parameter for name, parameter in named.items() if not name.endswith(".phi")]
    return [
        {"params": decayed, "weight_decay": weight_decay, **kwargs},
        {"params": kept, "weight_decay": 0.0, **kwargs},
    ]


def detach(model: nn.Module) -> None:
    """Take the mHC parameters off a model again; its plain forward runs as before.

    Trained mHC parameters are dropped: the plain model computes something else once they have moved.

    Raises:
        NotAttachedError: the model has no mHC parameters.
    """
    root = unwrap(model)
    owners = list(owners_in(root))
    if not owners:
        raise NotAttachedError("the model has no mHC parameters: there is nothing to detach.")
    sentinels.disarm(root)
    for _, owner, _ in owners:
        delattr(owner, CHILD)
    forget_breaks(root)
    forget_report(root)
    # Compiled graphs still hold the streams; without their parameters they could only raise.
    torch._dynamo.reset()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile(model)`, DataParallel and DistributedDataParallel."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return unwrap(inner)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrap(model.module)
    return model


def _require_same(attached: MHCConfig, config: MHCConfig) -> None:
    for name in STRUCTURAL:
        if getattr(attached, name) != getattr(config, name):
            raise ConfigMismatchError(
                f"this model's mHC parameters were made with {name}={getattr(attached, name)!r}, but "
                f"{name}={getattr(config, name)!r} is asked for now. Use the same, or call "
                "mhc_compile.detach(model) first (trained mHC parameters are dropped: save them before)."
            )


_NO_LIMIT = 1 << 30


class _Seen(ShortenTraceback):
    """Ends a look: raised inside the backend, it leaves no compiled code behind."""


@dataclass
class _Look:
    """What a look at a model found, graph by graph, and the work counted in them, if it was asked for.

    Dynamo keeps every backend it was ever given, and with it this: `plans` has to be cleared, or the model would
    never be freed.
    """

    report: Report
    plans: list[tuple[Plan, Frame]] = field(default_factory=list)
    work: BranchWork = field(default_factory=lambda: BranchWork(0, 0))

    def merged(self) -> Plan:
        """Return one plan over all graphs."""
        return Plan(
            chains=tuple(chain for plan, _ in self.plans for chain in plan.chains),
            rejections=tuple(entry for plan, _ in self.plans for entry in plan.rejections),
        )


def _look(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: MHCConfig, count_work: bool = False
) -> _Look:
    """Trace a model as a compilation would, without running or keeping anything."""
    if not args and not kwargs:
        args, kwargs = (), _dummy_inputs(root)
    kwargs = {**kwargs, **_without_cache(root, kwargs)}
    look = _Look(new_report(root, config))
    codes: list[CodeType] = []

    @errors_reach_the_user
    def backend(graph_module: GraphModule, example_inputs: Any) -> Any:
        frame = current_frame(graph_module)
        plain, plan = plan_graph(graph_module, frame, config)
        plan = check_graph_breaks(graph_module, plain, plan, frame, config)
        look.plans.append((plan, frame))
        if count_work:
            look.work += count_branch_work(graph_module)
        look.report.graphs.append(graph_report(frame.function, len(graph_module.graph.nodes), plan, frame.break_reason))
        whole = frame.break_reason is None and not frame.resumed and frame.caller is None
        if whole and len(look.plans) == 1:
            raise _Seen("seen", first_useful_frame=None)
        codes.append(frame.code)
        # Where Dynamo compiles block after block alone, the first block's graph would serve for all, unseen.
        pin_to_modules(frame)
        return _shapes_only(graph_module)

    # Dynamo's name for a backend that is a function, by which the watch for frames that it gives up on knows its own.
    backend.__name__ = BACKEND_NAME
    backend.mhc_config = config  # type: ignore[attr-defined]
    watch_fallbacks()
    # `forward`, not `__call__`: a module that was compiled in place would run that compilation.
    compiled = torch.compile(root.forward, backend=backend)
    try:
        # A look leaves no code behind, so it may not run into the limit that other models' code has used up.
        with torch._dynamo.config.patch(suppress_errors=False, recompile_limit=_NO_LIMIT):
            compiled(*args, **kwargs)
    except _Seen:
        pass
    finally:
        reason = given_up(root)
        forget_breaks(root)
        # What a look that a graph break cut left compiled would count towards the recompile limit of the real thing.
        cut = codes or not look.plans or look.plans[0][1].resumed
        for code in [*codes, *_codes_of(root.forward)]:
            if cut or _holds_dead_entries(code):
                reset_code(code)
    if reason is not None and not look.report.sites and config.strict and config.on_boundary == "error":
        raise StreamCutError(cut_message(f"{reason}, and Dynamo gave up on the model's forward"))
    if not look.plans:
        raise MHCError(
            "Dynamo captured no graph of this model: is compilation switched off (TORCHDYNAMO_DISABLE, "
            "torch.compiler.disable, set_stance('force_eager'))?"
        )
    return look


def _codes_of(function: Any) -> list[CodeType]:
    """Return the code of a function and of what its decorators wrap: Dynamo may have compiled each."""
    codes: list[CodeType] = []
    while function is not None:
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        codes += [code] if code is not None else []
        function = getattr(function, "__wrapped__", None)
    return codes


def _holds_dead_entries(code: CodeType) -> bool:
    """Tell whether code was compiled for a module that is gone by now.

    Graphs are pinned to their modules, and Dynamo counts the graphs of dead ones towards its recompile limit: without
    this, the ninth model of one class in a process could not be compiled.
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


def _shapes_only(graph_module: GraphModule) -> Any:
    """Stand in for a compiled graph that a graph break ended: outputs of the right shapes, no arithmetic."""
    output = output_of(graph_module)

    def blank(node: Any) -> Any:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            sizes = [size if isinstance(size, int) else size.node.hint for size in value.shape]
            return torch.zeros(sizes, dtype=value.dtype, device=value.device)
        return value.node.hint if isinstance(value, torch.SymInt) else value

    return lambda *inputs: torch.fx.node.map_arg(output.args[0], blank)
