"""Walk back along a residual stream: from a value to what it was before its carriers, and before its site."""

from __future__ import annotations

from torch.fx import Node

from ..fx.carriers import carried_from
from ..fx.dataflow import is_float, shape_of, sliced_dims
from ..fx.feature_dims import feature_dim_of
from ..residual import ResidualAdd


class StreamWalk:
    """Walks over what is known of the streams so far.

    Attributes:
        order: the position of every node.
        found: the residual adds.
    """

    def __init__(self, order: dict[Node, int]) -> None:
        """Know no residual add yet."""
        self.order = order
        self.found: dict[Node, ResidualAdd] = {}

    def carried_from(self, node: Node) -> Node | None:
        """Return the stream value that a carrier was computed from; a slice of tokens is one, of features none."""
        dims = sliced_dims(node)
        source = node.args[0] if node.args else None
        if dims is None or not is_float(node) or not isinstance(source, Node):
            return carried_from(node)
        origin: Node | None = source
        while origin is not None and origin not in self.found and shape_of(origin) == shape_of(source):
            origin = carried_from(origin)
        known = self.found.get(origin) if origin is not None else None
        features = known.feature_dim if known is not None else feature_dim_of(node, node)
        return source if features not in dims else None

    def previous(self, skip: Node) -> tuple[Node, list[Node]]:
        """Return what the stream was before its carriers, and the carriers passed, nearest first."""
        carriers: list[Node] = []
        value = skip
        while value not in self.found:
            source = self.carried_from(value)
            if source is None:
                break
            carriers.append(value)
            value = source
        return value, carriers
