"""Which chains lie in the branch of a site on another one, and so begin with what that branch reads."""

from __future__ import annotations

from torch.fx import Node

from .bound_chains import BoundChain, BoundSite


def sites_around(
    chains: tuple[BoundChain, ...], reads: dict[tuple[Node, Node], list[BoundSite]]
) -> dict[Node, BoundSite]:
    """Return, for the adds that read another chain's stream inside a branch, the site that this branch belongs to.

    Such as u in h + F(u) with u = norm(h) + G(h) or u = h + G(h): the inner stream begins with what F's branch reads.

    Args:
        chains: the chains of a graph.
        reads: for a node and its operand, the sites whose branches it leads into with that fork, in graph order.
    """
    around: dict[Node, BoundSite] = {}
    for chain in chains:
        own = {site.add.node for site in chain.sites}
        for add in (site.add for site in chain.sites):
            for reader in (*add.readers, add.node):
                claims = reads.get((reader, add.fork), []) if add.fork is not None else []
                for outer in claims:
                    if outer.add.node not in own and outer.add.position > add.position:
                        around.setdefault(add.node, outer)
    return around
