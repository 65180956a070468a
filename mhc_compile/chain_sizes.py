"""How large a plan's chains are, as numbers; where a size is symbolic, the one it was traced with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .config import MHCConfig
from .kernels.costs.fusion_choice import FusionChoice, FusionReason, choose_fusion
from .passes.dataflow import size_hint, tensor_of
from .planning import Plan, PlannedChain


@dataclass(frozen=True)
class ChainSize:
    """The size of one chain.

    Attributes:
        sites: rewritten residual adds.
        tokens: of its last site's stream.
        width: C.
        dtype: of the stream.
        device: of the stream.
    """

    sites: int
    tokens: int
    width: int
    dtype: torch.dtype
    device: torch.device


def chain_sizes(plan: Plan) -> tuple[ChainSize, ...]:
    """Return the size of each chain, without a guard on any of its symbols."""
    return tuple(_size(chain) for chain in plan.chains)


def fusion_for(plan: Plan, config: MHCConfig) -> FusionChoice:
    """Return the fusion choice for a graph: what the option asks for, or for "auto" what suits its largest chain."""
    if config.fusion != "auto":
        return FusionChoice(config.fusion, FusionReason.ASKED)
    largest = max(chain_sizes(plan), key=lambda size: size.sites * size.tokens * size.width)
    return choose_fusion(
        largest.tokens,
        largest.width,
        config.n_streams,
        largest.dtype,
        largest.device,
        manifold=config.manifold,
        training=torch.is_grad_enabled(),
    )


def _size(chain: PlannedChain) -> ChainSize:
    last = chain.sites[-1].add
    tensor = tensor_of(last.add)
    assert tensor is not None
    sizes = [size_hint(size) for size in tensor.shape]
    width = sizes.pop(last.feature_dim)
    sites = sum(site.selected for site in chain.sites)
    return ChainSize(sites, math.prod(sizes), width, tensor.dtype, tensor.device)
