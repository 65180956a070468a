"""The search takes as many steps a node in a deep model as in a shallow one."""

import collections

import pytest
import torch
from mhc_compile.passes import find_residuals
from mhc_compile.passes.finding import lookalikes, other_adds
from mhc_compile.passes.normalize import normalize
from torch import nn

from ..models import Stack, features


class ParallelStack(Stack):
    """The same stream, read by two branches at once: an add tree a block."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(inputs)
        for block in self.blocks:
            normed = block.norm1(hidden)
            hidden = hidden + block.mixer(normed) + torch.tanh(block.mlp(normed))
        return self.readout(hidden)


class PostNormStack(Stack):
    """A norm on the stream behind every add."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(inputs)
        for block in self.blocks:
            hidden = block.norm1(hidden + block.mixer(hidden))
            hidden = block.norm2(hidden + torch.tanh(block.mlp(hidden)))
        return self.readout(hidden)


class ActivatedStack(Stack):
    """An activation on the stream behind every add."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(inputs)
        for block in self.blocks:
            hidden = torch.relu(hidden + block.mixer(hidden))
            hidden = torch.relu(hidden + torch.tanh(block.mlp(hidden)))
        return self.readout(hidden)


def _steps_per_node(monkeypatch, model: nn.Module) -> float:
    graphs, steps = [], collections.Counter()

    def collect(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=collect)(features())
    normalized = normalize(graphs[0])
    plain = find_residuals.data_inputs

    def counted(node):
        steps["taken"] += 1
        return plain(node)

    with monkeypatch.context() as patch:
        for module in (find_residuals, other_adds, lookalikes):
            if hasattr(module, "data_inputs"):
                patch.setattr(module, "data_inputs", counted)
        found = find_residuals.find_residuals(normalized)
    assert found.chains
    return steps["taken"] / len(normalized.graph.nodes)


@pytest.mark.parametrize("build", [Stack, ActivatedStack, PostNormStack, ParallelStack])
def test_steps_a_node_do_not_grow_with_depth(monkeypatch, build):
    shallow, deep = (_steps_per_node(monkeypatch, build(depth)) for depth in (8, 32))
    assert deep <= 1.1 * shallow
