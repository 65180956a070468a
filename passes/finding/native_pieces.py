"""Pieces of a graph between streams and what is computed from them: cut out, and run in float64 on random numbers.

A piece is run as the model spells it, but for three things. Casts between floating-point dtypes are left out, so that
all of it runs in float64. It runs for six tokens, however many the traced call had. And it runs on the CPU, on numbers
of its own: the model's values are not read, so a model on the meta device is as good as any.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from ..fx.dataflow import CAST_NAMES, is_float, op_name, shape_of, tensor_of

TOKENS = 6
_EXPANDING = {"expand", "broadcast_to", "expand_as"}
_SIZED = {"view", "reshape", "view_as", "reshape_as", *_EXPANDING}
# Of what is read only the shape, where there is anything to read.
CONSTANTS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}
# What is one function on some numbers and another one on others, beside norms and maxima.
_CLAMPS = {"clamp", "clip", "clamp_min", "clamp_max", "hardtanh"}
_CHOICES = {"where", "minimum", "maximum", "fmin", "fmax"}


class PieceError(Exception):
    """A piece cannot be cut out or run; the message says why."""


@dataclass(frozen=True)
class Cut:
    """Streams [*, n, C] in a graph.

    Attributes:
        node: the value.
        tokens: the sizes of `*`, as expressions.
        n_streams: n.
        width: C.
    """

    node: Node
    tokens: tuple[Any, ...]
    n_streams: int
    width: int

    @property
    def flat(self) -> int:
        """n·C."""
        return self.n_streams * self.width

    def per_token(self, *sizes: int) -> tuple[Any, ...]:
        """Return the shape of a value with these sizes for each token."""
        return (*self.tokens, *sizes)


@dataclass
class Piece:
    """Nodes that can be run.

    Attributes:
        nodes: in graph order, leaves among them.
        leaves: the model's tensors that it reads, in graph order.
        cut: the streams that the piece speaks of.
        inputs: what it is given beside the model's tensors.
        untried: clamps that changed no number so far, in any run, and choices that always fell on one side.
    """

    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]
    cut: Cut
    inputs: tuple[Node, ...]
    untried: set[Node] = field(init=False)

    def __post_init__(self) -> None:
        """Note the clamps and choices."""
        self.untried = {node for node in self.moving if op_name(node) in _CLAMPS | _CHOICES}

    @property
    def moving(self) -> tuple[Node, ...]:
        """Its nodes but for the leaves."""
        return tuple(node for node in self.nodes if node not in self.leaves)

    def before(self, result: Node) -> tuple[Node, ...]:
        """Return what a value of the piece is computed from, with itself, in graph order."""
        stack, seen, inside = [result], {result}, set(self.moving)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in inside and source not in seen:
                    seen.add(source)
                    stack.append(source)
        return tuple(node for node in self.nodes if node in seen)

    def numbers(self, nodes: Iterable[Node] | None = None) -> list[float]:
        """Return the numbers that the piece's operations are given, once each."""
        found: list[float] = []

        def note(value: Any) -> Any:
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.append(float(value))
            return value

        for node in self.moving if nodes is None else nodes:
            map_aggregate((node.args, dict(node.kwargs)), note)
        return list(dict.fromkeys(found))

    def drawn(self, seed: int, weight: float, size: float) -> dict[Node, Tensor]:
        """Return float64 inputs and weights: random ones, a token of zeros and a tiny one among them."""
        generator = torch.Generator().manual_seed(seed)
        values: dict[Node, Tensor] = {}
        for node in (*self.inputs, *self.leaves):
            shape = self._small(node) if node in self.inputs else tuple(shape_of(node))
            if not all(isinstance(entry, int) for entry in shape):
                raise PieceError(f"the sizes of {node.name} are not static")
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if node in self.inputs:
                value = value * size
                rows = value.view(TOKENS, -1)
                rows[0], rows[1] = 0.0, rows[1] * 1e-3
            elif len(shape) > 1 and self.cut.flat in shape:
                value = value * (2 * weight / self.cut.flat**0.5)
            else:
                value = value * 0.7 * weight + 0.3
            values[node] = value
        return values

    def run(self, given: dict[Node, Tensor]) -> dict[Node, Any]:
        """Run the piece.

        Raises:
            PieceError: an operation cannot be run here.
        """
        values: dict[Node, Any] = dict(given)
        moving = set(self.inputs)
        for node in self.nodes:
            if node in values:
                continue
            if any(source in moving for source in node.all_input_nodes):
                moving.add(node)
            try:
                values[node] = self._evaluate(node, values, node in moving)
                if node in self.untried and self._falls_on_both_sides(node, values):
                    self.untried.discard(node)
            except PieceError:
                raise
            except Exception as error:
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise PieceError(f"{op_name(node)} could not be run in float64: {line}") from error
        return values

    def _falls_on_both_sides(self, node: Node, values: dict[Node, Any]) -> bool:
        """Return whether a clamp changed a number, or a choice took some of either of its operands."""
        first = values[node.all_input_nodes[0]]
        if op_name(node) in _CLAMPS:
            return not torch.equal(values[node], first)
        if op_name(node) == "where":
            return bool(first.any()) and not bool(first.all())
        return all(not torch.equal(values[node], values[source]) for source in node.all_input_nodes)

    def _evaluate(self, node: Node, values: dict[Node, Any], moving: bool) -> Any:
        name = op_name(node)
        source = values.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if name in CAST_NAMES and isinstance(source, Tensor) and is_float(node):
            return source
        if name in CONSTANTS and is_float(node):
            return torch.full(self._small(node), CONSTANTS[name], dtype=torch.float64)
        if name in _SIZED and isinstance(source, Tensor):
            sizes = self._small(node)
            if name in _EXPANDING and (moving or shape_of(node)[: len(self.cut.tokens)] == self.cut.tokens):
                return source.expand(sizes)
            if moving:
                return source.reshape(sizes)

        def mean(argument: Any) -> Any:
            if isinstance(argument, Node):
                return values[argument] if argument in values else _size_known(argument)
            if isinstance(argument, torch.dtype):
                return torch.float64 if argument.is_floating_point else argument
            return torch.device("cpu") if isinstance(argument, torch.device) else argument

        args, kwargs = map_aggregate(node.args, mean), map_aggregate(dict(node.kwargs), mean)
        if name == "rms_norm" and kwargs.get("eps", args[3] if len(args) > 3 else None) is None:
            tensor = tensor_of(node)
            assert tensor is not None
            args, kwargs = args[:3], {**kwargs, "eps": torch.finfo(tensor.dtype).eps}
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _small(self, node: Node) -> tuple[int, ...]:
        """Return the shape of a value for `TOKENS` tokens."""
        shape, tokens = shape_of(node), self.cut.tokens
        few = (*(1 for _ in tokens[2:]), *((2, TOKENS // 2) if len(tokens) > 1 else (TOKENS,)))
        if shape[: len(tokens)] == tokens:
            return (*few, *shape[len(tokens) :])
        if shape and shape[0] == math.prod(tokens):
            return (TOKENS, *shape[1:])
        return shape

    def fingerprint(self) -> str:
        """Return a text that is the same for pieces of the same operations over tensors of the same shapes."""
        numbers = {node: index for index, node in enumerate((*self.inputs, *self.nodes))}
        lines = [f"{self.cut.n_streams} {self.cut.width} {len(self.cut.tokens)}"]
        for node in (*self.inputs, *self.nodes):
            shape = shape_of(node)
            few = self._small(node) if node not in self.leaves else shape
            arguments: Any = ()
            if node not in self.inputs and node not in self.leaves:
                moving = op_name(node) in _SIZED
                arguments = map_aggregate(
                    (node.args[: 1 if moving else None], dict(node.kwargs)),
                    lambda value: f"%{numbers.get(value)}" if isinstance(value, Node) else value,
                )
            target = node.target if node not in self.leaves else ""
            lines.append(f"{node.op} {target} {arguments} {few} {_dtype(node)}")
        return "\n".join(lines)


def _size_known(node: Node) -> int:
    """Return a size that a graph computes, where it is the same for any input."""
    size = _example(node)
    if isinstance(size, torch.SymInt) and size.node.expr.is_Integer:
        return int(size.node.expr)
    if not isinstance(size, int):
        raise PieceError(f"{node.name} is read, which is neither the streams nor a parameter")
    return size


def _dtype(node: Node) -> Any:
    tensor = tensor_of(node)
    return tensor.dtype if tensor is not None else None


def _example(node: Node) -> Any:
    return node.meta.get("example_value")
