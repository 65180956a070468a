"""Raise, or warn, when there is nothing to rewrite."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

from ..attachment.site_parameters import attached_config
from ..config import MHCConfig
from ..dynamo.frames import Frame, running_modules
from ..errors import MHCWarning, NoResidualError
from ..passes.read_sentinels import SentinelCall
from ..passes.residual import Reason, Rejection
from .graph_breaks import has_open_breaks
from .sites import Plan


def require_sites(plan: Plan, frame: Frame, config: MHCConfig, native: bool, calls: tuple[SentinelCall, ...]) -> None:
    """Check that something is rewritten in this graph, or was in another graph of the same model.

    Args:
        plan: of the graph.
        frame: of the graph.
        config: the options.
        native: the graph holds sites that the model writes itself and that run our operators.
        calls: the graph's sentinels.

    Raises:
        NoResidualError: `strict` is on and the whole model shows no residual add.
    """
    if plan.chains or native or not config.strict:
        return
    if any(not call.labels for call in calls):
        # An attached model's own sentinel, which may be a graph of its own.
        return
    if not frame.roots and any(attached_config(module) is not None for module in running_modules()):
        # A function, such as one that makes masks, that an attached model calls where Dynamo gave up on its forward.
        return
    if not frame.roots and has_open_breaks(frame):
        # A loss function behind a graph break: no module, so no residual block.
        return
    if any(attached_config(module) is not None for module in (frame.outer, *frame.roots) if module is not None):
        return
    if frame.break_reason is not None or frame.resumed or has_open_breaks(frame):
        warnings.warn(
            "backend='mhc' found no residual add to rewrite in one piece of a model that a graph break cuts; that "
            "piece runs as it is. TORCH_LOGS=graph_breaks shows the break.",
            MHCWarning,
            stacklevel=2,
        )
        return
    raise NoResidualError(nothing_found(plan, config))


def nothing_found(plan: Plan, config: MHCConfig) -> str:
    """Say that nothing was found, what was looked at, and what to do."""
    looked = "; ".join(
        f"{sum(count for _, count in entries)} × {reason}" for reason, entries in rejected_by_reason(plan.rejections)
    )
    return (
        f"no residual chain of at least {config.min_sites} sites was found"
        + (f" (adds left alone: {looked})" if looked else " (the graph has no add of two tensors)")
        + ". mhc_compile.explain(model, …) lists each with its source line. min_sites=1 admits single sites; "
        "strict=False compiles the model as it is."
    )


def rejected_by_reason(entries: Iterable[Rejection]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Group rejections by reason, and within one by source line with a count, most frequent first."""
    counts: dict[Reason, Counter[str]] = {}
    for entry in entries:
        told = entry.detail and entry.reason in (Reason.NATIVE_DIFFERS, Reason.NATIVE_STREAMS)
        counts.setdefault(entry.reason, Counter())[f"{entry.location}: {entry.detail}" if told else entry.location] += 1
    return [
        (reason.value, counter.most_common())
        for reason, counter in sorted(counts.items(), key=lambda item: -item[1].total())
    ]
