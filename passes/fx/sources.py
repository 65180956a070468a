"""Where Dynamo read a graph's inputs from: the sources that it hangs on placeholders."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import GraphModule, Node


def input_sources(graph_module: GraphModule) -> list[Any]:
    """Return the sources of a graph's inputs, where Dynamo tells."""
    sources = (getattr(node, "_dynamo_source", None) for node in graph_module.graph.nodes)
    return [source for source in sources if source is not None]


def name_of_source(source: Any) -> str:
    """Return a source as Dynamo writes it: "L['self']._modules['lm_head']._parameters['weight']"."""
    # A method in some versions of torch, a property in others.
    return str(source.name() if callable(source.name) else source.name)


def source_name(node: Node) -> str | None:
    """Return where Dynamo read a placeholder from; None where it does not tell."""
    source = getattr(node, "_dynamo_source", None)
    return None if source is None else name_of_source(source)


def path_of(node: Node) -> str:
    """Return a parameter's path from the graph's root: "lm_head.weight"; else the node's name."""
    names = re.findall(r"\['?([^'\]]+)'?\]", source_name(node) or "")
    return ".".join(names[1:]) or node.name


def streams_examples(graph_module: GraphModule) -> list[Any]:
    """Return example values of the streams that a rewritten graph takes beside Dynamo's own inputs, in order."""
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return [node.meta["example_value"] for node in inputs if str(node.target).startswith("mhc_streams_")]
