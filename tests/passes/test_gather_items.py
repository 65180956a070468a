"""Items of a tuple stand right behind the operator that returns it."""

import operator

import torch
from mhc_compile.passes.gather_items import gather_items
from torch.fx import Graph, GraphModule


def test_items_move_up_and_nothing_else():
    graph = Graph()
    values = graph.placeholder("values")
    pair = graph.call_function(torch.chunk, (values, 2))
    pair.meta["example_value"] = (torch.zeros(1), torch.zeros(1))
    between = graph.call_function(torch.neg, (values,))
    second = graph.call_function(operator.getitem, (pair, 1))
    first = graph.call_function(operator.getitem, (pair, 0))
    graph.output((first, second, between))
    module = gather_items(GraphModule({}, graph))
    assert [node.name for node in module.graph.nodes] == ["values", "chunk", "getitem", "getitem_1", "neg", "output"]
    assert module(torch.tensor([1.0, 2.0]))[1] == 2.0
