"""Cut pieces out of a graph: what computes a value from the streams and from the model's own tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node

from ..fx.dataflow import CAST_NAMES, VIEW_NAMES, data_inputs, is_float, is_size, is_static_input, op_name, shape_of
from .native_pieces import CONSTANTS, Cut, Piece, PieceError

# Nodes of a piece; a DeepSeek-V4 site with 20 iterations has 120.
_MOST_NODES = 1500
# Values behind the streams that are looked at for a collapse or a mixing matrix.
_MOST_FORWARD = 600
# Values before a sum that are looked at for the streams that it reads, and how many of these are tried.
_MOST_BACKWARD, _MOST_SOURCES = 400, 2

# A part of a parameter is read as the parameter: the operators take rows where they lie.
_PARTS = VIEW_NAMES | CAST_NAMES | {
    "getitem", "select", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "unbind",
}  # fmt: skip
# What makes one value of the model's one for each token.
_SPREADING = {"expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"}

# What returns its first operand, or a view of it.
_ALIASES = _PARTS | {"expand", "expand_as", "broadcast_to", "diagonal", "unfold", "real", "view_as_complex"}
_IN_PLACE = {"setitem", "iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "ifloordiv", "register_hook"}


def _changed_in_place(graph: Graph, order: dict[Node, int]) -> dict[Node, int]:
    """Return the values whose memory an operation writes to, or whose gradient a hook changes, and its last place."""
    found: dict[Node, int] = {}
    for node in graph.nodes:
        name = op_name(node)
        if name not in _IN_PLACE and (not name.endswith("_") or name.endswith("__")) and "out" not in node.kwargs:
            continue
        stack = [source for source in (*node.args[:1], node.kwargs.get("out")) if isinstance(source, Node)]
        seen: set[Node] = set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            found[value] = order[node]
            if op_name(value) in _ALIASES and isinstance(value.args[0], Node):
                stack.append(value.args[0])
            stack += [user for user in value.users if op_name(user) in _ALIASES and user.args[0] is value]
    return found


class Surroundings:
    """What pieces are cut from.

    Attributes:
        order: places of the graph's nodes.
        fixed: nodes computed from parameters, buffers and constants alone; True where one of the model's tensors is
            read.
        changed: values that are changed in place, under any name, and the place of the last change: what is read of
            them depends on when.
        leaves: the values that pieces begin with beside the streams: the model's tensors, and what it computes from
            them alone, such as a weight that is the sum of two.
    """

    def __init__(self, graph: Graph) -> None:
        """Look at every node once."""
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.changed = _changed_in_place(graph, self.order)
        self.fixed: dict[Node, bool] = {}
        self.leaves: set[Node] = set()
        spread: set[Node] = set()
        for node in graph.nodes:
            if node.op == "get_attr" or is_static_input(node):
                self.fixed[node] = True
                self.leaves.add(node)
            elif node.op in ("call_function", "call_method"):
                inputs = [source for source in data_inputs(node) if not is_size(source)]
                if all(source in self.fixed for source in inputs):
                    self.fixed[node] = any(self.fixed[source] for source in inputs)
                    if op_name(node) in _SPREADING or any(source in spread for source in inputs):
                        spread.add(node)
                    elif self.fixed[node] and is_float(node) and op_name(node) not in _PARTS:
                        self.leaves.add(node)

    def piece(self, targets: Iterable[Node], cut: Cut, inputs: tuple[Node, ...]) -> Piece:
        """Return what computes `targets` from `inputs` and the model's tensors.

        Raises:
            PieceError: something else is read, or the piece is too large.
        """
        ends = set(inputs)
        seen: set[Node] = set()
        stack = [node for node in targets if node not in ends]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if len(seen) > _MOST_NODES:
                raise PieceError("more than the streams and the model's parameters is read")
            if node in self.leaves or op_name(node) in CONSTANTS:
                continue
            if node.op not in ("call_function", "call_method"):
                raise PieceError(f"{node.name} is read, which is neither the streams nor a parameter")
            stack += [source for source in data_inputs(node) if not is_size(source) and source not in ends]
        given = {*inputs, *(node for node in seen if node in self.leaves)}
        for node in sorted(self.changed.keys() & (seen | given), key=self.order.__getitem__):
            readers = [self.order[user] for user in node.users if user in seen]
            if node not in given or self.changed[node] > min(readers, default=len(self.order)):
                raise PieceError(f"{node.name} is changed in place")
        nodes = tuple(sorted(seen, key=self.order.__getitem__))
        return Piece(nodes, tuple(node for node in nodes if node in self.leaves), cut, inputs)

    def computed_from(self, cut: Cut) -> list[Node]:
        """Return what is computed from streams and the model's tensors, both, in graph order."""
        weighted = {cut.node: False}
        stack = list(cut.node.users)
        found: list[Node] = []
        seen = set(stack)
        while stack and len(seen) < _MOST_FORWARD:
            node = min(stack, key=self.order.__getitem__)
            stack.remove(node)
            inputs = [source for source in data_inputs(node) if not is_size(source)]
            if node.op not in ("call_function", "call_method") or not all(
                source in weighted or source in self.fixed for source in inputs
            ):
                continue
            weighted[node] = any(weighted.get(source) or self.fixed.get(source) for source in inputs)
            if weighted[node]:
                found.append(node)
            for user in node.users:
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
        return found

    def mixings(self, mixed: Node, cut: Cut) -> list[tuple[Cut, Node]]:
        """Return what a value [*, n, C] may be mixed from, streams and a matrix [*, n, n] each, the nearest first."""
        before = self._before(mixed)
        streams = [
            node
            for node in before
            if shape_of(node) == cut.per_token(cut.n_streams, cut.width)
            and is_float(node)
            and op_name(node) not in CAST_NAMES
        ]
        found: list[tuple[Cut, Node]] = []
        behind = set(before)
        for node in streams[:_MOST_SOURCES]:
            source = Cut(node, cut.tokens, cut.n_streams, cut.width)
            matrices = [
                matrix
                for matrix in self.computed_from(source)
                if matrix in behind and shape_of(matrix) == cut.per_token(cut.n_streams, cut.n_streams)
            ]
            found += [(source, matrix) for matrix in matrices[: -_MOST_SOURCES - 1 : -1]]
        return found

    def _before(self, node: Node) -> list[Node]:
        """Return what a value is computed from, the nearest first."""
        found: list[Node] = []
        stack, seen = [node], {node}
        while stack and len(seen) < _MOST_BACKWARD:
            near = max(stack, key=self.order.__getitem__)
            stack.remove(near)
            for source in data_inputs(near):
                if source not in seen and source not in self.fixed and not is_size(source):
                    seen.add(source)
                    stack.append(source)
            if near is not node:
                found.append(near)
        return found
