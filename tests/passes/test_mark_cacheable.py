"""Which rewritten graphs the compilers' caches are allowed to take."""

import dataclasses
import inspect

import pytest
from mhc_compile.kernels import inlined
from mhc_compile.kernels.manifolds import MANIFOLDS
from mhc_compile.passes import mark_cacheable as passes
from mhc_compile.passes.mark_cacheable import mark_cacheable
from torch import fx


def _keep_somewhere_else(logits, iters, eps):
    return logits.clone()


def _calls(manifold):
    """Return a graph that calls one inlined operator with `manifold` and one that has none."""
    graph = fx.Graph()
    streams = graph.placeholder("streams")
    pre = graph.call_function(inlined.pre, (streams, manifold))
    graph.output(graph.call_function(inlined.head, (pre,)))
    return fx.GraphModule({}, graph)


def _marked(graph_module):
    return [node.meta.get("is_wrapped", False) for node in graph_module.graph.nodes if node.op == "call_function"]


def _attributes(graph_module):
    return {name for name in vars(graph_module) if name.startswith("_mhc")}


@pytest.mark.parametrize("manifold", ["sinkhorn", "none", "identity"])
def test_inlined_operators_are_marked_and_the_graph_is_keyed_by_their_source(manifold):
    admitted = mark_cacheable(_calls(manifold))

    assert _marked(admitted) == [True, True]
    assert _attributes(admitted) == {"_mhc_cache_key"}


def test_a_manifold_from_outside_keeps_its_graph_out_of_the_caches(monkeypatch):
    outside = dataclasses.replace(MANIFOLDS["none"], name="outside", project=_keep_somewhere_else)
    monkeypatch.setitem(MANIFOLDS, "outside", outside)

    admitted = mark_cacheable(_calls("outside"))

    assert _marked(admitted) == [False, False]
    assert not _attributes(admitted)


@pytest.mark.parametrize("changed", ["inlined", "reference", "anchored", "manifolds"])
def test_the_key_follows_the_source_of_every_file_an_inlined_operator_runs(monkeypatch, changed):
    read = inspect.getsource

    def edited(module):
        return read(module) + "# edited" * module.__name__.endswith(changed)

    def key():
        passes._source.cache_clear()
        return mark_cacheable(_calls("sinkhorn"))._mhc_cache_key

    before = key()
    monkeypatch.setattr(passes.inspect, "getsource", edited)
    after = key()
    passes._source.cache_clear()

    assert after != before
