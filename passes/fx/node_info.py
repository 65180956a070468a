"""Where a node comes from: source line, modules around it, the child that computed it, its form."""

from __future__ import annotations

import linecache
import math
import re

from torch.fx import Graph, Node

from ..residual import StreamForm
from .dataflow import holds_data, size_hint, sizes_of, tensor_of

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')

# Nodes between a branch's exit and its last mixing nodes; the walk for a name stops there.
_WIDEST_EXIT = 64


def location_of(node: Node) -> str:
    """Return "file:line  source text" of the innermost frame, or the node's name if it has no trace."""
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    frames = list(_FRAME.finditer(trace))
    if not frames:
        return node.name
    file, line = frames[-1]["file"], int(frames[-1]["line"])
    text = linecache.getline(file, line).strip()
    return f"{_short(file)}:{line}  {text}".rstrip()


def _short(file: str) -> str:
    """Keep the file and its folder."""
    return "/".join(file.split("/")[-2:])


def module_path_of(node: Node) -> tuple[tuple[str, str], ...]:
    """Return ((key, path), …) of the modules around a node, outermost first.

    torch 2.13 keys the stack by `str(id(module))`, older versions by a mangled path; the path is the user's own
    expression, such as "L['self'].model.layers.0".
    """
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((str(key), str(entry[0])) for key, entry in stack.items())


def branch_children(branch: Node, owner: tuple[tuple[str, str], ...], mixing: set[Node]) -> tuple[tuple[str, str], ...]:
    """Return the owner's children that the branch comes from: those of the first mixing nodes behind it.

    Walking to the mixing nodes gives the same answer in train and eval mode, and behind dropout, casts and norms.
    """
    depth = len(owner)
    children: dict[str, str] = {}
    stack, seen = [branch], {branch}
    while stack and len(seen) < _WIDEST_EXIT:
        node = stack.pop()
        if node in mixing:
            path = module_path_of(node)
            if len(path) > depth and path[:depth] == owner:
                children.setdefault(*path[depth])
            continue
        for source in reversed(node.all_input_nodes):
            if source not in seen and holds_data(source) and source.op != "placeholder":
                seen.add(source)
                stack.append(source)
    return tuple(children.items())


def called_children(graph: Graph, owner: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return the children of a module that run in a graph, in order."""
    paths = (module_path_of(node) for node in graph.nodes)
    below = (path[len(owner)] for path in paths if len(path) > len(owner) and path[: len(owner)] == owner)
    return tuple(dict.fromkeys(below))


def form_of(node: Node, feature_dim: int) -> StreamForm:
    """Return the form of a value whose features lie in a dimension, without a guard on any of its symbols."""
    tensor = tensor_of(node)
    assert tensor is not None
    sizes = tuple(size if isinstance(size, int) else str(size) for size in sizes_of(tensor))
    hints = [size_hint(size) for size in tensor.shape]
    width = hints.pop(feature_dim)
    return StreamForm(sizes, math.prod(hints), width, tensor.dtype, tensor.device)
