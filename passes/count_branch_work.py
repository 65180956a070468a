"""Count what a captured graph computes and keeps: flops of its products, bytes that autograd saves.

The graph runs on its own example values, which are fake: shapes only, no arithmetic, no memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

from ..errors import MHCError
from .fx.dataflow import size_hint


@dataclass(frozen=True)
class BranchWork:
    """What a model does at the sizes it was traced with, beside what mHC adds.

    Attributes:
        flops: of matrix products, convolutions and attention, forward; causal attention counts half.
        saved_bytes: of the tensors that eager autograd saves for the backward, each storage once, without the
            graph's inputs and parameters. Attention counts as the fused kernels keep it: its inputs, its output and
            one float32 a row. A compiled graph saves less: it recomputes elementwise functions.
    """

    flops: int
    saved_bytes: int

    def __add__(self, other: BranchWork) -> BranchWork:
        """Return the work of both."""
        return BranchWork(self.flops + other.flops, self.saved_bytes + other.saved_bytes)


@dataclass(frozen=True)
class PieceWork:
    """What a piece of a model does: the nodes from one cut of its graph to the next.

    Attributes:
        work: of its own nodes.
        parameters: elements of each parameter that it reads, by name.
    """

    work: BranchWork
    parameters: Mapping[str, int]


def count_branch_work(graph_module: GraphModule) -> BranchWork:
    """Count a captured graph.

    Args:
        graph_module: Dynamo's graph; its placeholders hold example values. It is not changed.

    Raises:
        MHCError: the graph cannot run on shapes alone.
    """
    counter = _counted(graph_module, frozenset())
    return BranchWork(counter.flops, counter.saved_bytes)


def count_pieces(graph_module: GraphModule, ends: Sequence[Node]) -> tuple[PieceWork, ...]:
    """Count a graph piece by piece.

    Args:
        graph_module: as for `count_branch_work`.
        ends: the last node of each piece but the last one, in graph order.

    Raises:
        MHCError: the graph cannot run on shapes alone.
    """
    totals = _counted(graph_module, frozenset(ends)).totals
    work = [
        BranchWork(flops - before_flops, saved - before_saved)
        for (before_flops, before_saved), (flops, saved) in itertools.pairwise([(0, 0), *totals])
    ]
    read: list[dict[str, int]] = [{} for _ in work]
    piece = 0
    for node in graph_module.graph.nodes:
        for value in node.all_input_nodes:
            held = value.meta.get("example_value")
            if value.op == "placeholder" and isinstance(held, Parameter):
                read[piece][value.name] = held.numel()
        piece += node in ends
    return tuple(PieceWork(one, names) for one, names in zip(work, read, strict=True))


def _counted(graph_module: GraphModule, ends: frozenset[Node]) -> _Counter:
    inputs = [node.meta.get("example_value") for node in graph_module.graph.find_nodes(op="placeholder")]
    counter = _Counter(graph_module, inputs, ends)
    try:
        counter.count(inputs)
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MHCError(
            f"the model's own flops and activations could not be counted, because its graph does not run on shapes "
            f"alone: {cause}. explain without a prediction works."
        ) from error
    return counter


def _grouped_flops(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """Flops of one product a group: rows [rows, K] times [groups, K, N], each row in one group; or [groups, …] both."""
    shared = left[0] if len(left) > len(right) else 1
    return 2 * left.numel() * right[-1] // shared


# The experts of a mixture, which the counter of PyTorch does not know.
_EXPERTS = {torch.ops.aten._grouped_mm: _grouped_flops}


class _Counter(Interpreter):
    """Runs a graph node by node and counts."""

    def __init__(self, graph_module: GraphModule, inputs: list[Any], ends: frozenset[Node]) -> None:
        super().__init__(graph_module)
        self.ends = ends
        # Flops and saved bytes so far, behind each end and behind the graph.
        self.totals: list[tuple[int, int]] = []
        self.fake_mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
        self.inputs = {_storage(value) for value in inputs if isinstance(value, Tensor)}
        # Storages by address; the tensors are held so that no address is used twice.
        self.held: dict[int, Tensor] = {}
        self.attention_flops = 0
        self.row_bytes = 0
        self.paused = False
        self.counted = FlopCounterMode(display=False, custom_mapping=_EXPERTS)

    @property
    def flops(self) -> int:
        return self.counted.get_total_flops() + self.attention_flops

    @property
    def saved_bytes(self) -> int:
        return sum(size_hint(tensor.untyped_storage().nbytes()) for tensor in self.held.values()) + self.row_bytes

    def count(self, inputs: list[Any]) -> None:
        with ExitStack() as stack:
            if self.fake_mode is not None:
                stack.enter_context(self.fake_mode)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._hold, lambda tensor: tensor))
            stack.enter_context(self.counted)
            self.run(*inputs)
        self.totals.append((self.flops, self.saved_bytes))

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node in self.ends:
            self.totals.append((self.flops, self.saved_bytes))
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is not F.scaled_dot_product_attention:
            return super().call_function(target, args, kwargs)
        # Without a GPU it runs as plain products, which save the scores, and count the masked half.
        with self._uncounted():
            result = super().call_function(target, args, kwargs)
        self._count_attention(result, *args, **kwargs)
        return result

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        before = self.counted.get_total_flops()
        self.paused = True
        try:
            yield
        finally:
            self.paused = False
            self.attention_flops -= self.counted.get_total_flops() - before

    def _count_attention(
        self,
        result: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> None:
        rows = size_hint(query.numel()) // size_hint(query.shape[-1])
        products = 2 * rows * size_hint(key.shape[-2]) * (size_hint(query.shape[-1]) + size_hint(value.shape[-1]))
        self.attention_flops += products // 2 if is_causal else products
        if result.requires_grad:
            for tensor in (query, key, value, result):
                self._hold(tensor)
            self.row_bytes += 4 * rows

    def _hold(self, tensor: Tensor) -> Tensor:
        if not self.paused and _storage(tensor) not in self.inputs:
            self.held.setdefault(_storage(tensor), tensor)
        return tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
