"""The backend `mhc`, top to bottom: what happens to a captured graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import ShortenTraceback
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from . import logs
from .binding import attach_on_first_call, bind
from .boundaries import settle_boundaries
from .capture import Frame, current_frame, pin_to_modules
from .chain_sizes import fusion_for
from .config import MHCConfig
from .errors import MHCError
from .fallbacks import watch_fallbacks
from .inner import compile_inner
from .kernels.costs.fusion_choice import FusionChoice
from .mappings import attached_config
from .passes.admit_to_caches import admit_to_caches
from .passes.annotate_recompute import annotate_recompute
from .passes.close_regions import close_regions
from .passes.expand_streams import expand_streams
from .passes.fuse_boundaries import fuse_boundaries
from .passes.verify import verify
from .planning import Plan, plan_graph
from .reporting import add_to_report, graph_report
from .sentinels import refuse_plain_sites, remaining_checks
from .strictness import require_sites

Compiled = Callable[..., Any]


def errors_reach_the_user(backend: Compiled) -> Compiled:
    """Let an MHCError out of Dynamo as itself, rather than as BackendCompilerFailed.

    Dynamo lets exceptions of the type ShortenTraceback pass. Under `suppress_errors` it would fall back to the plain
    model instead, so there the compiled function raises.
    """

    @functools.wraps(backend)
    def wrapped(*args: Any, **kwargs: Any) -> Compiled:
        try:
            return backend(*args, **kwargs)
        except MHCError as error:
            if torch._dynamo.config.suppress_errors:
                return _raiser(error)
            raise _passing(type(error))(str(error)) from error

    return wrapped


@errors_reach_the_user
def mhc(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Rewrite one captured graph into streams and compile it with the inner backend.

    Args:
        graph_module: Dynamo's graph (torch IR); it is not changed.
        example_inputs: its inputs.
        mode: handed on to Inductor: "reduce-overhead", "max-autotune", …
        options: the fields of `MHCConfig`; those left out come from the config attached to the model.

    Raises:
        MHCError: any of its subclasses; the model is left as it was.
    """
    watch_fallbacks()
    frame = current_frame(graph_module)
    attached = attached_config(frame.model) if frame.model is not None else None
    config = MHCConfig.from_options(options, attached)

    plain, plan = plan_graph(graph_module, frame, config)
    plan = settle_boundaries(graph_module, plain, plan, frame, config)
    refuse_plain_sites(graph_module, plan)
    require_sites(plan, frame, config)
    checks = remaining_checks(graph_module, plan)
    if not plan.chains:
        plain = close_regions(plain)
        _publish(graph_module, plain, plan, frame, config)
        return _checked(compile_inner(plain, example_inputs, config, mode), checks)

    undo = attach_on_first_call(plan, frame, config)
    try:
        pin_to_modules(frame)
        binding = bind(plan, config, _fake_mode(plain))
        rewritten = expand_streams(plain, binding.chains, config)
        verify(plain, rewritten, config.n_streams)
        fusion = fusion_for(plan, config)
        if fusion.fusion == "boundary":
            rewritten = fuse_boundaries(rewritten)
            verify(plain, rewritten, config.n_streams)
        rewritten = close_regions(rewritten)
        rewritten = annotate_recompute(rewritten, config)
        rewritten = admit_to_caches(rewritten)
        compiled = compile_inner(rewritten, [*example_inputs, *binding.live()], config, mode)
    except Exception:
        undo()
        raise
    _publish(graph_module, rewritten, plan, frame, config, fusion)
    return _checked(_with_live_parameters(compiled, binding.live), checks)


def _with_live_parameters(compiled: Compiled, live: Callable[[], list[Tensor]]) -> Compiled:
    def run(*inputs: Any) -> Any:
        return compiled(*inputs, *live())

    return run


def _checked(compiled: Compiled, checks: list[Callable[[], None]]) -> Compiled:
    if not checks:
        return compiled

    def run(*inputs: Any) -> Any:
        for check in checks:
            check()
        return compiled(*inputs)

    return run


def _publish(
    before: GraphModule,
    after: GraphModule,
    plan: Plan,
    frame: Frame,
    config: MHCConfig,
    fusion: FusionChoice | None = None,
) -> None:
    """Add the graph to the model's report, and show both to TORCH_LOGS."""
    if frame.model is not None and (plan.chains or plan.rejections or not frame.resumed):
        entry = graph_report(frame.function, len(before.graph.nodes), plan, frame.break_reason, fusion)
        report = add_to_report(frame.model, config, entry)
        logs.artifact("mhc_report").debug("%s", report)
    graphs = logs.artifact("mhc_graph")
    graphs.debug("before:\n%s", before.graph)
    graphs.debug("after:\n%s", after.graph)


def _fake_mode(graph_module: GraphModule) -> FakeTensorMode | None:
    """Return the mode of the graph's own example values; the tracing context holds another one by now."""
    examples = (node.meta.get("example_value") for node in graph_module.graph.nodes)
    return next((value.fake_mode for value in examples if isinstance(value, FakeTensor)), None)


def _raiser(error: MHCError) -> Compiled:
    def refuse(*inputs: Any) -> Any:
        raise error

    return refuse


def _passing(kind: type[MHCError]) -> type[MHCError]:
    """Return a subclass of an error that Dynamo lets pass."""

    def construct(self: Any, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)

    return type(kind.__name__, (kind, ShortenTraceback), {"__init__": construct, "__module__": kind.__module__})


# Resolving the backend's name imports this module: from then on, frames that never reach a backend are noticed.
watch_fallbacks()
