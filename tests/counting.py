"""An inner backend that counts what AOTAutograd makes of a graph: operators in each half, tensors kept between them."""

import itertools
from collections import Counter

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

_SERIAL = itertools.count()


def unused_name(stem):
    """Return a name for a backend: Dynamo keeps every one that was registered, and `id` comes back."""
    return f"{stem}_{next(_SERIAL)}"


class Counting:
    """Registers itself as a Dynamo backend, for the option `inner`; Dynamo offers no way to take one off again."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.name = unused_name("counting")
        compiler = aot_autograd(
            fw_compiler=self._keeping(self.forward),
            bw_compiler=self._keeping(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )
        torch._dynamo.register_backend(compiler, name=self.name)

    @staticmethod
    def _keeping(graphs):
        def compile_half(graph_module, inputs):
            graphs.append(graph_module)
            return make_boxed_func(graph_module.forward)

        return compile_half

    def counts(self, half):
        """Return how often each operator is called; an operator run under a stored random state counts as itself."""
        names = []
        for graph_module in getattr(self, half):
            for node in graph_module.graph.nodes:
                if node.op == "call_function":
                    inner = [value for value in node.args if isinstance(value, torch._ops.OpOverload)]
                    names.append(str((inner or [node.target])[0]))
        return Counter(names)

    def kept(self):
        """Return the shapes of the activations that the forward hands to the backward."""
        graph = self.backward[-1].graph
        held = [node for node in graph.nodes if node.op == "placeholder" and "tangents" not in node.name]
        parameters = {node.name for node in self.forward[-1].graph.nodes if node.op == "placeholder"}
        return [tuple(node.meta["val"].shape) for node in held if node.name not in parameters and "val" in node.meta]
