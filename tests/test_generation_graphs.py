"""How many graphs generation compiles: as many as the plain model, and none for further lengths of prompts."""

import pytest
import torch

import mhc_compile

from .counting import unused_name
from .models import llama, token_ids


@pytest.fixture
def compiled():
    """Name of an inner backend, and a list that grows by one for every graph that it is given."""
    graphs = []

    def inner(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    name = unused_name("graphs")
    torch._dynamo.register_backend(inner, name=name)
    return name, graphs


def counts(model, graphs):
    """Return how many graphs there are after prompts of 5 and of 9 tokens, each continued with a dynamic cache."""
    found = []
    for length in (5, 9):
        model.generate(token_ids(1, 12)[:, :length], max_new_tokens=3, do_sample=False)
        found.append(len(graphs))
    return found


@pytest.mark.parametrize(("dynamic", "number"), [(None, [3, 4]), (True, [2, 2])])
def test_generation_compiles_no_more_graphs_than_the_plain_model(compiled, dynamic, number):
    name, graphs = compiled
    plain = llama(num_hidden_layers=1)
    plain.compile(backend=name, dynamic=dynamic)
    wanted = counts(plain, graphs)
    graphs.clear()
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1)
    mhc_compile.attach(model, input_ids=token_ids())
    model.compile(backend="mhc", options={"inner": name}, dynamic=dynamic)
    assert counts(model, graphs) == wanted == number
