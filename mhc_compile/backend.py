"""The backend `mhc`, top to bottom: what happens to a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from . import logs
from .attachment.site_parameters import attached_config
from .carrying import carry_streams
from .config import MHCConfig
from .dynamo.ddp_buckets import put_off_ddp_buckets
from .dynamo.error_passing import TraceAnew, errors_reach_the_user, trace_anew
from .dynamo.frames import Frame, current_frame, pin_to_modules
from .dynamo.inner import compile_inner
from .dynamo.skipped_frames import watch_skipped_frames
from .kernels.costs.fusion_choice import FusionChoice
from .kernels.fusions import FUSIONS
from .memory import MEMORY
from .passes.analyze import Analysis, analyze
from .passes.annotate_recompute import annotate_recompute
from .passes.close_regions import close_regions
from .passes.expand_streams import expand_streams
from .passes.fold_norms import fold_norms
from .passes.fuse_boundaries import fuse_boundaries
from .passes.fx.sources import streams_examples
from .passes.mark_cacheable import mark_cacheable
from .passes.runner import PassRunner, leave_artifact
from .passes.verify import verify
from .planning.binding import attach_on_first_call, bind
from .planning.chain_sizes import fusion_for, fusion_for_native
from .planning.graph_breaks import check_graph_breaks
from .planning.nothing_found import require_sites
from .planning.sentinel_checks import refuse_plain_sites, remaining_checks
from .planning.sites import Plan, plan_sites
from .reports.reporting import add_to_report, graph_report
from .signs_of_life import sign_of_life

Compiled = Callable[..., Any]


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
    watch_skipped_frames()
    frame = current_frame(graph_module)
    around = frame.outer or frame.model
    config = MHCConfig.from_options(options, attached_config(around) if around is not None else None)
    try:
        return _compiled(graph_module, example_inputs, frame, config, mode)
    except TraceAnew:
        raise
    except BaseException:
        if frame.roots:
            MEMORY.take_back(frame.root)
        raise


def _compiled(
    graph_module: GraphModule, example_inputs: Sequence[Any], frame: Frame, config: MHCConfig, mode: str | None
) -> Compiled:
    passes = PassRunner(frame.function, logs.artifact("mhc_passes"), config.disable_passes)
    passes.show("captured", graph_module)

    analysis = passes.read("analyze", analyze, graph_module, passes.includes("lower_native"))
    native = analysis.native
    if native.sites or native.writes:
        passes.show("after lower_native", analysis.plain)
    plan = passes.read("plan", plan_sites, analysis.findings, frame, config)
    plan = passes.read("check_graph_breaks", check_graph_breaks, analysis, plan, frame, config)
    refuse_plain_sites(analysis.sentinels, plan, frame)
    require_sites(plan, frame, config, native.found, analysis.sentinels)

    graph, fusion, leaving = analysis.plain, None, 0
    if not plan.chains and analysis.findings.chains:
        # Dynamo does not guard on hooks: this graph would serve another module of the class that has its parameters.
        pin_to_modules(frame)
        MEMORY.plain.update(frame.roots)
    if plan.chains:
        if attach_on_first_call(plan, frame, config):
            trace_anew("mHC parameters were attached")
        chains = passes.read("bind", bind, plan, analysis.sentinels, frame, config)
        if chains is None:
            trace_anew("mHC sentinels were put back")
        fusion = fusion_for(plan, config)
        leaving = sum(len(chain.exits) for chain in chains)
        graph = passes.rewrite("expand_streams", expand_streams, graph, chains, config)
        verify(analysis.plain, graph, config.n_streams, leaving)
    elif native.sites:
        fusion = fusion_for_native(native.sites, config)
    if fusion is not None and FUSIONS[fusion.fusion].post_pre is not None:
        graph = passes.rewrite("fuse_boundaries", fuse_boundaries, graph)
        graph = passes.rewrite("fold_norms", fold_norms, graph)
        verify(analysis.plain, graph, config.n_streams, leaving)
    graph = passes.rewrite("close_regions", close_regions, graph)
    if fusion is not None:
        graph = passes.rewrite("annotate_recompute", annotate_recompute, graph, config)
        graph = passes.rewrite("mark_cacheable", mark_cacheable, graph)

    inputs = [*example_inputs, *streams_examples(graph)]
    with sign_of_life(f"compiling {frame.function} with {config.inner}"):
        compiled = passes.read("compile", compile_inner, graph, inputs, config, mode)
    compiled = carry_streams(compiled, plan, config)
    compiled = _checked(compiled, remaining_checks(analysis.sentinels, plan, frame))
    _publish(analysis, plan, frame, config, fusion)
    if frame.roots and frame.break_reason is None:
        MEMORY.undo.pop(frame.root, None)
    return compiled


def _checked(compiled: Compiled, checks: list[Callable[[], None]]) -> Compiled:
    if not checks:
        return compiled

    def run(*inputs: Any) -> Any:
        for check in checks:
            check()
        return compiled(*inputs)

    return run


def _publish(analysis: Analysis, plan: Plan, frame: Frame, config: MHCConfig, fusion: FusionChoice | None) -> None:
    """Add the graph to the model's report, and show that to TORCH_LOGS and the structured trace."""
    model = frame.outer or frame.model
    if model is not None and (plan.chains or plan.rejections or analysis.native.found or not frame.resumed):
        rows = analysis.native.rows(frame.name_of)
        entry = graph_report(frame.function, analysis.nodes, plan, frame.break_reason, fusion, rows)
        report = add_to_report(model, config, entry)
        logs.artifact("mhc_report").debug("%s", report)
        leave_artifact("mhc report", lambda: str(report))


# Resolving the backend's name imports this module: from then on, frames that never reach a backend are noticed, and
# DDP's buckets are cut behind the rewrite.
watch_skipped_frames()
put_off_ddp_buckets()
