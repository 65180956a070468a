"""Tie a plan to parameters: make those that are missing, and find the graph's inputs that they are."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..attachment.adapters import join_adapter
from ..attachment.entrances import close_entrances, open_entrances
from ..attachment.optimizers import watch_optimizers
from ..attachment.sentinels import arm, arm_root, disarm
from ..attachment.site_parameters import (
    CHILD,
    READOUT_SUFFIX,
    Role,
    SiteParameters,
    SiteShape,
    Start,
    add_parameters,
    attached_config,
    joined,
    parameters_of,
    site_parameters,
)
from ..config import MHCConfig
from ..dynamo.frames import Frame, inside_ddp, is_sharded
from ..errors import ConfigMismatchError, MHCError, MHCWarning, NotAttachedError, UnrewrittenCallError
from ..memory import MEMORY
from ..passes.bound_chains import BoundChain, BoundSite, Parameters
from ..passes.read_sentinels import SentinelCall
from .sites import Plan, PlannedChain, PlannedSite


@dataclass(frozen=True)
class _Wanted:
    """One set of parameters that a plan needs."""

    name: str
    owner: nn.Module
    label: str
    site: PlannedSite
    role: Role


def _wanted(plan: Plan, config: MHCConfig) -> list[_Wanted]:
    wanted = []
    for chain in plan.chains:
        for site in chain.selected:
            wanted.append(_Wanted(site.site.name, site.owner, site.label, site, site.role))
        if _learns_readout(chain, config):
            name, owner, label = _readout_of(chain)
            wanted.append(_Wanted(name, owner, label, chain.sites[-1], Role.READOUT))
    return wanted


def attach_plan(
    plan: Plan, frame: Frame, config: MHCConfig, on_first_call: bool = False
) -> list[tuple[nn.Module, str]]:
    """Create what is missing, note each site's role, put sentinels where the sites are, and return what was created.

    Interrupted half-way, it leaves the model as it was.
    """
    created: list[tuple[nn.Module, str]] = []
    try:
        _attach(plan, frame, config, on_first_call, created)
    except BaseException:
        take_back(created, frame.root)
        raise
    return created


def _attach(
    plan: Plan, frame: Frame, config: MHCConfig, on_first_call: bool, created: list[tuple[nn.Module, str]]
) -> None:
    for entry in _wanted(plan, config):
        known = site_parameters(entry.owner, entry.label)
        if known is None:
            created.append((entry.owner, entry.label))
            path = entry.name.rsplit(f"{CHILD}.{entry.label}", 1)[0].rstrip(".")
            readout = entry.role is Role.READOUT
            shape = _shape(entry.site, 0 if readout else entry.site.index)
            known = SiteParameters(entry.name, Start(shape, config, readout))
            add_parameters(entry.owner, path, entry.label, known, config)
        known.role = entry.role.value
        owned = parameters_of(entry.owner)
        assert owned is not None
        owned.on_first_call = on_first_call
    _arm(plan, frame, config)
    if frame.roots:
        watch_optimizers(frame.root)
        whole = [chain for chain in plan.chains if chain.selected[0].role.begins and chain.selected[-1].role.ends]
        open_entrances(frame.model or frame.root, [[site.site.owner for site in chain.selected] for chain in whole])


def _arm(plan: Plan, frame: Frame, config: MHCConfig) -> bool:
    """Put sentinels where a plan's sites are; return whether one was missing."""
    children: dict[int, tuple[nn.Module, dict[str, tuple[nn.Module, ...]]]] = {}
    for entry in _wanted(plan, config):
        children.setdefault(id(entry.owner), (entry.owner, {}))[1][entry.label] = entry.site.hosts
    missing = [arm(owner, labels) for owner, labels in children.values()]
    if frame.roots:
        arm_root(frame.root)
    return any(missing)


def attach_on_first_call(plan: Plan, frame: Frame, config: MHCConfig) -> bool:
    """Attach during compilation, and warn: an optimizer that exists by now does not own the new parameters.

    Returns:
        Whether anything was created; the frame then has to be traced anew, so that the parameters enter its graph. What
        takes them off again, should the compilation fail, is left in `MEMORY`.

    Raises:
        NotAttachedError: the model is already wrapped in DDP, or sharded by FSDP, which would not synchronize them.
    """
    missing = [entry for entry in _wanted(plan, config) if site_parameters(entry.owner, entry.label) is None]
    if not missing:
        return False
    wrapper, before = (
        ("wrapped in DistributedDataParallel", "wrapping it") if inside_ddp() else ("sharded", "fully_shard")
    )
    if inside_ddp() or any(is_sharded(root) for root in (*frame.roots, frame.outer) if root is not None):
        raise NotAttachedError(
            f"{len(missing)} mHC parameters are missing and the model is already {wrapper}, which would never "
            f"synchronize their gradients. Call mhc_compile.attach(model, example_input) before {before}."
        )
    # Before anything is made, since an interrupt may come at any time; weakly, since it must not keep the model alive.
    made = [(weakref.ref(entry.owner), entry.label) for entry in missing]
    root = weakref.ref(frame.root)

    def undo() -> None:
        alive = [(owner, label) for reference, label in made if (owner := reference()) is not None]
        if (model := root()) is not None:
            take_back(alive, model)

    MEMORY.undo.setdefault(frame.root, []).append(undo)
    attach_plan(plan, frame, config, on_first_call=True)
    join_adapter(frame.root)
    warnings.warn(
        f"backend='mhc' created the mHC parameters of {len(missing)} sites at the first call. An optimizer built "
        "before does not own them: call mhc_compile.attach(model, example_input) first, or add "
        "mhc_compile.param_groups(model, weight_decay=…) to it.",
        MHCWarning,
        stacklevel=2,
    )
    return True


