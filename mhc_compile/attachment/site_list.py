"""Where a model's mHC parameters are, as plain data: what it takes to attach again without tracing the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..config import MHCConfig
from ..errors import ConfigMismatchError
from .entrances import Entrance
from .optimizers import watch_optimizers
from .sentinels import arm, arm_root, sentinels_on
from .site_parameters import Role, SiteParameters, SiteShape, Start, add_parameters, attached_config, owners_in


@dataclass(frozen=True)
class ListedSite:
    """One set of parameters, of a site or of a readout.

    Attributes:
        name: the site's dotted name.
        owner: path of the module that has the parameters.
        label: their name below the owner's `mhc`.
        role: a value of `Role`.
        width: number of features C.
        index: its place among the sites of its chain.
        dtype: of the parameters.
        hosts: paths of the modules whose forward hands the parameters to the graph.
    """

    name: str
    owner: str
    label: str
    role: str
    width: int
    index: int
    dtype: str
    hosts: tuple[str, ...]


@dataclass(frozen=True)
class ChosenSites:
    """The option `sites` of a model that was attached from a list: its names, and no others."""

    names: frozenset[str]

    def __call__(self, name: str) -> bool:
        """Return whether the list has a site of this name."""
        return name in self.names

    def __str__(self) -> str:
        """Return what reports show."""
        return f"{len(self.names)} names"


@dataclass(frozen=True)
class SiteList:
    """What `attach` has put on a model, without the values of the parameters.

    Attributes:
        config: the options.
        sites: all sets of parameters.
        entrances: paths of the submodules that run rewritten when they are called alone.
    """

    config: MHCConfig
    sites: tuple[ListedSite, ...]
    entrances: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        config = {name: value for name, value in self.config.to_dict().items() if name != "sites"}
        kept = self.config.sites if isinstance(self.config.sites, str) else None
        return {
            "config": {**config, "sites": kept},
            "chosen": callable(self.config.sites),
            "sites": [asdict(site) for site in self.sites],
            "entrances": list(self.entrances),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiteList:
        """Read what `to_dict` has returned."""
        sites = tuple(ListedSite(**{**site, "hosts": tuple(site["hosts"])}) for site in values["sites"])
        config = dict(values["config"])
        if values["chosen"]:
            config["sites"] = ChosenSites(frozenset(site.name for site in sites))
        return cls(MHCConfig(**config), sites, tuple(values["entrances"]))


def list_sites(root: nn.Module) -> SiteList:
    """Describe what is attached to a model, which has mHC parameters."""
    hosts: dict[tuple[int, str], list[str]] = {}
    for path, module in root.named_modules():
        for sentinel in sentinels_on(module):
            for label in sentinel.labels:
                hosts.setdefault((id(sentinel.owner), label), []).append(path)
    sites = [
        ListedSite(
            name=site.name,
            owner=path,
            label=label,
            role=site.role,
            width=site.start.shape.width,
            index=site.start.shape.index,
            dtype=str(site.phi.dtype).removeprefix("torch."),
            hosts=tuple(hosts.get((id(owner), label), ())),
        )
        for path, owner, owned in owners_in(root)
        for label, site in owned._modules.items()
        if isinstance(site, SiteParameters)
    ]
    config = attached_config(root)
    assert config is not None
    entrances = [path for path, module in root.named_modules() if isinstance(module._compiled_call_impl, Entrance)]
    return SiteList(config, tuple(sites), tuple(entrances))


def attach_listed(root: nn.Module, listed: SiteList) -> None:
    """Put parameters of a list on a model that has none.

    Raises:
        ConfigMismatchError: the model has no module of a path in the list.
    """
    children: dict[str, dict[str, tuple[nn.Module, ...]]] = {}
    for site in listed.sites:
        owner = _module(root, site.owner)
        parameter = next(owner.parameters(), None)
        device = parameter.device if parameter is not None else torch.device("cpu")
        shape = SiteShape(site.width, site.index, device, getattr(torch, site.dtype))
        made = SiteParameters(site.name, Start(shape, listed.config, site.role == Role.READOUT.value))
        made.role = site.role
        add_parameters(owner, site.owner, site.label, made, listed.config)
        children.setdefault(site.owner, {})[site.label] = tuple(_module(root, host) for host in site.hosts)
    for path, labels in children.items():
        arm(_module(root, path), labels)
    arm_root(root)
    watch_optimizers(root)
    for path in listed.entrances:
        module = _module(root, path)
        if module._compiled_call_impl is None:
            module._compiled_call_impl = Entrance(module, root)


def _module(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ConfigMismatchError(
            f"the saved mHC parameters belong to {path}, which {type(root).__name__} does not have: it was saved from "
            "another kind of model. Load it with the class that it was saved from."
        ) from error
