"""Why an add that is no residual add is there: one reason for each cause, told by dataflow.

Each rule looks at a bounded neighborhood of the add, so that naming the causes of all adds is linear in the nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from torch.fx import Node

from ..fx.carriers import carried_from
from ..fx.dataflow import (
    CAST_NAMES,
    PRODUCT_NAMES,
    VIEW_NAMES,
    behind_views,
    data_inputs,
    is_activation,
    is_dropout,
    is_float,
    is_linear_map,
    is_norm,
    is_parameter_expression,
    op_name,
    operands,
    shape_of,
)
from ..residual import Reason
from .operand_kinds import Kind

# Steps that one walk takes at most: an expert's whole inside lies within the longest.
_STEP, _NEAR, _FAR = 24, 48, 600

_REARRANGEMENTS = {
    *VIEW_NAMES, *CAST_NAMES, "getitem", "cat", "concat", "stack", "neg", "chunk", "split", "unbind", "roll", "flip",
    "narrow", "select", "repeat_interleave", "slice", "pad", "zeros_like", "setitem",
}  # fmt: skip
_SHIFTS = {"pad", "roll", "setitem"}
_DECAYS = {"exp", "exp2", "expm1"}
_ROUTING = {
    "topk", "scatter", "scatter_", "scatter_add", "index_add", "index_add_", "one_hot", "argsort", "sort", "nonzero",
    "histc", "bincount", "_grouped_mm", "grouped_mm",
}  # fmt: skip
_MASKING = {
    "where", "masked_fill", "masked_fill_", "add", "iadd", "add_", "sub", "clamp", "mul", "imul", "div",
    "truediv", "max", "amax", "getattr", "cat", "concat",
}  # fmt: skip
_SUMS = {"sum", "matmul", "einsum", "bmm"}


class Causes:
    """Tells the causes of one graph's adds from the kinds of its values and its mixing nodes."""

    def __init__(
        self, order: dict[Node, int], mixing: set[Node], kinds: dict[Node, Kind], softmaxes: set[Node]
    ) -> None:
        """Take what the search has worked out of the whole graph."""
        self.order = order
        self.mixing = mixing
        self.kinds = kinds
        self.softmaxes = softmaxes

    def of_unequal(self, add: Node, left: Node, right: Node) -> Reason:
        """Return the cause of an add whose operands differ in shape, or that has no features."""
        if len(shape_of(add)) < 2 and shape_of(left) == shape_of(right):
            return Reason.NO_FEATURES
        small = left if _elements(left) <= _elements(right) else right
        if is_parameter_expression(small) and _is_one_for_all_tokens(small, add):
            return Reason.BIAS
        if self.goes_to_softmax(add):
            return Reason.ATTENTION_SCORES
        if min(self.kinds[left], self.kinds[right]) < Kind.ACTIVATION:
            return Reason.EMBEDDING
        return Reason.BROADCAST

    def of_unmixed(self, add: Node, left: Node, right: Node) -> Reason:
        """Return the cause of an add one of whose operands is computed from the other, yet without mixing."""
        for value, other in ((left, right), (right, left)):
            if self._is_straight_through(value, other):
                return Reason.STRAIGHT_THROUGH
        blend = self._of_blend(left, right)
        if blend is not None:
            return blend
        if any(op_name(node) == "unfold" for node in self._near(add, _NEAR)):
            return Reason.WINDOW_SUM
        if any(self._sums_products(operand) for operand in (left, right)):
            return Reason.RECURRENCE
        return Reason.NO_MIXING

    def of_independent(self, add: Node, left: Node, right: Node) -> Reason:
        """Return the cause of an add neither of whose operands is an ancestor of the other, over carriers."""
        if self.goes_to_softmax(add):
            return Reason.ATTENTION_SCORES
        if min(self.kinds[left], self.kinds[right]) < Kind.ACTIVATION:
            return Reason.EMBEDDING
        blend = self._of_blend(left, right)
        if blend is not None:
            return blend
        shared = self._shared_source(left, right)
        if shared is not None:
            # The experts' shares may be what both have in common: then the routing lies just behind it.
            inside = shared[1] | shared[2] | set(self._near(shared[0], _STEP))
            if any(op_name(node) in _ROUTING for node in inside):
                return Reason.EXPERTS
        for value, other in ((left, right), (right, left)):
            if self._is_feed_through(value, other):
                return Reason.FEED_THROUGH
        if self._decays(left) or self._decays(right):
            return Reason.RECURRENCE
        if shared is None:
            return Reason.INDEPENDENT
        mixed = [bool(side & self.mixing) for side in shared[1:]]
        if not any(mixed):
            return Reason.PARTS
        if all(mixed) and all(self._is_linear(node) for node in shared[1] | shared[2]):
            return Reason.LINEAR_MAPS
        return Reason.PARALLEL

    def goes_to_softmax(self, add: Node) -> bool:
        """Return whether a value, over masks, scales and views, goes only into a softmax that weights other values."""
        weights: list[Node] = []
        stack, seen, is_mask = [add], {add}, False
        while stack:
            value = stack.pop()
            for user in value.users:
                name = op_name(user)
                if user in self.softmaxes:
                    weights.append(user)
                elif name == "scaled_dot_product_attention" and value in (*user.args[3:], user.kwargs.get("attn_mask")):
                    is_mask = True
                elif name in _MASKING | VIEW_NAMES | CAST_NAMES | {"getitem"} or is_dropout(user):
                    if user not in seen and len(seen) < _NEAR:
                        seen.add(user)
                        stack.append(user)
                else:
                    return False
        return is_mask or (bool(weights) and all(self._reaches_mixing(softmax) for softmax in weights))

    def _reaches_mixing(self, node: Node) -> bool:
        stack, seen = [node], {node}
        while stack and len(seen) < _NEAR:
            for user in stack.pop().users:
                if user in self.mixing:
                    return True
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
        return False

    def _is_straight_through(self, value: Node, other: Node) -> bool:
        """Return whether one operand is a detached difference of values the other belongs to: y - x.detach() + x."""
        difference = behind_views(other, "getitem")
        if op_name(difference) != "sub" or "detach" not in {op_name(node) for node in self._near(other, _STEP)}:
            return False
        return any(_origin(source) is _origin(value) for source in difference.all_input_nodes)

    def _of_blend(self, left: Node, right: Node) -> Reason | None:
        """Return the cause of a sum of one value and its rearrangement, each times a factor."""
        origins: list[set[Node]] = []
        either = False
        for operand in (left, right):
            product = behind_views(operand, "getitem")
            factors = [factor for factor in operands(product) if isinstance(factor, Node)]
            if op_name(product) not in PRODUCT_NAMES or len(factors) != 2:
                return None
            fixed, moved = sorted(factors, key=self.kinds.__getitem__)
            # Angles may come from positions that are an input: then both factors are candidates.
            origins.append(self._rearranged_from(moved))
            if self.kinds[fixed] is self.kinds[moved]:
                origins[-1] |= self._rearranged_from(fixed)
                either = True
        shared = origins[0] & origins[1]
        if not shared:
            return None
        source = max(self.order[node] for node in shared)
        moves = {op_name(node) for node in origins[0] | origins[1] if self.order[node] > source}
        if either and not moves - VIEW_NAMES - CAST_NAMES:
            return None
        return Reason.TOKEN_SHIFT if moves & _SHIFTS else Reason.ROTATION

    def _rearranged_from(self, value: Node) -> set[Node]:
        """Return a value and all that it is a rearrangement of."""
        seen, stack = {value}, [value]
        while stack and len(seen) < _NEAR:
            node = stack.pop()
            if op_name(node) in _REARRANGEMENTS:
                for source in node.all_input_nodes:
                    if source not in seen and self.kinds[source] is not Kind.FIXED:
                        seen.add(source)
                        stack.append(source)
        return seen

    def _is_feed_through(self, value: Node, other: Node) -> bool:
        """Return whether one operand is a value times a weight, and the other is computed from that value."""
        product = behind_views(value, "getitem")
        if op_name(product) not in PRODUCT_NAMES:
            return False
        factors = [factor for factor in operands(product) if isinstance(factor, Node)]
        fed = [factor for factor in factors if self.kinds[factor] is Kind.ACTIVATION]
        if len(factors) != 2 or len(fed) != 1:
            return False
        origins = self._rearranged_from(fed[0]) | {_origin(fed[0])}
        floor = min(origins, key=self.order.__getitem__)
        return any(node in origins for node in self._near(other, _FAR, floor))

    def _decays(self, operand: Node) -> bool:
        """Return whether a value was multiplied or contracted with an exponential: a state that decays.

        What lies behind a learned map decays inside a layer, not in this sum.
        """
        multiplied = False
        for node in self._near(operand, _NEAR, unlearned=True):
            multiplied |= op_name(node) in PRODUCT_NAMES | _SUMS
            if op_name(node) in _DECAYS:
                return multiplied
        return False

    def _sums_products(self, operand: Node) -> bool:
        behind = behind_views(operand, "getitem")
        return op_name(behind) in _SUMS and any(
            op_name(behind_views(source, "getitem")) in PRODUCT_NAMES for source in behind.all_input_nodes
        )

    def _is_linear(self, node: Node) -> bool:
        name = op_name(node)
        if node in self.mixing:
            return is_linear_map(node) and (self._is_learned(node) or "pool" in op_name(node))
        if name in PRODUCT_NAMES:
            return sum(self.kinds[source] is Kind.ACTIVATION for source in node.all_input_nodes) <= 1
        return not is_activation(node) and "softmax" not in name

    def _is_learned(self, node: Node) -> bool:
        return any(self.kinds[source] is Kind.FIXED for source in node.all_input_nodes)

    def _near(self, node: Node, limit: int, floor: Node | None = None, unlearned: bool = False) -> Iterator[Node]:
        """Yield a value and the nearest of what it was computed from, over no more than `limit` nodes.

        With `unlearned`, go no further back than maps with learned weights.
        """
        lowest = self.order[floor] if floor is not None else 0
        seen, queue = {node}, [node]
        for current in queue:
            yield current
            if unlearned and current in self.mixing and self._is_learned(current):
                continue
            for source in data_inputs(current):
                inside = source not in seen and self.order[source] >= lowest and source.op != "placeholder"
                if inside and len(seen) < limit:
                    seen.add(source)
                    queue.append(source)

    def _shared_source(self, left: Node, right: Node) -> tuple[Node, set[Node], set[Node]] | None:
        """Return the nearest activation that both operands come from, and what lies between it and each."""
        sides = {left: 1}
        sides[right] = sides.get(right, 0) | 2
        queue = [(-self.order[node], node.name, node) for node in sides]
        heapq.heapify(queue)
        between: tuple[set[Node], set[Node]] = (set(), set())
        while queue and len(sides) < _FAR:
            _, _, node = heapq.heappop(queue)
            bits = sides[node]
            if bits == 3 and is_float(node):
                return node, between[0], between[1]
            for side in (1, 2):
                if bits & side:
                    between[side - 1].add(node)
            for source in data_inputs(node):
                if self.kinds[source] is not Kind.FIXED:
                    if source not in sides:
                        heapq.heappush(queue, (-self.order[source], source.name, source))
                    sides[source] = sides.get(source, 0) | bits
        return None


def _origin(value: Node) -> Node:
    """Return what a value is up to carriers."""
    node = value
    while (source := carried_from(node)) is not None and not is_norm(node):
        node = source
    return node


def _elements(node: Node) -> tuple[int, int]:
    """Order operands by how much of the sum they fill: by the dimensions that are not 1, then by rank."""
    sizes = shape_of(node)
    return sum(size != 1 for size in sizes), len(sizes)


def _is_one_for_all_tokens(operand: Node, add: Node) -> bool:
    """Return whether an operand is the same along some dimension of the sum behind its first, the batch."""
    sizes, wanted = shape_of(operand), shape_of(add)
    padded = (1,) * (len(wanted) - len(sizes)) + sizes
    repeated = any(size == 1 != whole for size, whole in zip(padded[1:], wanted[1:], strict=True))
    return repeated or sum(size != 1 for size in sizes) <= 1
