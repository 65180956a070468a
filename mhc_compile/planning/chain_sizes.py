"""How large a plan's chains are, as numbers; where a size is symbolic, the one it was traced with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..config import MHCConfig
from ..kernels.costs.fusion_choice import FusionChoice, FusionReason, choose_fusion
from ..passes.fold_norms import would_fold
from ..passes.fx.node_info import form_of
from ..passes.native import NativeSite
from .sites import Plan, PlannedChain


@dataclass(frozen=True)
class ChainSize:
    """The size of one chain.

    Attributes:
        sites: rewritten residual adds.
        tokens: of its last site's stream.
        width: C.
        dtype: of the stream.
        device: of the stream.
        normed: sites whose norm `fold_norms` folds in where it runs, on a GPU with boundaries joined; not for
            `fusion_for`, which asks at every compilation.
    """

    sites: int
    tokens: int
    width: int
    dtype: torch.dtype
    device: torch.device
    normed: int = 0


def chain_sizes(plan: Plan, config: MHCConfig) -> tuple[ChainSize, ...]:
    """Return the size of each chain, without a guard on any of its symbols."""
    return tuple(replace(_size(chain), normed=_normed(chain, config)) for chain in plan.chains)


def fusion_for(plan: Plan, config: MHCConfig) -> FusionChoice:
    """Return the fusion choice for a graph: what the option asks for, or for "auto" what suits its largest chain."""
    if config.fusion != "auto":
        return FusionChoice(config.fusion, FusionReason.ASKED)
    largest = max(map(_size, plan.chains), key=lambda size: size.sites * size.tokens * size.width)
    return choose_fusion(
        largest.tokens,
        largest.width,
        config.n_streams,
        largest.dtype,
        largest.device,
        manifold=config.manifold,
        training=torch.is_grad_enabled(),
    )


def fusion_for_native(sites: Sequence[NativeSite], config: MHCConfig) -> FusionChoice:
    """Return the fusion choice for a graph that holds native sites alone."""
    if config.fusion != "auto":
        return FusionChoice(config.fusion, FusionReason.ASKED)
    forms = [(form_of(site.layer_input, -1), site) for site in sites]
    form, site = max(forms, key=lambda entry: entry[0].tokens * entry[0].width)
    return choose_fusion(
        form.tokens,
        form.width,
        site.n_streams,
        form.dtype,
        form.device,
        manifold=site.form.manifold,
        training=torch.is_grad_enabled(),
    )


def _size(chain: PlannedChain) -> ChainSize:
    form = chain.sites[-1].add.form
    return ChainSize(len(chain.selected), form.tokens, form.width, form.dtype, form.device)


def _normed(chain: PlannedChain, config: MHCConfig) -> int:
    if "fold_norms" in config.disable_passes:
        return 0
    return sum(would_fold(site.add, config.n_streams, config.manifold) for site in chain.selected)
