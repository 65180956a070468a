"""What a rewrite is handed: the chains found in a graph, with the parameters that they get."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .residual import Entry, Exit, MeshLayout, ResidualAdd


@dataclass(frozen=True)
class Parameters:
    """The parameters of one site, or of a learned readout, as they enter the graph.

    Attributes:
        name: their common dotted name.
        phi: placeholder of phi.
        scale: placeholder of scale.
        bias: placeholder of bias.
    """

    name: str
    phi: Node
    scale: Node
    bias: Node


@dataclass(frozen=True)
class BoundSite:
    """A residual add with its parameters; without, its branch is added to every stream alike."""

    add: ResidualAdd
    parameters: Parameters | None


@dataclass(frozen=True)
class BoundChain:
    """A chain to rewrite.

    Attributes:
        sites: its residual adds with their parameters.
        head: the value that is expanded, or that the streams come in beside.
        entry: where the streams come in from another graph; None where they begin in this one.
        exits: outputs of the graph beside which the streams go on to another graph; empty where they end in this one.
        readout: the parameters of the chain's learned readout, if it has one.
        layout: how the stream lies on a tensor-parallel mesh, if it does.
    """

    sites: tuple[BoundSite, ...]
    head: Node
    entry: Entry | None = None
    exits: tuple[Exit, ...] = ()
    readout: Parameters | None = None
    layout: MeshLayout | None = None

    @property
    def parameters(self) -> tuple[Parameters, ...]:
        """All parameters of the chain, in order."""
        found = [*(site.parameters for site in self.sites), self.readout]
        return tuple(parameters for parameters in found if parameters is not None)
