"""Say which streams the forward stores and what the backward computes again.

Streams are stored every L_r sites of a chain. Most else that the rewrite added (the streams in between, layer inputs)
is replayed in the backward from the stored streams and the branches' outputs (arXiv 2512.24880, section 4.3). What the
model computes is left to AOTAutograd's partitioner, which never runs a matmul twice: so no branch is rerun. The first
streams of a chain are copies of its head, and are replayed from it.

Coefficients are always kept: post, res and the projection are some dozen floats a token, against n·C elements for the
streams. So each site that is replayed runs as two operators (`fusions.HALVES`): what measures its coefficients, which
is stored, and what takes them, mixes and collapses, which is run again. That one reads neither phi nor runs Sinkhorn: a
replay is one pass over the streams, (2n + 2)C for a joined boundary. Of an inlined site the projection is kept; its
derivative replays the rest of the coefficients anyway. The paper's kernels (`paper_pre`) are replayed whole.

The policy is written where AOTAutograd's partitioner looks for it, `node.meta["recompute"]`. Tracing copies that, with
`ac_graph_id`, from a torch IR node to every ATen node traced from it. Probed on torch 2.11, 2.13 and 2.15:

- A tuple-valued operator and its items are traced from one torch IR node, so they share one policy. Where a fused
  `post_pre` makes stored streams, its layer input is stored with them: (n+1)C instead of nC.
- MUST_SAVE forbids to compute a node again; it stores no node that the backward does not read. On an inlined operator
  (fusion="inductor") it would forbid that for every ATen node inside, and so store casts to float32. So there the last
  step of `post` becomes a node of its own. A `clone` behind it would not do: Inductor takes clones out of joint graphs.
- MUST_SAVE on a view does nothing.
- A MUST_RECOMPUTE node that reads one with a smaller `ac_graph_id` makes that one MUST_SAVE, whoever set it. With the
  largest id, the outputs of a user's checkpointed region are stored where the streams read them, and the region itself
  starts from replayed layer inputs.
- Random operators that are to be recomputed get their generator's state saved. None is marked here all the same.
"""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

from ..config import MHCConfig
from ..kernels import inlined, ops
from ..kernels.costs.traffic import recompute_interval
from ..kernels.fusions import HALVES
from ..kernels.reference import accumulation_dtype
from .fx.added_nodes import Role, role_of
from .fx.cache_key import add_to_cache_key
from .fx.dataflow import is_dropout, op_name
from .fx.graph_copy import copy_node, module_like

assert ops.OPERATORS, "importing the table registers torch.ops.mhc"

POLICY, REGION = "recompute", "ac_graph_id"

_REGION_ID = sys.maxsize
# Operators of which a site that is replayed runs the halves.
_HALVES = {
    getattr(torch.ops.mhc, name).default: tuple(ops.OPERATORS[part] for part in (name, *halves))
    for name, halves in HALVES.items()
}
_WRITES = {
    torch.ops.mhc.post.default, torch.ops.mhc.post_pre.default, torch.ops.mhc.post_pre_norm.default, inlined.post,
}  # fmt: skip
_KEEPS_STATISTICS = {"batch_norm", "instance_norm"}


@dataclass(frozen=True)
class _Place:
    """Where on a chain a value lies.

    Attributes:
        head: the node that expands the chain's head, or streams whose beginning lies elsewhere.
        sites: number of sites that the stream has passed.
    """

    head: Node
    sites: int


def annotate_recompute(graph_module: GraphModule, config: MHCConfig) -> GraphModule:
    """Return a copy of a rewritten graph whose added nodes say what is stored and what is recomputed.

    Args:
        graph_module: torch IR as `expand_streams` and `fuse_boundaries` leave it; it is not changed.
        config: `recompute` is "none", "auto", or the number of sites between stored streams; n_streams.

    Returns:
        the graph with a `CheckpointPolicy` on each added node that has none yet; `graph_module` itself for "none".
    """
    # Without a backward nothing is stored or replayed.
    if config.recompute == "none" or not torch.is_grad_enabled():
        return graph_module
    stored = _stored_streams(graph_module, config)
    graph = Graph()
    values: dict[Node, Node] = {}
    policies: list[tuple[str, str]] = []
    for node in graph_module.graph.nodes:
        policy = _policy(node, stored)
        if policy is CheckpointPolicy.MUST_SAVE and node.target is inlined.post:
            values[node] = _last_step_apart(graph, node, values.__getitem__)
        elif policy is CheckpointPolicy.MUST_RECOMPUTE and node.target in _HALVES:
            values[node] = _in_halves(graph, node, values.__getitem__)
        elif policy is CheckpointPolicy.MUST_RECOMPUTE and node.target is inlined.pre:
            values[node] = _projection_apart(graph, node, values.__getitem__)
        else:
            values[node] = copy_node(graph, node, values.__getitem__)
        if policy is not None:
            _annotate(values[node], policy)
            policies.append((values[node].name, policy.name))
    annotated = module_like(graph_module, graph)
    # Without this another policy over the same graph would be served this one's saved tensors.
    add_to_cache_key(annotated, "recompute", tuple(policies))
    return annotated


def _policy(node: Node, stored: set[Node]) -> CheckpointPolicy | None:
    role = role_of(node)
    # Streams that come in from another graph are a placeholder: stored by whoever made them.
    if role is None or node.op == "placeholder" or POLICY in node.meta or not _is_deterministic(node):
        return None
    # An inlined learned readout is many operators, and replayed for its own backward anyway.
    if node in stored or (role is Role.READOUT and node.target is not inlined.head):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.MUST_RECOMPUTE


