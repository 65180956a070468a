"""Tell what a partitioned graph saves for its backward and what it computes again there. Reads only.

Identical layers come from the same source lines, so rows that agree in source line, operator, shape and dtype are one
row with a count.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .fx.dataflow import output_of
from .fx.node_info import location_of

_MOST_ROWS = 24
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class MemoryRow:
    """Tensors that one operator makes on one source line.

    Attributes:
        count: how many.
        operator: such as "mhc.post".
        form: dtype and shape, such as "float32 [10, 4, 32]"; symbolic sizes by name.
        bytes: of all together; a symbolic size counts as it was in the traced call.
        location: "file:line  source text".
    """

    count: int
    operator: str
    form: str
    bytes: int
    location: str


@dataclass(frozen=True)
class MemoryDescription:
    """What one graph saves, and what its backward computes again; the largest rows first."""

    saved: tuple[MemoryRow, ...]
    recomputed: tuple[MemoryRow, ...]

    def __str__(self) -> str:
        """Return two tables."""
        parts = (("saved for the backward", self.saved), ("computed again in the backward", self.recomputed))
        return "\n".join(line for title, rows in parts for line in _table(title, rows))


def describe_memory(forward: GraphModule, backward: GraphModule, outputs: int) -> MemoryDescription:
    """Describe what passes from a forward graph to its backward.

    Args:
        forward: ATen, as AOTAutograd's partitioner returns it.
        backward: the same; an operator that both run bears the same name in both.
        outputs: how many of the forward's results its caller gets; the rest is saved.
    """
    (returned,) = output_of(forward).args
    assert isinstance(returned, list | tuple)
    # Parameters and inputs live on anyway, and so do views of them.
    seen = {_storage(value) for node in forward.graph.nodes if node.op == "placeholder" for value in _tensors(node)}
    saved = _own_memory((node for node in returned[outputs:] if isinstance(node, Node)), seen)
    again = {node.name for node in backward.graph.nodes if node.op == "call_function"}
    recomputed = (node for node in forward.graph.nodes if node.op == "call_function" and node.name in again)
    return MemoryDescription(_rows(saved), _rows(_own_memory(recomputed, seen)))


def _own_memory(nodes: Iterable[Node], seen: set[Any]) -> list[tuple[Node, Tensor]]:
    """Return the tensors of the nodes whose memory is not in `seen`, each memory once, and add it there."""
    found = []
    for node in nodes:
        for value in _tensors(node):
            if _storage(value) not in seen:
                seen.add(_storage(value))
                found.append((node, value))
    return found


def _rows(tensors: list[tuple[Node, Tensor]]) -> tuple[MemoryRow, ...]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for node, value in tensors:
        location = location_of(node)
        # What the compiler itself added has no source line; its names differ from layer to layer.
        key = (_operator(node), _form(value), "" if location == node.name else location)
        groups.setdefault(key, []).append(_bytes(value))
    rows = [MemoryRow(len(sizes), name, form, sum(sizes), location) for (name, form, location), sizes in groups.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def _tensors(node: Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [entry for entry in values if isinstance(entry, Tensor)]


def _storage(value: Tensor) -> Any:
    return torch.multiprocessing.reductions.StorageWeakRef(value.untyped_storage())


def _operator(node: Node) -> str:
    while node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    return str(node.target).removesuffix(".default")


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(str(size) for size in value.shape)}]"


def _bytes(value: Tensor) -> int:
    # The hint of a symbolic size is what it was in the traced call; asking for its value would add a guard.
    sizes = [size if isinstance(size, int) else size.node.hint or 0 for size in value.shape]
    return math.prod(sizes) * value.element_size()


def _table(title: str, rows: tuple[MemoryRow, ...]) -> list[str]:
    count, total = sum(row.count for row in rows), sum(row.bytes for row in rows)
    lines = [f"{title}: {count} tensors, {_readable(total)}"]
    shown, rest = rows[:_MOST_ROWS], rows[_MOST_ROWS:]
    cells = [(f"{row.count} x", row.form, row.operator, _readable(row.bytes)) for row in shown]
    widths = [max((len(cell[column]) for cell in cells), default=0) for column in range(4)]
    for row, (times, form, name, size) in zip(shown, cells, strict=True):
        left = f"  {times:>{widths[0]}} {form:<{widths[1]}}  {size:>{widths[3]}}  {name:<{widths[2]}}"
        lines.append(f"{left}  {row.location}".rstrip())
    if rest:
        lines.append(f"  … and {sum(row.count for row in rest)} more, {_readable(sum(row.bytes for row in rest))}")
    return lines


def _readable(size: int) -> str:
    power = min(int(math.log(size, 1024)), len(_UNITS) - 1) if size else 0
    return f"{size / 1024**power:.{1 if power else 0}f} {_UNITS[power]}"