def take_back(created: list[tuple[nn.Module, str]], root: nn.Module) -> None:
    """Take parameters off their owners again, and with the last of them all else that attaching has left."""
    for owner, label in created:
        owned = parameters_of(owner)
        if owned is None:
            continue
        owned._modules.pop(label, None)
        if not owned._modules:
            disarm(root, owner)
            delattr(owner, CHILD)
    if attached_config(root) is None:
        disarm(root)
        close_entrances(root)


def bind(plan: Plan, calls: tuple[SentinelCall, ...], frame: Frame, config: MHCConfig) -> tuple[BoundChain, ...] | None:
    """Find the inputs of the graph that are the parameters of a plan's sites.

    Returns:
        What `expand_streams` takes; None where a sentinel was missing and has been put back, so that the frame has to
        be traced anew: a child may have been replaced since its site was attached.

    Raises:
        ConfigMismatchError: a parameter's shape does not fit the options, for instance after a width change.
        UnrewrittenCallError: a site's parameters do not enter the graph, although its sentinel is in place.
    """
    inputs = {
        id(tensor): node
        for call in calls
        for tensor, node in zip(call.tensors, call.inputs, strict=True)
        if tensor is not None
    }
    lost: list[str] = []

    def parameters(name: str, owner: nn.Module, label: str, width: int | None) -> Parameters | None:
        site = site_parameters(owner, label)
        assert site is not None, f"{name} was attached before"
        _require_float32(name, site)
        if width is not None and site.phi.shape[-1] != config.n_streams * width:
            raise ConfigMismatchError(
                f"{name}.phi has {site.phi.shape[-1]} columns, but {config.n_streams} streams of width {width} need "
                f"{config.n_streams * width}. Call mhc_compile.detach(model) and attach again."
            )
        found = [inputs.get(id(tensor)) for tensor in (site.phi, site.scale, site.bias)]
        if None in found:
            lost.append(name)
            return None
        phi, scale, bias = (node for node in found if node is not None)
        return Parameters(name, phi, scale, bias)

    chains = []
    for chain in plan.chains:
        sites = tuple(
            BoundSite(
                site.add,
                parameters(site.site.name, site.owner, site.label, site.site.width) if site.selected else None,
            )
            for site in chain.sites
        )
        readout = parameters(*_readout_of(chain), None) if _learns_readout(chain, config) else None
        head = chain.entry.node if chain.entry is not None else chain.head
        chains.append(BoundChain(sites, head, chain.entry, chain.exits, readout, chain.layout))
    if not lost:
        return tuple(chains)
    if _arm(plan, frame, config):
        return None
    raise UnrewrittenCallError(
        f"the mHC parameters of {', '.join(lost[:4])} do not enter the graph: the forward of the child whose output "
        "they write is not called there as a module, so its hooks do not run. Call the child (child(x), not "
        "child.forward(x)), or leave the block out with the option sites=."
    )


def _require_float32(name: str, site: SiteParameters) -> None:
    """Check that something that casts a model's parameters has left these as they are."""
    for parameter, value in (("phi", site.phi), ("scale", site.scale), ("bias", site.bias)):
        if torch.promote_types(value.dtype, torch.float32) != value.dtype:
            raise MHCError(
                f"{name}.{parameter} is {value.dtype}: mixing coefficients need float32, or their matrix is no longer "
                "doubly stochastic. Under a mixed precision policy of FSDP2, call "
                "mhc_compile.distributed.shard_parameters(model) before the first fully_shard."
            )


def _learns_readout(chain: PlannedChain, config: MHCConfig) -> bool:
    return config.readout == "learned" and not chain.averaged and chain.selected[-1].role.ends


def _readout_of(chain: PlannedChain) -> tuple[str, nn.Module, str]:
    last = chain.sites[-1]
    label = last.label + READOUT_SUFFIX
    known = site_parameters(last.owner, label)
    return (known.name if known else joined(last.site.owner, label)), last.owner, label


def _shape(planned: PlannedSite, index: int) -> SiteShape:
    form = planned.add.form
    dtype = torch.float64 if form.dtype == torch.float64 else torch.float32
    parameter: Any = next(planned.owner.parameters(), None)
    device = parameter.device if parameter is not None else form.device
    return SiteShape(planned.site.width, index, device, dtype)
