"""Check the invariants of a rewritten graph. A failure is a bug of mhc-compile, never of the model."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch.fx import GraphModule, Node

from ..errors import GraphInvariantError
from ..kernels import inlined
from .fx.dataflow import output_of, sizes_of, tensor_of

_POST_PRES = {torch.ops.mhc.post_pre.default, torch.ops.mhc.post_pre_norm.default}
_POSTS = {torch.ops.mhc.post.default, inlined.post}


def verify(before: GraphModule, after: GraphModule, n_streams: int, leaving: int = 0) -> None:
    """Check a rewritten graph against the one it came from.

    - The outputs have the shapes and dtypes of the plain graph's; behind them stand `leaving` values of n streams, and
      no others leave the graph.
    - Every streams value has rank, shape and dtype as `post` declares.
    - Every placeholder has a source, if Dynamo gave sources, and every other node an example value where the plain
      graph had them.

    Raises:
        GraphInvariantError: an invariant is broken; the message names the node.
    """
    after.graph.lint()
    # Streams that the model carries itself are as many as it likes.
    counts = {n_streams, *(_streams_of(node) for node in before.graph.nodes if node.target in _POSTS)}
    _check_outputs(before, after, n_streams, leaving)
    inputs = [node for node in before.graph.nodes if node.op == "placeholder"]
    had_sources = any(hasattr(node, "_dynamo_source") for node in inputs)
    for node in after.graph.nodes:
        if node.op == "placeholder" and had_sources and not hasattr(node, "_dynamo_source"):
            _fail(node, "lost its _dynamo_source")
        if node.target in _POSTS:
            _check_post(node, counts, tensor_of(node))
        elif node.target in _POST_PRES:
            _check_post(node, counts, node.meta["example_value"][0])


def _check_outputs(before: GraphModule, after: GraphModule, n_streams: int, leaving: int) -> None:
    plain, rewritten = _outputs(before), _outputs(after)
    if len(plain) + leaving != len(rewritten):
        expected = f"{len(plain)} and {leaving} of streams" if leaving else str(len(plain))
        raise GraphInvariantError(f"the rewritten graph returns {len(rewritten)} values instead of {expected}")
    for streams in rewritten[len(plain) :]:
        held = tensor_of(streams)
        if held is None or sizes_of(held)[-2] != n_streams or not held.is_contiguous():
            _fail(streams, f"leaves the graph for another, but not as {n_streams} contiguous streams")
    for old, new in zip(plain, rewritten, strict=False):
        wanted, got = tensor_of(old), tensor_of(new)
        if wanted is None or got is None:
            continue
        if sizes_of(wanted) != sizes_of(got) or wanted.dtype != got.dtype:
            _fail(new, f"leaves the graph as {_form(got)}, the plain value was {_form(wanted)}")


def _outputs(graph_module: GraphModule) -> list[Node]:
    output = output_of(graph_module)
    found: list[Node] = []
    torch.fx.node.map_arg(output.args, found.append)
    return found


def _streams_of(post: Node) -> int:
    made = tensor_of(post)
    return 0 if made is None else int(sizes_of(made)[-2])


def _check_post(node: Node, counts: set[int], after: torch.Tensor | None) -> None:
    streams, branch = node.args[0], node.args[1]
    before, written = tensor_of(streams), tensor_of(branch)
    if before is None or after is None or written is None:
        _fail(node, "has no example value")
    if sizes_of(before) != sizes_of(after) or before.dtype != after.dtype:
        _fail(node, f"turns streams of {_form(before)} into {_form(after)}")
    if sizes_of(after)[-2] not in counts:
        _fail(node, f"holds {after.shape[-2]} streams instead of {' or '.join(map(str, sorted(counts)))}")
    if sizes_of(after)[:-2] + sizes_of(after)[-1:] != sizes_of(written):
        _fail(node, f"writes a branch of {_form(written)} into streams of {_form(after)}")


def _form(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(str(size) for size in tensor.shape)}"


def _fail(node: Node, what: str) -> NoReturn:
    raise GraphInvariantError(
        f"{node.format_node() or node.name}: {what}. This is a bug in mhc-compile; TORCH_LOGS=mhc_passes shows the "
        "graph, and the option sites= can leave the block out meanwhile."
    )
