"""What a compiled model saves for its backward: counted from what AOTAutograd's partitioner returns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch.fx import GraphModule, Node

from .counting import unused_name


@dataclass(frozen=True)
class Partition:
    """One forward and backward graph, how many values the forward returns to its caller, and its static inputs."""

    forward: GraphModule
    backward: GraphModule
    outputs: int
    static: tuple[int, ...]

    @property
    def saved(self) -> list[Node]:
        """The computed tensors that the forward keeps for the backward: no input, no parameter."""
        (returned,) = next(node for node in self.forward.graph.nodes if node.op == "output").args
        values = [node for node in returned[self.outputs :] if isinstance(node, Node) and node.op != "placeholder"]
        return [node for node in values if isinstance(node.meta["val"], torch.Tensor)]

    @property
    def saved_bytes(self) -> int:
        return sum(node.meta["val"].numel() * node.meta["val"].element_size() for node in self.saved)

    def rerun(self) -> Counter[str]:
        """Count the operators that run in the forward and again, with the same name, in the backward."""
        names = {node.name for node in self.forward.graph.nodes if node.op == "call_function"}
        calls = [node for node in self.backward.graph.nodes if node.op == "call_function"]
        return Counter(str(node.target) for node in calls if node.name in names)

    def count(self, *operators: str) -> int:
        """Count calls of operators in the backward."""
        return sum(str(node.target) in operators for node in self.backward.graph.nodes)


class Recorder:
    """An inner backend like aot_eager that remembers how each graph was partitioned."""

    def __init__(self) -> None:
        self.partitions: list[Partition] = []
        self.name = unused_name("recorder")
        torch._dynamo.register_backend(self, name=self.name)

    def __call__(self, graph_module, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def compile_graph(graph_module, inputs):
            return make_boxed_func(graph_module.forward)

        backend = aot_autograd(fw_compiler=compile_graph, partition_fn=self._partition)
        return backend(graph_module, inputs)

    def _partition(self, joint, inputs, *, num_fwd_outputs, **keywords):
        forward, backward = min_cut_rematerialization_partition(
            joint, inputs, num_fwd_outputs=num_fwd_outputs, **keywords
        )
        static = tuple(keywords.get("static_lifetime_input_indices") or ())
        self.partitions.append(Partition(forward, backward, num_fwd_outputs, static))
        return forward, backward

    @property
    def last(self) -> Partition:
        return self.partitions[-1]
