"""Tie a plan to parameters: make those that are missing, and hand them to the graph as inputs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attachment import sentinels
from ..attachment.optimizers import watch_optimizers
from ..attachment.site_parameters import (
    CHILD,
    READOUT_SUFFIX,
    SiteParameters,
    SiteShape,
    add_parameters,
    attached_config,
    joined,
    make_readout_parameters,
    make_site_parameters,
    parameters_of,
)
from ..config import MHCConfig
from ..dynamo.frames import Frame, inside_ddp
from ..errors import ConfigMismatchError, MHCWarning, NotAttachedError
from ..passes.bound_chains import BoundChain, BoundSite, Parameters, parameter_order
from .graph_breaks import undo_with_break
from .sites import Plan, PlannedChain, PlannedSite


@dataclass(frozen=True)
class Binding:
    """A plan with its parameters.

    Attributes:
        chains: what `expand_streams` takes.
        live: returns the model's current parameters, in the order in which the rewritten graph takes them.
    """

    chains: tuple[BoundChain, ...]
    live: Callable[[], list[Tensor]]


def missing_sites(plan: Plan, config: MHCConfig) -> list[str]:
    """Return the names of the parameters that a plan needs and its owners lack."""
    return [name for name, owner, label, _ in _wanted(plan, config) if _parameters(owner, label) is None]


def attach_plan(plan: Plan, frame: Frame, config: MHCConfig) -> list[tuple[nn.Module, str]]:
    """Create what is missing, put sentinels on every owner, and return what was created."""
    created = []
    for name, owner, label, make in _wanted(plan, config):
        if _parameters(owner, label) is None:
            created.append((owner, label))
            path = name.rsplit(f"mhc.{label}", 1)[0].rstrip(".")
            add_parameters(owner, path, label, make(), config)
    children: dict[int, dict[str, list[nn.Module]]] = {}
    owners: dict[int, tuple[str, nn.Module]] = {}
    for site in plan.sites:
        owners[id(site.owner)] = (site.site.owner, site.owner)
        children.setdefault(id(site.owner), {})[site.label] = list(site.children)
    for key, (path, owner) in owners.items():
        sentinels.arm(path, owner, children[key])
    if frame.roots:
        sentinels.arm_root(frame.root)
        watch_optimizers(frame.root)
    return created


def attach_on_first_call(plan: Plan, frame: Frame, config: MHCConfig) -> Callable[[], None]:
    """Attach during compilation, and warn: an optimizer that exists by now does not own the new parameters.

    Returns:
        What takes the new parameters off again, should the compilation fail.

    Raises:
        NotAttachedError: the model is already wrapped in DDP, which would not synchronize them.
    """
    missing = missing_sites(plan, config)
    if not missing:
        return lambda: None
    if inside_ddp():
        raise NotAttachedError(
            f"{len(missing)} mHC parameters are missing and the model is already wrapped in DistributedDataParallel, "
            "which would never synchronize their gradients. Call mhc_compile.attach(model, example_input) before "
            "wrapping it."
        )
    created = attach_plan(plan, frame, config)
    undo_with_break(frame, lambda: _take_back(created, frame.root))
    warnings.warn(
        f"backend='mhc' created the mHC parameters of {len(missing)} sites at the first call. An optimizer built "
        "before does not own them: call mhc_compile.attach(model, example_input) first, or add "
        "mhc_compile.param_groups(model, weight_decay=…) to it.",
        MHCWarning,
        stacklevel=2,
    )
    return lambda: _take_back(created, frame.root)


def _take_back(created: list[tuple[nn.Module, str]], root: nn.Module) -> None:
    for owner, label in created:
        parameters = parameters_of(owner)
        if parameters is None or label not in parameters._modules:
            continue
        del parameters._modules[label]
        if not parameters._modules:
            sentinels.disarm(owner)
            delattr(owner, CHILD)
    if attached_config(root) is None:
        sentinels.disarm(root)


def bind(plan: Plan, config: MHCConfig, fake_mode: Any) -> Binding:
    """Look the parameters up and describe them to the graph.

    Raises:
        ConfigMismatchError: a parameter's shape does not fit the options, for instance after a width change.
    """
    holders: dict[str, tuple[weakref.ref[nn.Module], str]] = {}
    chains = []
    for chain in plan.chains:
        sites = []
        for planned in chain.sites:
            parameters = None
            if planned.selected:
                parameters = _describe(planned.site.name, planned.owner, planned.label, planned, config, fake_mode)
                holders[planned.site.name] = (weakref.ref(planned.owner), planned.label)
            sites.append(BoundSite(planned.add, parameters))
        readout = None
        if _learns_readout(chain, config):
            name, owner, label = _readout_of(chain)
            readout = _describe(name, owner, label, None, config, fake_mode)
            holders[name] = (weakref.ref(owner), label)
        chains.append(BoundChain(tuple(sites), chain.head, readout))
    bound = tuple(chains)
    order = [holders[parameters.name] for parameters in parameter_order(bound)]
    return Binding(bound, lambda: _live(order))


def _live(order: list[tuple[weakref.ref[nn.Module], str]]) -> list[Tensor]:
    """Look the parameters up on the model: a loaded checkpoint or FSDP may have replaced them."""
    found: list[Tensor] = []
    for reference, label in order:
        owner = reference()
        parameters = _parameters(owner, label) if owner is not None else None
        if parameters is None:
            raise NotAttachedError(
                f"the mHC parameters {label!r} are gone from the model (mhc_compile.detach?), but the compiled model "
                "still needs them. Call torch._dynamo.reset(), or compile the plain model with another backend."
            )
        found += [parameters.phi, parameters.scale, parameters.bias]
    return found


def _wanted(plan: Plan, config: MHCConfig) -> list[tuple[str, nn.Module, str, Callable[[], SiteParameters]]]:
    """List every parameters of a plan: its name, owner, label, and how to make it."""
    wanted: list[tuple[str, nn.Module, str, Callable[[], SiteParameters]]] = []
    for chain in plan.chains:
        for index, planned in enumerate(site for site in chain.sites if site.selected):
            shape = _shape(planned, index)
            name = planned.site.name
            wanted.append((name, planned.owner, planned.label, _maker(make_site_parameters, name, shape, config)))
        if _learns_readout(chain, config):
            name, owner, label = _readout_of(chain)
            shape = _shape(chain.sites[-1], 0)
            wanted.append((name, owner, label, _maker(make_readout_parameters, name, shape, config)))
    return wanted


def _maker(
    make: Callable[..., SiteParameters], name: str, shape: SiteShape, config: MHCConfig
) -> Callable[[], SiteParameters]:
    return lambda: make(name, shape, config)


def _learns_readout(chain: PlannedChain, config: MHCConfig) -> bool:
    return config.readout == "learned" and not chain.averaged


def _readout_of(chain: PlannedChain) -> tuple[str, nn.Module, str]:
    last = chain.sites[-1]
    label = last.label + READOUT_SUFFIX
    return joined(last.site.owner, label), last.owner, label


def _shape(planned: PlannedSite, index: int) -> SiteShape:
    example = planned.add.add.meta["example_value"]
    dtype = torch.float64 if example.dtype == torch.float64 else torch.float32
    parameter = next(planned.owner.parameters(), None)
    device = parameter.device if parameter is not None else example.device
    return SiteShape(planned.site.width, index, device, dtype)


def _parameters(owner: nn.Module, label: str) -> SiteParameters | None:
    parameters = parameters_of(owner)
    found = parameters._modules.get(label) if parameters is not None else None
    return found if isinstance(found, SiteParameters) else None


def _describe(
    name: str, owner: nn.Module, label: str, planned: PlannedSite | None, config: MHCConfig, fake_mode: Any
) -> Parameters:
    from torch._dynamo.source import ConstantSource

    parameters = _parameters(owner, label)
    assert parameters is not None, f"{name} was attached before"
    if planned is not None and parameters.phi.shape[-1] != config.n_streams * planned.site.width:
        raise ConfigMismatchError(
            f"{name}.phi has {parameters.phi.shape[-1]} columns, but {config.n_streams} streams of width "
            f"{planned.site.width} need {config.n_streams * planned.site.width}. Call mhc_compile.detach(model) and "
            "attach again."
        )
    tensors = (parameters.phi, parameters.scale, parameters.bias)
    if fake_mode is not None:
        examples = tuple(fake_mode.from_tensor(tensor, static_shapes=True) for tensor in tensors)
    else:
        examples = tensors
    roles = ("phi", "scale", "bias")
    sources = tuple(ConstantSource(source_name=f"{name}.{role}") for role in roles)
    return Parameters(name, examples, sources)  # type: ignore[arg-type]
