"""Find the residual adds of a graph, by dataflow alone. Reads only.

A residual add is an add whose one operand, the *skip*, is (up to carriers) an ancestor of the other, the *branch*,
where every way from the skip to the branch mixes or at least normalizes, and one mixes. No name of a module, class or
file is looked at.

Cost: for each add, one walk back from the branch to the skip, and bounded ones to name a cause. Walks overlap only
where residuals are nested, so the whole is linear in the number of nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from torch.fx import GraphModule, Node

from .finding.joined_chains import Joiner
from .finding.lookalikes import veto, writes_streams
from .finding.operand_kinds import operand_kinds
from .finding.other_adds import Causes
from .finding.stream_walk import StreamWalk
from .fx.carriers import scales_features
from .fx.dataflow import (
    Reach,
    bodies,
    data_inputs,
    dim_of_size,
    is_activation,
    is_add,
    is_float,
    is_higher_order,
    is_in_place_add,
    is_linear_map,
    is_norm,
    is_softmax,
    mixes,
    operands,
    selected_from,
    shape_of,
    tensor_of,
)
from .fx.feature_dims import feature_dim_of
from .fx.node_info import branch_children, called_children, form_of, location_of, module_path_of
from .residual import Findings, Reason, Rejection, ResidualAdd

# Sums of two values that may each be a stream.
_COUPLED = {Reason.INDEPENDENT, Reason.PARALLEL, Reason.REVERSIBLE}


def find_residuals(graph_module: GraphModule) -> Findings:
    """Return the residual chains of a normalized graph, and every float add that is none, with the reason."""
    return _Finder(graph_module).run()


class _Finder:
    """The state of one search: node order, and what has been found so far."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        self.mixing = {node for node in self.order if mixes(node, graph_module)}
        kinds = operand_kinds(graph_module.graph, self.mixing)
        softmaxes = {node for node in self.order if is_softmax(node, graph_module)}
        self.causes = Causes(self.order, self.mixing, kinds, softmaxes)
        self.walk = StreamWalk(self.order)
        self.found = self.walk.found
        self.rejected: dict[Node, Rejection] = {}
        self.independent: set[Node] = set()
        self.tables: set[Node] = set()
        self.native: set[Node] = set()
        self.normed: set[Node] = set()
        self.nested: set[Node] = set()
        self.scaled: set[Node] = set()

    def run(self) -> Findings:
        shortcuts: list[tuple[Node, Node, Node]] = []
        for node in self.order:
            if is_higher_order(node):
                self._note_bodies(node)
            in_place = is_in_place_add(node)
            if not (is_add(node) or in_place) or not is_float(node):
                continue
            left, right = operands(node)
            if not isinstance(left, Node) or not isinstance(right, Node) or not (is_float(left) and is_float(right)):
                self._reject(node, Reason.NUMBER)
            elif self._writes_streams(left, right):
                self.native.add(node)
                self._reject(node, Reason.NATIVE_STREAMS)
            elif not _same_shape(node, left, right):
                native = self._is_on_native(left)
                self._reject(node, Reason.NATIVE_STREAMS if native else self.causes.of_unequal(node, left, right))
            elif in_place:
                self._reject(node, Reason.IN_PLACE_ALIAS)
            elif (shortcut := self._consider(node, left, right)) is not None:
                shortcuts.append((node, *shortcut))
        self._drop_branch_local()
        self._drop_feed_through()
        self._keep_useful_shortcuts(shortcuts)
        self._drop_native()
        return Findings(
            chains=tuple(Joiner(self.walk, self.nested, self.normed).chains()), rejections=tuple(self.rejected.values())
        )

    def _reject(self, node: Node, reason: Reason, detail: str = "") -> None:
        if reason in _COUPLED:
            self.independent.add(node)
        if reason is Reason.EMBEDDING:
            self.tables.add(node)
        self.rejected[node] = Rejection(node.name, location_of(node), reason, detail)

    def _note_bodies(self, node: Node) -> None:
        for body in bodies(node, self.graph_module):
            inner = find_residuals(body)
            for chain in inner.chains:
                for add in chain.adds:
                    self.rejected[add.node] = Rejection(add.node.name, add.location, Reason.INSIDE_REGION, node.name)

    def _consider(self, node: Node, left: Node, right: Node) -> tuple[Node, Node] | None:
        """Record a residual add, or reject it; return (skip, branch) of what may be a projection shortcut."""
        reason = Reason.INDEPENDENT
        for skip, branch in ((left, right), (right, left)):
            trunk = list(self._trunk(skip))
            reach = self._reaching(branch, min(self.order[value] for value in trunk))
            fork = next((value for value in trunk if reach.get(value)), None)
            if fork is None:
                continue
            if not reach[fork] & Reach.MIXED:
                reason = self.causes.of_unmixed(node, left, right)
            elif reach[fork] & Reach.PLAIN:
                reason = self._cause_of_plain_way(node, fork, branch)
            elif (vetoed := self._veto(node, fork, branch, reach)) is not None:
                reason = vetoed
            else:
                carriers = set(trunk[: trunk.index(fork)])
                readers = frozenset(user for user in fork.users if user in reach and user not in carriers)
                if any(is_norm(value) for value in reach if self.order[value] > self.order[fork]):
                    self.normed.add(node)
                if any(scales_features(value) for value in carriers):
                    self.scaled.add(node)
                self._record(node, skip, branch, fork, readers)
                return None
        if reason is Reason.INDEPENDENT:
            reason = self.causes.of_independent(node, left, right)
            for skip, branch in ((left, right), (right, left)):
                if self._is_projection_beside(skip, branch):
                    self.independent.add(node)
                    return skip, branch
        if reason is Reason.NATIVE_STREAMS:
            self.native.add(node)
        self._reject(node, reason)
        return None

    def _veto(self, node: Node, fork: Node, branch: Node, reach: dict[Node, Reach]) -> Reason | None:
        # Where the other operand is no stream, an embedding that a layer reads may be one.
        tables = self.tables if self.walk.previous(branch)[0] in self.found else set()
        return veto(node, fork, branch, reach, self.causes, self.independent, tables)

    def _cause_of_plain_way(self, node: Node, fork: Node, branch: Node) -> Reason:
        """Return why a value that reaches the other operand unmixed, too, is no skip."""
        cause = self.causes.of_unmixed(node, fork, branch)
        if cause is Reason.STRAIGHT_THROUGH:
            return cause
        value: Node | None = branch
        while value is not None and self.order[value] > self.order[fork]:
            value = self.found[value].skip if value in self.found else self.walk.carried_from(value)
        return Reason.REINJECTION if value is fork else Reason.GATE

    def _writes_streams(self, left: Node, right: Node) -> bool:
        return writes_streams(left, right, self.causes) or writes_streams(right, left, self.causes)

    def _record(
        self, node: Node, skip: Node, branch: Node, fork: Node | None, readers: frozenset[Node] = frozenset()
    ) -> None:
        feature_dim = feature_dim_of(node, branch)
        sizes = shape_of(node)
        width = sizes[feature_dim]
        if not isinstance(width, int):
            self._reject(node, Reason.DYNAMIC_WIDTH)
            return
        fork_dim = feature_dim
        if fork is not None and shape_of(fork) != sizes:
            fork_dim = dim_of_size(width, shape_of(fork))
            if fork_dim < 0:
                # A view that splits the features: the branch then reads the collapsed stream.
                fork, readers, fork_dim = None, frozenset(), feature_dim
        path = module_path_of(node)
        children = branch_children(branch, path, self.mixing)
        self.found[node] = ResidualAdd(
            node=node,
            position=self.order[node],
            form=form_of(node, feature_dim),
            skip=skip,
            branch=branch,
            fork=fork,
            readers=readers,
            feature_dim=feature_dim,
            fork_dim=fork_dim,
            carriers=(),
            norm="none",
            module_path=path,
            children=children,
            hosts=children or called_children(self.graph_module.graph, path),
            location=location_of(node),
        )

    def _trunk(self, skip: Node) -> Iterator[Node]:
        """Yield the stream values behind `skip`: over carriers, and over an add that nothing else reads.

        The second lets x + a(x) + b(x) be two sites on one stream although b reads x. It ends at a norm or an
        activation: a branch reads what is behind it, and going on would walk the whole stream for each add.
        """
        value: Node | None = skip
        in_tree = True
        while value is not None:
            yield value
            if value in self.found:
                value = self.found[value].skip if in_tree and len(value.users) == 1 else None
            else:
                in_tree &= not (is_norm(value) or is_activation(value))
                value = self.walk.carried_from(value)

    def _reaching(self, branch: Node, floor: int) -> dict[Node, Reach]:
        """For each node from position `floor` on, tell how it reaches `branch`: an or of `Reach` bits.

        Walks backwards, latest node first, so that a node's bits are complete when it is its turn.
        """
        reach = {branch: Reach.PLAIN}
        queue = [(-self.order[branch], branch.name, branch)]
        while queue:
            _, _, node = heapq.heappop(queue)
            bits = reach[node]
            if node in self.mixing:
                bits = Reach.MIXED
            elif bits & Reach.PLAIN and is_norm(node):
                bits = (bits & ~Reach.PLAIN) | Reach.NORMED
            if tensor_of(node) is not None and not is_float(node):
                bits &= ~Reach.PLAIN
            for source in data_inputs(node):
                if self.order[source] < floor:
                    continue
                if source not in reach:
                    heapq.heappush(queue, (-self.order[source], source.name, source))
                reach[source] = reach.get(source, Reach(0)) | bits
        return reach

    def _is_projection_beside(self, skip: Node, branch: Node) -> bool:
        """Return whether `skip` is a linear projection of a value that `branch` computes something deeper from.

        LoRA's base(x) + lora(x) and parallel convolutions are none: no nonlinearity stands in the branch.
        """
        source, projected = skip, False
        line = [skip]
        while True:
            if source in self.mixing and is_linear_map(source):
                projected = True
                step = next((value for value in data_inputs(source) if is_float(value)), None)
            else:
                step = None if is_activation(source) else self.walk.carried_from(source)
            if step is None or step in self.found:
                line += [step] if step is not None else []
                break
            line.append(step)
            source = step
        if not projected:
            return False
        reach = self._reaching(branch, min(self.order[value] for value in line))
        shared = next((value for value in line if reach.get(value, Reach(0)) & Reach.MIXED), None)
        return shared is not None and any(
            is_activation(node) for node in reach if self.order[node] > self.order[shared] and node is not shared
        )

    def _keep_useful_shortcuts(self, shortcuts: list[tuple[Node, Node, Node]]) -> None:
        """Keep a projection shortcut where another site continues its stream; it opens a chain."""
        continued = {self.walk.previous(site.skip)[0] for site in self.found.values()}
        for node, skip, branch in reversed(shortcuts):
            if node in continued:
                self._record(node, skip, branch, fork=None)
            else:
                self._reject(node, Reason.SHORTCUT_UNUSED)

    def _drop_branch_local(self) -> None:
        """Reject an add that feeds only the branch of another add with the same skip (Zamba's h + T(h)).

        Where a carrier stands between, as in T(h) + norm(h), or another site goes on from it, as in a group of residual
        blocks with a skip around, the add begins a stream inside the branch.
        """
        continued = {self.walk.previous(site.skip)[0] for site in self.found.values()}
        by_stream: dict[Node, list[ResidualAdd]] = {}
        for site in self.found.values():
            by_stream.setdefault(self.walk.previous(site.skip)[0], []).append(site)
        for sharers in by_stream.values():
            for inner in sharers:
                outer = next((site for site in sharers if site is not inner and self._feeds_only(inner, site)), None)
                if outer is not None and outer.skip is inner.skip and inner.node not in continued:
                    del self.found[inner.node]
                    self._reject(inner.node, Reason.BRANCH_LOCAL)
                elif outer is not None:
                    self.nested.add(inner.node)

    def _drop_feed_through(self) -> None:
        """Reject an add whose skip is scaled feature by feature and that joins no other site.

        On a stream of several sites that is a scaled skip; alone, it is what a state-space layer adds to its scan.
        """
        continued = {self.walk.previous(site.skip)[0] for site in self.found.values()}
        for add in sorted(self.scaled & self.found.keys(), key=self.order.__getitem__, reverse=True):
            goes_on = self.walk.previous(self.found[add].skip)[0] in self.found and add not in self.nested
            if add not in continued and not goes_on:
                del self.found[add]
                self.nested.discard(add)
                self._reject(add, Reason.FEED_THROUGH)

    def _drop_native(self) -> None:
        """Reject the sites on a stream that is one of several the model carries itself."""
        for add in [add for add in self.found if self._is_on_native(add)]:
            del self.found[add]
            self._reject(add, Reason.NATIVE_STREAMS)

    def _is_on_native(self, value: Node) -> bool:
        """Return whether a value is one of several streams that the model carries itself, or a slice of them."""
        source: Node | None = value if self.native else None
        while source is not None and source not in self.native:
            if source in self.found:
                source = self.found[source].skip
            else:
                source = self.walk.carried_from(source) or selected_from(source)
        return source is not None

    def _feeds_only(self, inner: ResidualAdd, outer: ResidualAdd) -> bool:
        """Return whether every way onward from one add ends in another's branch."""
        add, branch = inner.node, outer.branch
        limit = self.order[branch]
        if self.order[add] > limit:
            return False
        stack, seen = [add], {add}
        while stack:
            for user in stack.pop().users:
                if user is branch:
                    continue
                if self.order.get(user, limit + 1) > limit:
                    return False
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
        return True


def _same_shape(node: Node, left: Node, right: Node) -> bool:
    return shape_of(node) == shape_of(left) == shape_of(right) and len(shape_of(node)) > 1