def _is_deterministic(node: Node) -> bool:
    """Return whether a node gives the same again, and changes nothing: not a dropout, no running statistics."""
    return not is_dropout(node) and op_name(node) not in _KEEPS_STATISTICS


def _annotate(node: Node, policy: CheckpointPolicy) -> None:
    node.meta[POLICY] = policy
    node.meta[REGION] = _REGION_ID


def _emitter(graph: Graph, origin: Node, policy: CheckpointPolicy) -> Callable[..., Node]:
    """Return a function that adds a node which speaks for `origin`, with a policy and an example value."""

    def emit(target: Any, *arguments: Any, example_value: Any) -> Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        emitted = graph.create_node(kind, target, arguments)
        emitted.meta = {**origin.meta, "example_value": example_value}
        _annotate(emitted, policy)
        return emitted

    return emit


def _in_halves(graph: Graph, node: Node, argument: Callable[[Node], Node]) -> Node:
    """Emit an operator as its halves, the coefficients stored; the second one is returned, with `node`'s results."""
    whole, measure, collapse = _HALVES[node.target]
    arguments, count = map_arg(node.args, argument), len(whole.signature.tensors)
    made = dict(zip(whole.signature.results, node.meta["example_value"], strict=True))
    coefficients, rest = (tuple(made[name] for name in half.signature.results) for half in (measure, collapse))
    keep = _emitter(graph, node, CheckpointPolicy.MUST_SAVE)
    given = whole.signature.shared_with(measure.signature, arguments)
    measured = keep(getattr(torch.ops.mhc, measure.name).default, *given, example_value=coefficients)
    items = [keep(operator.getitem, measured, index, example_value=value) for index, value in enumerate(coefficients)]
    replay = _emitter(graph, node, CheckpointPolicy.MUST_RECOMPUTE)
    given = (*arguments[:count], *items, *arguments[count:])
    return replay(getattr(torch.ops.mhc, collapse.name).default, *given, example_value=rest)


def _projection_apart(graph: Graph, node: Node, argument: Callable[[Node], Node]) -> Node:
    """Emit an inlined `pre` whose projection has a node of its own, which is stored; `node`'s results are returned."""
    streams, phi, scale, bias, iters, norm_eps, eps, manifold, *flags = map_arg(node.args, argument)
    *made, projection = node.meta["example_value"]
    parts = projection[..., :-1], projection[..., -1:]
    replay = _emitter(graph, node, CheckpointPolicy.MUST_RECOMPUTE)
    # Anchored and transposed; an eps comes later.
    both = replay(inlined.products, streams, phi, manifold, *flags[:2], example_value=parts)
    pieces = [replay(operator.getitem, both, index, example_value=part) for index, part in enumerate(parts)]
    joined = _emitter(graph, node, CheckpointPolicy.MUST_SAVE)(torch.cat, pieces, -1, example_value=projection)
    constants = (iters, norm_eps, eps, manifold, *flags)
    return replay(inlined.pre_of, streams, scale, bias, joined, *constants, example_value=tuple(made))


def _last_step_apart(graph: Graph, node: Node, argument: Callable[[Node], Node]) -> Node:
    """Emit an inlined `post` whose last ATen operator has a node of its own, which is returned."""
    emit = _emitter(graph, node, CheckpointPolicy.MUST_RECOMPUTE)
    streams = node.meta["example_value"]
    wide = streams.to(accumulation_dtype(streams))
    terms = emit(inlined.post_terms, *map_arg(node.args, argument), example_value=(wide, wide))
    mixed, written = (emit(operator.getitem, terms, index, example_value=wide) for index in range(2))
    total = emit(operator.add, mixed, written, example_value=wide)
    # A cast to the same dtype leaves no ATen operator behind.
    return total if wide.dtype == streams.dtype else emit("to", total, streams.dtype, example_value=streams)


def _stored_streams(graph_module: GraphModule, config: MHCConfig) -> set[Node]:
    """Return the sites' outputs that are stored: every L_r-th of each chain, but for the last."""
    places = _places(graph_module)
    # An operator that a hand-written model calls has no place.
    writes = [node for node in graph_module.graph.nodes if node.target in _WRITES and node in places]
    lengths: Counter[Node] = Counter()
    for node in writes:
        lengths[places[node].head] = max(lengths[places[node].head], places[node].sites)
    stored = set()
    for node in writes:
        place = places[node]
        sites = lengths[place.head]
        if place.sites % _interval(node, config, sites) == 0 and place.sites < sites:
            stored.add(node)
    return stored


def _places(graph_module: GraphModule) -> dict[Node, _Place]:
    """Follow the streams from each head: how many sites each value on them lies behind."""
    places: dict[Node, _Place] = {}
    for node in graph_module.graph.nodes:
        role = role_of(node)
        if role is Role.HEAD:
            places[node] = _Place(node, 0)
        elif role is Role.STREAM:
            source = next((places[source] for source in node.all_input_nodes if source in places), None)
            if node.target in _WRITES:
                # Streams that come out of a higher-order region begin anew: inside, the region's own policy holds.
                before = source or _Place(node.all_input_nodes[0], 0)
                places[node] = _Place(before.head, before.sites + 1)
            elif source is not None:
                places[node] = source
    return places


def _interval(write: Node, config: MHCConfig, sites: int) -> int:
    if isinstance(config.recompute, int):
        return config.recompute
    # Not the option: a model that carries streams itself has as many as it likes.
    made = write.meta["example_value"]
    streams = made if isinstance(made, torch.Tensor) else made[0]
    return recompute_interval(sites, int(streams.shape[-2]))
