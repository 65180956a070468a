"""What a rewrite is handed: the chains found in a graph, with the parameters that they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from .residual import ResidualAdd


@dataclass(frozen=True)
class Parameters:
    """The parameters of one site, or of a learned readout, as they enter the graph.

    Attributes:
        name: their common name.
        examples: fake tensors of phi, scale and bias.
        sources: what AOTAutograd wants as the placeholders' `_dynamo_source`.
    """

    name: str
    examples: tuple[Tensor, Tensor, Tensor]
    sources: tuple[Any, Any, Any]


@dataclass(frozen=True)
class BoundSite:
    """A residual add with its parameters; without, its branch is added to every stream alike."""

    add: ResidualAdd
    parameters: Parameters | None


@dataclass(frozen=True)
class BoundChain:
    """A chain to rewrite, with the parameters of its learned readout, if it has one."""

    sites: tuple[BoundSite, ...]
    head: Node
    readout: Parameters | None


def parameter_order(chains: tuple[BoundChain, ...]) -> list[Parameters]:
    """Return the parameters in the order in which the rewritten graph takes them, behind its own inputs."""
    order: list[Parameters] = []
    for chain in chains:
        order += [site.parameters for site in chain.sites if site.parameters is not None]
        if chain.readout is not None:
            order.append(chain.readout)
    return order
