"""Read the sentinels of a captured graph: which sites ran in it, and which inputs are their parameters. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from .fx.dataflow import is_sentinel
from .fx.node_info import module_path_of


@dataclass(frozen=True)
class SentinelCall:
    """One call of `mhc::sentinel` in a graph.

    Attributes:
        labels: the labels of the sites below their owner, each with phi, scale and bias in `inputs`.
        inputs: the placeholders handed to it, three for each label.
        tensors: the tensors of the model that these stand for; None where Dynamo does not tell.
        module_path: the modules around the call, outermost first, each with its `nn_module_stack` key.
    """

    labels: tuple[str, ...]
    inputs: tuple[Node, ...]
    tensors: tuple[Tensor | None, ...]
    module_path: tuple[tuple[str, str], ...]


def read_sentinels(opened: GraphModule) -> tuple[SentinelCall, ...]:
    """Return the sentinels of a graph whose regions are open, in graph order; those of closed bodies too."""
    return tuple(_calls(opened))


def _calls(graph_module: GraphModule) -> Iterator[SentinelCall]:
    for body in graph_module.children():
        if isinstance(body, GraphModule):
            yield from _calls(body)
    for node in graph_module.graph.nodes:
        if is_sentinel(node):
            inputs, labels, *_ = node.args
            yield SentinelCall(
                labels=tuple(str(label) for label in labels),
                inputs=tuple(inputs),
                tensors=tuple(_live(value) for value in inputs),
                module_path=module_path_of(node),
            )


def _live(node: Node) -> Tensor | None:
    """Return the tensor of the model that a placeholder of Dynamo's graph stands for."""
    argument = node.meta.get("grapharg")
    found = argument.example if argument is not None else None
    return found if isinstance(found, Tensor) else None
