"""Where a node comes from: source line, modules around it, the child that computed it, its feature dimension."""

from __future__ import annotations

import linecache
import math
import re

from torch.fx import Graph, Node

from ..residual import StreamForm
from .dataflow import holds_data, is_parameter_expression, op_name, shape_of, size_hint, sizes_of, tensor_of

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')

# Nodes between a branch's exit and its last mixing nodes; the walk for a name stops there.
_WIDEST_EXIT = 64

# Output features of these lie in dimension 1; of every other operation, in the last.
_CHANNELS_FIRST_NAMES = {"batch_norm", "group_norm", "instance_norm"}
_CHANNELS_FIRST_MARKS = ("conv", "pool1d", "pool2d", "pool3d")
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"}


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


def feature_dim_of(add: Node, branch: Node) -> int:
    """Return the dimension of an add's result that holds features, counted from the front.

    Follows the branch back to the operation that produced its features: convolutions and batch norms put them in
    dimension 1, linear maps and layer norms last; permutes in between move them. A factor or a term beside them has
    produced nothing.
    """
    tensor = tensor_of(add)
    assert tensor is not None
    rank = tensor.dim()
    moves: list[Node] = []
    node: Node | None = branch
    for _ in range(24):
        if node is None:
            break
        name = op_name(node)
        if name in _CHANNELS_FIRST_NAMES or any(mark in name for mark in _CHANNELS_FIRST_MARKS):
            return _move(1, moves, rank)
        if name in ("linear", "matmul", "layer_norm", "rms_norm", "addmm", "embedding"):
            produced = tensor_of(node)
            return _move(produced.dim() - 1 if produced is not None else rank - 1, moves, rank)
        if name in _RESHAPES:
            break
        if name in ("permute", "transpose", "movedim", "swapaxes"):
            moves.append(node)
        node = _features_before(node)
    return rank - 1


def _features_before(node: Node) -> Node | None:
    """Return the input that a node has its features from: of several, the one of its own shape."""
    inputs = [source for source in node.all_input_nodes if holds_data(source) and not is_parameter_expression(source)]
    whole = (source for source in inputs if shape_of(source) == shape_of(node))
    return next(whole, next(iter(inputs), None))


def _move(dim: int, moves: list[Node], rank: int) -> int:
    """Follow a dimension through permutes, the one nearest to the producer first."""
    for node in reversed(moves):
        arguments = list(node.args[1:])
        if len(arguments) == 1 and isinstance(arguments[0], list | tuple):
            arguments = list(arguments[0])
        dims = [int(str(argument)) % rank for argument in arguments if isinstance(argument, int)]
        if op_name(node) == "permute" and len(dims) == rank:
            dim = dims.index(dim)
        elif op_name(node) in ("transpose", "swapaxes") and len(dims) == 2 and dim in dims:
            dim = dims[1] if dim == dims[0] else dims[0]
    return dim % rank
