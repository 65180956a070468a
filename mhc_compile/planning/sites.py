"""From findings to a plan: which sites to rewrite, who owns them, what they are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import GraphModule, Node

from ..attachment.site_parameters import has_parameters, joined
from ..config import MHCConfig
from ..dynamo.frames import Frame
from ..errors import OwnerError
from ..passes.find_residuals import find_residuals
from ..passes.fx.dataflow import sizes_of, tensor_of
from ..passes.fx.regions import regions_of
from ..passes.normalize import is_sentinel, normalize
from ..passes.open_regions import open_regions
from ..passes.residual import Chain, Findings, Reason, Rejection, ResidualAdd, ResidualChain, Site
from .call_counts import Calls, calls_before, remember_calls

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class PlannedSite:
    """A residual add with its name and owner.

    Attributes:
        add: the add in the graph.
        site: what the report shows.
        owner: the module that holds (or will hold) its parameters.
        label: its name below the owner's `mhc`.
        branch_label: the same without the number of the call, for an owner that is called several times.
        children: the owner's children whose output the add writes into the stream.
        selected: False for an add that the option `sites` leaves out, yet that lies between selected ones: it adds
            its branch to every stream alike.
    """

    add: ResidualAdd
    site: Site
    owner: nn.Module
    label: str
    branch_label: str
    children: tuple[nn.Module, ...]
    selected: bool


@dataclass(frozen=True)
class PlannedChain:
    """A chain to rewrite.

    Attributes:
        sites: its sites, in order.
        head: the value that is expanded.
        chain: what the report shows.
        averaged: read out by the mean, whichever the readout: the stream goes on behind a cut.
    """

    sites: tuple[PlannedSite, ...]
    head: Node
    chain: Chain
    averaged: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be rewritten in one graph, and what will not.

    Attributes:
        chains: what will be.
        rejections: what will not.
        cuts: why the streams that enter this graph were averaged before it, with the source line.
    """

    chains: tuple[PlannedChain, ...]
    rejections: tuple[Rejection, ...]
    cuts: tuple[str, ...] = ()

    @property
    def sites(self) -> list[PlannedSite]:
        """The selected sites of all chains."""
        return [site for chain in self.chains for site in chain.sites if site.selected]


def plan_graph(graph_module: GraphModule, frame: Frame, config: MHCConfig) -> tuple[GraphModule, Plan]:
    """Open the regions of a captured graph, spell its adds one way, find and plan its sites.

    A region that no chain passes, and in which no module with mHC parameters runs, stays as it is: opening a subgraph
    that is compiled once and called often costs compile time.

    Returns:
        The opened, normalized graph and its plan.
    """
    everything_open = open_regions(graph_module)
    plain = normalize(everything_open)
    findings = find_residuals(plain)
    opened = {region.path for node in plain.graph.nodes for region in regions_of(node)}
    if opened:
        needed = _regions_passed(findings) | _regions_with_sentinels(everything_open)
        if opened - needed:
            plain = normalize(open_regions(graph_module, closed=opened - needed))
            findings = find_residuals(plain)
    return plain, plan_sites(findings, frame, config)


def _regions_passed(findings: Findings) -> set[tuple[str, ...]]:
    """Return the paths of the regions that hold a residual add or a carrier of one."""
    adds = [add for chain in findings.chains for add in chain.adds]
    on_stream = [*(add.add for add in adds), *(carrier.node for add in adds for carrier in add.carriers)]
    return {region.path for node in on_stream for region in regions_of(node)}


def _regions_with_sentinels(opened: GraphModule) -> set[tuple[str, ...]]:
    """Return the paths of the regions in which a sentinel was traced: it has to be taken out."""
    return {region.path for node in opened.graph.nodes if is_sentinel(node) for region in regions_of(node)}


