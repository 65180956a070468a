"""Join residual adds into chains, once all are known: what lies between two of them, where streams come and go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch.fx import Node

from ..fx.carriers import carrier_between, outputs_over_carriers
from ..fx.dataflow import dim_of_size, is_activation_input, is_norm, shape_of
from ..fx.feature_dims import feature_dim_of
from ..fx.node_info import form_of, location_of
from ..residual import Carrier, Entry, Exit, ResidualAdd, ResidualChain
from .stream_walk import StreamWalk


class Joiner:
    """Joins the adds that a walk knows.

    Attributes:
        walk: knows the residual adds.
        nested: those that begin a stream inside another's branch.
        normed: those whose branch begins with a norm.
    """

    def __init__(self, walk: StreamWalk, nested: set[Node], normed: set[Node]) -> None:
        """Take what was found."""
        self.walk = walk
        self.nested = nested
        self.normed = normed

    def chains(self) -> Iterator[ResidualChain]:
        """Join the sites whose skip leads, over carriers, to the same head or to an earlier site."""
        members: dict[Node, list[ResidualAdd]] = {}
        root_of: dict[Node, Node] = {}
        heads: dict[Node, Node] = {}
        for add in sorted(self.walk.found, key=self.walk.order.__getitem__):
            previous, carriers = self.walk.previous(self.walk.found[add].skip)
            if add in self.nested:
                previous, carriers = self.walk.found[add].skip, []
            # Before the first site nothing is a stream yet: what carries the head in is the plain model's business.
            head = previous if previous in self.walk.found else self.walk.found[add].skip
            # A nested stream may begin at a value that is on the outer one, too.
            root = add if add in self.nested else root_of.get(head, head)
            root_of[add] = root
            heads.setdefault(root, head)
            if previous not in self.walk.found:
                carriers = []
            site = replace(
                self.walk.found[add],
                norm=self._norm_of(add, any(is_norm(carrier) for carrier in carriers)),
                carriers=tuple(self._carrier(carrier) for carrier in reversed(carriers)),
                exits=tuple(
                    Exit(position, tuple(self._carrier(value) for value in values))
                    for position, values in outputs_over_carriers(add)
                ),
            )
            members.setdefault(root, []).append(site)
        for root, sites in members.items():
            if len(sites) > 1 and sites[1].norm == "post":
                sites[0] = replace(sites[0], norm="post")
            head = heads[root]
            yield ResidualChain(tuple(sites), head, location_of(head), self._entry(head, sites[0]))

    def _entry(self, head: Node, first: ResidualAdd) -> Entry | None:
        """Return the input that a chain's head is, over carriers; None where the head is computed in this graph."""
        origin, carriers = self.walk.previous(head)
        # A nested stream begins with what its branch reads, wherever that comes from.
        if first.node in self.nested or not is_activation_input(origin):
            return None
        steps = tuple(self._carrier(carrier) for carrier in reversed(carriers))
        dim = first.feature_dim if shape_of(origin) == shape_of(first.node) else feature_dim_of(origin, origin)
        width = shape_of(origin)[dim] if shape_of(origin) else None
        if width != first.form.width:
            dim = dim_of_size(first.form.width, shape_of(origin))
        if dim < 0:
            return None
        inputs = [node for node in self.walk.order if node.op == "placeholder"]
        return Entry(origin, inputs.index(origin), steps, form_of(origin, dim), dim)

    def _carrier(self, node: Node) -> Carrier:
        source = self.walk.carried_from(node)
        assert source is not None
        return carrier_between(source, node, self.walk.order)

    def _norm_of(self, add: Node, normed: bool) -> str:
        """Tell where the block normalizes: on the stream since the last site, or on the way into the branch."""
        if normed:
            return "post"
        return "pre" if add in self.normed and self.walk.found[add].fork is not None else "none"
