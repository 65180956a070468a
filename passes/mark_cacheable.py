"""Let the compilers' caches take a graph that calls inlined operators.

AOTAutogradCache refuses a graph with Python functions that are not torch's own, since it does not know what they
compute; `fusion="inductor"` would then compile anew in every process. It takes what bears a mark, and asks of whoever
sets the mark that the function's text be part of the key. It does not add that text itself (torch 2.11 to 2.15).
"""

from __future__ import annotations

import functools
import hashlib
import inspect

from torch.fx import GraphModule, Node

from ..kernels import anchored, inlined, manifolds, reference
from .fx.cache_key import add_to_cache_key


def mark_cacheable(graph_module: GraphModule) -> GraphModule:
    """Mark the calls of inlined operators in a rewritten graph and its bodies, and key the graph by their source.

    A graph that projects onto a manifold registered from outside is left to be compiled every time: what its function
    computes, nobody here can tell.
    """
    calls = [
        node
        for module in graph_module.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if node.target in inlined.FUNCTIONS
    ]
    if calls and all(_is_ours(node) for node in calls):
        for node in calls:
            node.meta |= {"is_wrapped": True, "user_cache_hash": _source()}
        add_to_cache_key(graph_module, "inlined", _source())
    return graph_module


def _is_ours(node: Node) -> bool:
    names = [argument for argument in node.args if isinstance(argument, str)]
    return all(manifolds.is_built_in(name) for name in names)


@functools.cache
def _source() -> str:
    text = "".join(inspect.getsource(module) for module in (inlined, reference, anchored, manifolds))
    return hashlib.sha256(text.encode()).hexdigest()
