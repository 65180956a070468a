"""A model as the run of pieces that a pipeline can be cut into: what lies between two blocks of its stream."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule

from ..passes.count_branch_work import BranchWork, count_pieces
from .sites import Plan


@dataclass(frozen=True)
class Piece:
    """One block; the first with all that comes before it, the last with all that comes behind.

    Attributes:
        name: path of the module that holds its sites.
        sites: rewritten residual adds.
        work: of the plain model.
        parameters: elements of each parameter that it reads, by name.
    """

    name: str
    sites: int
    work: BranchWork
    parameters: Mapping[str, int]


def pieces_of(plain: GraphModule, plan: Plan) -> tuple[Piece, ...]:
    """Divide a graph at the blocks of its longest chain.

    Args:
        plain: the graph that the plan is for.
        plan: what is rewritten.

    Raises:
        MHCError: the graph cannot run on shapes alone.
    """
    if not plan.chains:
        return ()
    chain = max(plan.chains, key=lambda chain: len(chain.sites))
    blocks = [list(sites) for _, sites in itertools.groupby(chain.sites, lambda site: site.site.owner)]
    work = count_pieces(plain, [block[-1].add.node for block in blocks[:-1]])
    return tuple(
        Piece(block[0].site.owner, sum(site.selected for site in block), one.work, one.parameters)
        for block, one in zip(blocks, work, strict=True)
    )