def plan_sites(findings: Findings, frame: Frame, config: MHCConfig) -> Plan:
    """Name every residual add, keep the chains that the options ask for, reject the rest with a reason."""
    rejections = list(findings.rejections)
    calls = calls_before(frame)
    named: dict[Node, PlannedSite] = {}
    adds = [add for chain in findings.chains for add in chain.adds]
    # Names count the calls of a shared module in graph order, whichever chain they are on.
    for add in sorted(adds, key=_graph_order(adds)):
        named[add.add] = _named(add, frame, config, calls)
    remember_calls(frame, calls)
    chains: list[PlannedChain] = []
    for chain in findings.chains:
        sites = [named[add.add] for add in chain.adds]
        selected = [site for site in sites if site.selected]
        dropped = [site for site in sites if not site.selected]
        rejections += [_rejection(site, Reason.NOT_SELECTED) for site in dropped]
        # A chain that has its parameters is no shorter for being cut in pieces.
        known = any(has_parameters(site.owner, site.label) for site in selected)
        if not selected or (len(selected) < config.min_sites and not known):
            reason = Reason.SHORT_CHAIN
            rejections += [_rejection(site, reason, f"{len(selected)}") for site in selected]
            continue
        chains.append(_trimmed(chain, sites))
    return Plan(tuple(chains), tuple(rejections))


def _graph_order(adds: Sequence[ResidualAdd]) -> Callable[[ResidualAdd], int]:
    order = {node: index for index, node in enumerate(adds[0].add.graph.nodes)} if adds else {}
    return lambda add: order[add.add]


def _trimmed(chain: ResidualChain, sites: list[PlannedSite]) -> PlannedChain:
    """Cut unselected sites off both ends; the chain then begins at its first selected site."""
    first = next(index for index, site in enumerate(sites) if site.selected)
    last = max(index for index, site in enumerate(sites) if site.selected)
    kept = sites[first : last + 1]
    head = chain.head
    if first > 0:
        # The plain model carries the stream this far: nothing before the new head is lifted.
        kept[0] = replace(kept[0], add=replace(kept[0].add, carriers=()))
        head = kept[0].add.skip
    public = Chain(
        sites=tuple(site.site for site in kept if site.selected),
        head=chain.head_location if first == 0 else sites[first - 1].site.location,
        tail=kept[-1].site.location,
    )
    return PlannedChain(tuple(kept), head, public)


def _rejection(site: PlannedSite, reason: Reason, detail: str = "") -> Rejection:
    return Rejection(site.add.add.name, site.site.location, reason, detail)


def _named(add: ResidualAdd, frame: Frame, config: MHCConfig, calls: Calls) -> PlannedSite:
    owner_path, owner = _owner(add, frame)
    branch_label = "_".join(_relative(path, add) for _, path in add.children) or "add"
    calls[id(owner), branch_label] += 1
    call = calls[id(owner), branch_label] - 1
    label = f"{branch_label}_{call}" if call else branch_label
    name = joined(owner_path, label)
    tensor = tensor_of(add.add)
    assert tensor is not None
    sizes = sizes_of(tensor)
    site = Site(
        name=name,
        owner=owner_path,
        location=add.location,
        norm=add.norm,
        shape=tuple(size if isinstance(size, int) else str(size) for size in sizes),
        dtype=str(tensor.dtype).removeprefix("torch."),
        width=int(sizes[add.feature_dim]),
    )
    children = tuple(found[1] for key, path in add.children if (found := frame.module_at(key, path)) is not None)
    return PlannedSite(add, site, owner, label, branch_label, children, selected=config.wants(name))


def _relative(path: str, add: ResidualAdd) -> str:
    """Return a child's path below the add's innermost module as an identifier."""
    below = add.module_path[-1][1] if add.module_path else ""
    text = path.removeprefix(below)
    text = re.sub(r"^[LG]\['\w+'\]", "", text)
    return re.sub(r"\W+", "_", text).strip("_")


def _owner(add: ResidualAdd, frame: Frame) -> tuple[str, nn.Module]:
    """Return the innermost module around the add that is no container: a container would call `mhc` as a layer."""
    for key, path in reversed(add.module_path):
        found = frame.module_at(key, path)
        if found is None:
            raise OwnerError(
                f"the module {path} that holds the residual add at {add.location} cannot be found on the model. "
                "Compile the model that contains it, torch.compile(model, backend='mhc')."
            )
        if not isinstance(found[1], _CONTAINERS):
            return found
    return frame.paths.get(id(frame.root), ("", frame.root))
