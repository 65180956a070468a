"""What a captured graph holds: open its regions, spell its adds one way, find sites. The graph itself is not changed.

Sites that the model writes itself are known first and run our operators from then on; what is then left to find are
the residual adds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from .find_residuals import find_residuals
from .fx.dataflow import is_float, is_sentinel
from .fx.regions import regions_of
from .lower_native import lower_native
from .mesh_layouts import find_mesh_layouts
from .native import NativeFindings
from .normalize import normalize
from .open_regions import open_regions
from .read_sentinels import SentinelCall, read_sentinels
from .recognize_native import recognize_native
from .residual import Findings, Reason
from .stream_ends import StreamEnds, find_stream_ends


@dataclass(frozen=True)
class Analysis:
    """What is known of one captured graph.

    Attributes:
        plain: the graph, its regions open, its adds spelled one way, without sentinels, its native sites lowered.
        findings: its residual adds, and the adds that are none.
        native: what it holds of streams that the model carries itself.
        sentinels: the sentinels that were traced in it.
        ends: what is cut at its ends.
        nodes: number of nodes that Dynamo captured.
    """

    plain: GraphModule
    findings: Findings
    native: NativeFindings
    sentinels: tuple[SentinelCall, ...]
    ends: StreamEnds
    nodes: int


def analyze(graph_module: GraphModule, lower: bool = True) -> Analysis:
    """Analyze a captured graph.

    A region that no chain passes, and in which no module with mHC parameters runs, stays as it is: opening a subgraph
    that is compiled once and called often costs compile time.

    Args:
        graph_module: torch IR as Dynamo hands it to a backend.
        lower: have proved native sites run our operators.
    """
    opened = open_regions(graph_module)
    known: dict[str, Any] = {}
    plain, native = _lowered(normalize(opened), known, lower)
    findings = find_residuals(plain)
    regions = {region.path for node in plain.graph.nodes for region in regions_of(node)}
    needed = _regions_passed(findings) | _regions_with_sentinels(opened) | _regions_of_native(native)
    if regions - needed:
        closed = normalize(open_regions(graph_module, closed=regions - needed))
        plain, native = _lowered(closed, known, lower)
        findings = _named_alike(find_residuals(plain), findings)
    findings = find_mesh_layouts(findings)
    ends = find_stream_ends(plain, findings)
    # Placeholders of `plain` are the ones that the rewrite will know.
    own = {node.target: node for node in plain.graph.nodes if node.op == "placeholder"}
    sentinels = tuple(_over(call, own) for call in read_sentinels(opened))
    findings = _with_differences(findings, native)
    return Analysis(plain, findings, native, sentinels, ends, len(graph_module.graph.nodes))


def _lowered(plain: GraphModule, known: dict[str, Any], lower: bool) -> tuple[GraphModule, NativeFindings]:
    """Return a graph whose native sites run our operators, and what it holds of them."""
    if not lower:
        return plain, NativeFindings()
    native = recognize_native(plain, known)
    return lower_native(plain, native), native


def _with_differences(findings: Findings, native: NativeFindings) -> Findings:
    """Say of the writes that are not ours what the difference is."""
    known = {entry.add: entry.reason for entry in findings.rejections}
    told = {
        entry.add: entry
        for entry in native.rejections
        if known.get(entry.add) is Reason.NATIVE_STREAMS
        or (entry.reason is Reason.NATIVE_DIFFERS and entry.add in known)
    }
    others = tuple(entry for entry in findings.rejections if entry.add not in told)
    return replace(findings, rejections=(*others, *told.values()))


def _named_alike(closed: Findings, opened: Findings) -> Findings:
    """Have sites whose branch lies in a closed region say what computes it, as they do where the region is open.

    A region is opened once a sentinel is traced in it: names must not change by that. No chain passes the closed ones,
    so both graphs show the same chains.
    """
    chains = tuple(
        replace(
            chain,
            adds=tuple(
                replace(add, children=twin.children, hosts=twin.hosts)
                for add, twin in zip(chain.adds, other.adds, strict=True)
            ),
        )
        for chain, other in zip(closed.chains, opened.chains, strict=True)
    )
    return replace(closed, chains=chains)


def _over(call: SentinelCall, placeholders: dict[object, Node]) -> SentinelCall:
    """Return a sentinel whose inputs are placeholders of another copy of its graph."""
    return replace(call, inputs=tuple(placeholders[value.target] for value in call.inputs))


def _regions_passed(findings: Findings) -> set[tuple[str, ...]]:
    """Return the paths of the regions that hold a residual add or a carrier of one."""
    adds = [add for chain in findings.chains for add in chain.adds]
    on_stream = [*(add.node for add in adds), *(carrier.node for add in adds for carrier in add.carriers)]
    return {region.path for node in on_stream for region in regions_of(node)}


def _regions_of_native(native: NativeFindings) -> set[tuple[str, ...]]:
    """Return the paths of the regions that hold native sites."""
    on_stream = [site.write or site.layer_input for site in native.sites]
    on_stream += [site.layer_input for site in native.sites]
    on_stream += [head.output for head in native.heads]
    on_stream += [write.write for write in native.writes]
    return {region.path for node in on_stream for region in regions_of(node)}


def _regions_with_sentinels(opened: GraphModule) -> set[tuple[str, ...]]:
    """Return the paths of the regions in which a sentinel was traced: it has to be taken out."""
    return {region.path for node in opened.graph.nodes if is_sentinel(node) for region in regions_of(node)}


def holds_residual_adds(graph: Graph) -> bool:
    """Return whether a graph that Dynamo did not finish shows a residual add."""
    if not any(is_float(node) for node in graph.nodes):
        return False
    try:
        return bool(find_residuals(GraphModule(nn.Module(), graph)).chains)
    except (AttributeError, KeyError, RuntimeError):  # a half-built graph: nothing can be said about it
        return False
