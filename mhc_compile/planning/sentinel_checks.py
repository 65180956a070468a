"""Read the sentinels of a captured graph: which modules with mHC parameters ran, and were their adds rewritten?"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from ..attachment.sentinels import raise_if_plain
from ..attachment.site_parameters import READOUT_SUFFIX, joined
from ..errors import UnrewrittenCallError
from ..passes.normalize import is_sentinel
from .sites import Plan


@dataclass(frozen=True)
class _Trace:
    """One call of a sentinel in a graph."""

    owner: str
    labels: tuple[str, ...]
    only_inside_owner: bool


def refuse_plain_sites(graph_module: GraphModule, plan: Plan) -> None:
    """Check that every owner whose forward is in the graph had its sites rewritten there.

    A site whose branch did not run (a cross-attention without encoder states) may be missing; one whose branch ran may
    not.

    Raises:
        UnrewrittenCallError: a site with parameters would run as a plain add.
    """
    rewritten = _rewritten(plan)
    traces = list(_traces(graph_module))
    ran = {(trace.owner, label) for trace in traces if trace.only_inside_owner for label in trace.labels}
    guarded = {trace.owner for trace in traces if not trace.only_inside_owner}
    plain = sorted(
        joined(owner, label) for owner, label in ran if owner in guarded and not _answered(owner, label, rewritten)
    )
    if plain:
        raise UnrewrittenCallError(
            f"{len(plain)} sites that carry mHC parameters would run as plain residual adds in this graph: "
            f"{', '.join(plain[:4])}{', …' if len(plain) > 4 else ''}. The usual causes are a path that leaves the "
            "adds out of the graph (a fused layer in eval mode, activation checkpointing) or a filter that differs "
            "from the one they were attached with. mhc_compile.explain(model, …) shows what is found; "
            "mhc_compile.detach(model) gives back the plain model."
        )


def remaining_checks(graph_module: GraphModule, plan: Plan) -> list[Callable[[], None]]:
    """Return the sentinels that the rewrite does not answer for; they are to run before the compiled graph does.

    A child that is compiled alone is one: whether it runs inside its owner's plain forward shows only at the call.
    """
    rewritten = _rewritten(plan)
    guarded = {trace.owner for trace in _traces(graph_module) if not trace.only_inside_owner}
    return [
        functools.partial(raise_if_plain, trace.owner, list(trace.labels), True)
        for trace in _traces(graph_module)
        if trace.only_inside_owner
        and trace.owner not in guarded
        and not all(_answered(trace.owner, label, rewritten) for label in trace.labels)
    ]


def _rewritten(plan: Plan) -> set[tuple[str, str]]:
    return {(site.site.owner, label) for site in plan.sites for label in (site.label, site.branch_label)}


def _answered(owner: str, label: str, rewritten: set[tuple[str, str]]) -> bool:
    """Tell whether a sentinel is answered for: its label names one call of several, the graph may hold another."""
    return (owner, label) in rewritten or (owner, re.sub(r"_\d+$", "", label)) in rewritten


def _traces(graph_module: GraphModule) -> Iterator[_Trace]:
    """Yield the sentinels of a graph and of the bodies inside it, such as those of activation checkpointing."""
    for body in graph_module.children():
        if isinstance(body, GraphModule):
            yield from _traces(body)
    for node in graph_module.graph.nodes:
        if is_sentinel(node):
            owner, labels, only_inside_owner = node.args
            names = tuple(label for label in labels if not label.endswith(READOUT_SUFFIX))
            yield _Trace(str(owner), names, bool(only_inside_owner))
