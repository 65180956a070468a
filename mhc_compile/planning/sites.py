"""From findings to a plan: which sites to rewrite, who owns them, what they are called, where their streams go."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.fx import Node

from ..attachment.site_parameters import Role, joined, parameters_of, site_parameters
from ..config import MHCConfig
from ..dynamo.frames import Frame, plain_path
from ..errors import OwnerError, StreamCutError
from ..passes.residual import (
    Chain,
    Entry,
    Exit,
    Findings,
    MeshLayout,
    Reason,
    Rejection,
    ResidualAdd,
    ResidualChain,
    Site,
)
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
        hosts: the owner's children whose forward hands the site's parameters to the graph.
        selected: False for an add that the option `sites` leaves out, yet that lies between selected ones: it adds
            its branch to every stream alike.
        role: where on its chain it lies; the chain may reach over several graphs.
        index: its place among the selected sites of the whole chain.
    """

    add: ResidualAdd
    site: Site
    owner: nn.Module
    label: str
    branch_label: str
    hosts: tuple[nn.Module, ...]
    selected: bool
    role: Role = Role.ONLY
    index: int = 0


@dataclass(frozen=True)
class PlannedChain:
    """A chain to rewrite.

    Attributes:
        sites: its sites, in order.
        head: the value that is expanded.
        chain: what the report shows.
        start: the input that the stream may come in by, if the head is one over carriers.
        entry: the same, where streams do come in from another graph.
        exits: outputs of the graph beside which the streams go on to another graph.
        averaged: read out by the mean, whichever the readout: the stream goes on behind a cut.
        layout: how the stream lies on a tensor-parallel mesh, if it does.
    """

    sites: tuple[PlannedSite, ...]
    head: Node
    chain: Chain
    start: Entry | None = None
    entry: Entry | None = None
    exits: tuple[Exit, ...] = ()
    averaged: bool = False
    layout: MeshLayout | None = None

    @property
    def selected(self) -> list[PlannedSite]:
        """The sites that are rewritten with parameters of their own."""
        return [site for site in self.sites if site.selected]


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
        return [site for chain in self.chains for site in chain.selected]


def plan_sites(findings: Findings, frame: Frame, config: MHCConfig, in_pieces: bool = False) -> Plan:
    """Name every residual add, keep the chains that the options ask for, reject the rest with a reason.

    With `in_pieces` a chain that may go on in another graph is kept, however short: `without_chains` judges it
    once the whole stream is known.
    """
    rejections = list(findings.rejections)
    calls = calls_before(frame)
    named: dict[int, PlannedSite] = {}
    # Names count the calls of a shared module in graph order, whichever chain they are on.
    for add in sorted((add for chain in findings.chains for add in chain.adds), key=lambda add: add.position):
        named[add.position] = _named(add, frame, config, calls)
    remember_calls(frame, calls)
    chains: list[PlannedChain] = []
    for chain in findings.chains:
        sites = [named[add.position] for add in chain.adds]
        selected = [site for site in sites if site.selected]
        dropped = [site for site in sites if not site.selected]
        rejections += [_rejection(site, Reason.NOT_SELECTED) for site in dropped]
        # A chain that has its parameters is no shorter for being cut in pieces.
        known = any(site_parameters(site.owner, site.label) for site in selected)
        goes_on = in_pieces and (chain.entry is not None or bool(chain.adds[-1].exits))
        if not selected or (len(selected) < config.min_sites and not known and not goes_on):
            rejections += [_rejection(site, Reason.SHORT_CHAIN, str(len(selected))) for site in selected]
            continue
        chains.append(_with_roles(_trimmed(chain, sites)))
    return Plan(tuple(chains), tuple(rejections))


def without_chains(plan: Plan, reasons: Sequence[tuple[Reason, str] | None]) -> Plan:
    """Reject chains that the whole model tells against; one reason with its detail for each chain, None for the others.

    A chain that has its parameters is kept, however short.
    """
    kept, rejections = [], list(plan.rejections)
    for chain, why in zip(plan.chains, reasons, strict=True):
        known = any(site_parameters(site.owner, site.label) for site in chain.selected)
        if why is None or (why[0] is Reason.SHORT_CHAIN and known):
            kept.append(chain)
        else:
            rejections += [_rejection(site, *why) for site in chain.selected]
    return replace(plan, chains=tuple(kept), rejections=tuple(rejections))


def _with_roles(chain: PlannedChain) -> PlannedChain:
    """Give each selected site its role: the one that it was attached with, else the one that this graph shows."""
    return placed(chain, begins=True, ends=True, before=0, attached=True)


