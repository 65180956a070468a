"""Sizes are read where they are used, and nothing else is copied."""

import operator

import torch
from mhc_compile.passes.localize_sizes import localize_sizes
from torch.fx import Graph, GraphModule


def test_each_user_reads_the_size_itself():
    graph = Graph()
    values = graph.placeholder("values")
    size = graph.call_method("size", (values, 0))
    size.meta["example_value"] = 2
    double = graph.call_function(operator.mul, (size, 2))
    double.meta["example_value"] = 4
    first = graph.call_method("expand", (values, double, 2))
    second = graph.call_method("reshape", (values, size, 2))
    graph.output((first, second))
    module = localize_sizes(GraphModule({}, graph))
    targets = [node.target for node in module.graph.nodes]
    assert targets == ["values", "size", operator.mul, "expand", "size", "reshape", "output"]
    assert [value.shape for value in module(torch.ones(1, 2))] == [(2, 2), (1, 2)]