def placed(chain: PlannedChain, begins: bool, ends: bool, before: int, attached: bool = False) -> PlannedChain:
    """Return a chain whose sites know their place on the whole stream.

    Args:
        chain: a piece of the stream, or all of it.
        begins: the stream begins with this piece.
        ends: the stream ends with this piece.
        before: number of selected sites before this piece.
        attached: sites that have parameters keep the role that these bear.
    """
    roles = {
        (True, True): Role.ONLY, (True, False): Role.HEAD, (False, True): Role.TAIL, (False, False): Role.CARRIED
    }  # fmt: skip
    selected = [index for index, site in enumerate(chain.sites) if site.selected]
    sites = list(chain.sites)
    for count, index in enumerate(selected):
        role = roles[begins and count == 0, ends and count == len(selected) - 1]
        known = site_parameters(sites[index].owner, sites[index].label) if attached else None
        sites[index] = replace(sites[index], role=Role(known.role) if known else role, index=before + count)
    return replace(chain, sites=tuple(sites))


def refuse_split_calls(plan: Plan, frame: Frame) -> None:
    """Check that a block that is compiled alone is called once in a forward.

    The sites of several calls are told apart by counting, which a graph that serves every call cannot do.

    Raises:
        StreamCutError: some of the calls lie in another graph.
    """
    counted = Counter((id(site.owner), site.branch_label) for site in plan.sites)
    for site in plan.sites:
        owned = parameters_of(site.owner)
        calls = sum(without_call(label) == site.branch_label for label in owned._modules) if owned else 0
        if calls > max(1, counted[id(site.owner), site.branch_label]):
            reason = frame.break_reason or (
                f"{frame.caller} runs as plain Python" if frame.caller else "it is compiled alone"
            )
            raise StreamCutError(
                f"{site.site.name} is called {calls} times in a forward, each time with mHC parameters of its own, but "
                f"this graph holds only {counted[id(site.owner), site.branch_label]} of the calls: {reason}. Which "
                "call it is, cannot be told there. Compile the model as a whole, or take the graph break away "
                "(TORCH_LOGS=graph_breaks)."
            )


def without_call(label: str) -> str:
    """Return a label without the number of the call."""
    return re.sub(r"_\d+$", "", label)


def _trimmed(chain: ResidualChain, sites: list[PlannedSite]) -> PlannedChain:
    """Cut unselected sites off both ends, unless the stream goes on there in another graph."""
    selected = [index for index, site in enumerate(sites) if site.selected]
    first = 0 if chain.entry is not None and not _role(sites[selected[0]]).begins else selected[0]
    last = len(sites) - 1 if not _role(sites[selected[-1]]).ends else selected[-1]
    kept = sites[first : last + 1]
    head, start = chain.head, chain.entry
    if first > 0:
        # The plain model carries the stream this far: nothing before the new head is lifted.
        kept[0] = replace(kept[0], add=replace(kept[0].add, carriers=()))
        head, start = kept[0].add.skip, None
    public = Chain(
        sites=tuple(site.site for site in kept if site.selected),
        head=chain.head_location if first == 0 else sites[first - 1].site.location,
        tail=kept[-1].site.location,
    )
    return PlannedChain(tuple(kept), head, public, start, layout=chain.layout)


def _role(site: PlannedSite) -> Role:
    known = site_parameters(site.owner, site.label)
    return Role(known.role) if known is not None else Role.ONLY


def _rejection(site: PlannedSite, reason: Reason, detail: str = "") -> Rejection:
    return Rejection(site.add.node.name, site.site.location, reason, detail)


def _named(add: ResidualAdd, frame: Frame, config: MHCConfig, calls: Calls) -> PlannedSite:
    owner_path, owner = _owner(add, frame)
    # A child that a branch calls twice may have one key or two, as Dynamo reached it.
    children = dict.fromkeys(_relative(key, path, add, owner, frame) for key, path in add.children)
    branch_label = "_".join(children) or "add"
    calls[id(owner), branch_label] += 1
    call = calls[id(owner), branch_label] - 1
    label = f"{branch_label}_{call}" if call else branch_label
    known = site_parameters(owner, label)
    name = known.name if known is not None else joined(owner_path, label)
    site = Site(
        name=name,
        owner=owner_path,
        location=add.location,
        norm=add.norm,
        shape=add.form.sizes,
        dtype=str(add.form.dtype).removeprefix("torch."),
        width=add.form.width,
    )
    hosts = tuple(found[1] for key, path in add.hosts if (found := frame.module_at(key, path)) is not None)
    return PlannedSite(add, site, owner, label, branch_label, hosts, selected=config.wants(name))


def _relative(key: str, path: str, add: ResidualAdd, owner: nn.Module, frame: Frame) -> str:
    """Return a child's path below a site's owner as an identifier; by the child itself, however Dynamo reached it."""
    found = frame.module_at(key, path)
    names = (name for name, module in owner.named_modules() if found is not None and module is found[1])
    text = next(names, None)
    if text is None:
        text = plain_path(path.removeprefix(add.module_path[-1][1] if add.module_path else ""))
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
