"""Rewrite residual chains into n parallel streams. Searches nothing: the chains say where.

At a chain's head the value is expanded to n equal streams. Each site computes its coefficients and its layer input from
the streams (`pre`), the branch reads the layer input, and the branch's output is written back (`post`). Carriers act on
each stream alone. Whoever else reads a stream value reads the streams collapsed to one.

Streams are held anchored: stream 0 and the others' differences from it (`kernels.anchored`). A linear carrier acts on
these alike; any other acts on the streams themselves, which are made for it and anchored again.

What is new belongs to the region that is open where it is computed, so that every region stays one run of nodes, and
runs in the grad mode of the value that it speaks for: a frozen branch under `no_grad` is not where its streams begin.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..config import MHCConfig
from ..kernels import inlined, ops, reference
from ..kernels.anchored import anchor, equal_streams, release
from ..kernels.fusions import CANDIDATES, FUSIONS, Fusion
from .bound_chains import BoundChain, BoundSite, Parameters
from .fx.added_nodes import Role, mark
from .fx.carriers import is_linear, is_training_batch_norm, keeps_layout
from .fx.dataflow import is_dropout, output_values, tensor_of
from .fx.graph_copy import copy_node, module_like
from .fx.mesh import enter_mesh
from .fx.regions import Region, regions_of
from .fx.stream_writer import Streams, StreamWriter, sizes_at
from .nested_chains import sites_around
from .residual import Carrier, ResidualAdd


@dataclass(frozen=True)
class _Lowering:
    """What a site's operators are in the graph."""

    pre: Callable[..., Any]
    post: Callable[..., Any]
    head: Callable[..., Any]


assert ops.OPERATORS, "importing the table registers torch.ops.mhc"


def _lowering(fusion: Fusion) -> _Lowering:
    def found(name: str) -> Callable[..., Any]:
        return getattr(inlined, name) if fusion.inlined else getattr(torch.ops.mhc, name).default

    return _Lowering(found(fusion.pre), found(fusion.post), found(fusion.head))


LOWERINGS = {name: _lowering(fusion) for name, fusion in FUSIONS.items()}
# What "auto" chooses from differs only in what `fuse_boundaries` joins afterwards.
LOWERINGS["auto"] = LOWERINGS[CANDIDATES[0]]


def expand_streams(graph_module: GraphModule, chains: tuple[BoundChain, ...], config: MHCConfig) -> GraphModule:
    """Return a new graph in which the chains are streams; `graph_module` is left as it is.

    The new graph takes the streams of every chain with an `entry` as further inputs, in the order of `chains`, and
    returns those of every one of `exits` as further outputs: contiguous and anchored, [*, n, C].
    """
    return _Expander(graph_module, chains, config).run()


class _Expander(StreamWriter):
    """The state of one rewrite: the new graph, and what each old value has become."""

    def __init__(self, graph_module: GraphModule, chains: tuple[BoundChain, ...], config: MHCConfig) -> None:
        super().__init__(graph_module, config.n_streams)
        self.graph_module = graph_module
        self.chains = chains
        self.config = config
        self.lowering = LOWERINGS[config.fusion]
        self.plain: dict[Node, Node] = {}
        self.entered: dict[Node, Node] = {}
        self.streams: dict[Node, Streams] = {}
        self.coefficients: dict[Node, tuple[Node, Node, Node]] = {}
        sites = [site for chain in chains for site in chain.sites]
        self.site_at = {site.add.node: site for site in sites}
        self.carrier_at: dict[Node, Carrier] = {}
        self.absorbed: set[Node] = set()
        self.reads: dict[tuple[Node, Node], list[BoundSite]] = {}
        steps = [chain.entry.carriers for chain in chains if chain.entry is not None]
        steps += [site.add.carriers for site in sites]
        steps += [leaving.carriers for chain in chains for leaving in chain.exits]
        for carrier in (carrier for carriers in steps for carrier in carriers):
            self.carrier_at[carrier.node] = carrier
            self.absorbed |= carrier.absorbed
        sites.sort(key=lambda site: site.add.position)
        for site in sites:
            for reader in site.add.readers:
                # Of two sites that share a reader, the first in the graph feeds it.
                if site.parameters is not None and site.add.fork is not None:
                    self.reads.setdefault((reader, site.add.fork), []).append(site)
        self.around = sites_around(chains, self.reads)
        self.opened_by: dict[Region, list[BoundSite]] = {}
        for (reader, fork), readers in self.reads.items():
            outside, inside = regions_of(fork), regions_of(reader)
            if inside[: len(outside)] == outside and len(inside) > len(outside):
                border = inside[len(outside)]
                if border not in regions_of(readers[0].add.node):
                    self.opened_by.setdefault(border, []).append(readers[0])
        self.readouts = {chain.sites[-1].add.node: chain.readout for chain in chains if chain.readout}

    def run(self) -> GraphModule:
        pending = True
        for node in self.graph_module.graph.nodes:
            if pending and node.op != "placeholder":
                self._add_streams_inputs()
                self._enter_meshes()
                pending = False
            self._enter_regions(node)
            if node in self.site_at:
                self._write(self.site_at[node])
            elif node in self.carrier_at:
                self._lift(self.carrier_at[node])
            elif node.op == "output":
                self._return(node)
            elif node not in self.absorbed:
                self.plain[node] = copy_node(self.graph, node, self._reader(node))
        return module_like(self.graph_module, self.graph)

    def _enter_regions(self, node: Node) -> None:
        """Note where and in which grad mode `node` stands; what a region around it is to be given, is made before it.

        A site whose branch alone lies in a region, such as a checkpoint around attention, has its `pre` outside: it is
        for the stream, not the region, to store or to compute it again.
        """
        around = regions_of(node)
        for depth, region in enumerate(around):
            for site in self.opened_by.pop(region, ()):
                self.regions = around[:depth]
                self._coefficients(site)
        self.regions, self.mode = around, self.modes[node]

    def _add_streams_inputs(self) -> None:
        """Add an input for the streams that come in beside each entry."""
        for index, entry in enumerate(chain.entry for chain in self.chains if chain.entry is not None):
            example = entry.node.meta["example_value"]
            with torch.no_grad():
                streams = equal_streams(example.movedim(entry.feature_dim, -1), self.n).contiguous()
            node = self.graph.placeholder(f"mhc_streams_{index}")
            node.meta = {"example_value": streams.detach().requires_grad_(example.requires_grad)}
            # AOTAutograd asks for the attribute; None says that the value comes from nowhere in the user's code.
            node._dynamo_source = None
            self.streams[entry.node] = Streams(entry.feature_dim, stacked=mark(node, Role.HEAD))

    def _enter_meshes(self) -> None:
        """Bring the parameters of streams that are divided over ranks to where the streams are."""
        for chain in self.chains:
            if chain.layout is None or not (chain.layout.distributed or chain.layout.divided):
                continue
            held = [node for found in chain.parameters for node in (found.phi, found.scale, found.bias)]
            entered = enter_mesh(self.graph, chain.layout, [self.plain[node] for node in held])
            self.entered.update(zip(held, entered, strict=True))

    def _return(self, node: Node) -> None:
        """Emit the graph's output, with the streams that go on to another graph behind it."""
        returned = output_values(self.graph_module.graph)
        streams = []
        for value in (returned[leaving.position] for chain in self.chains for leaving in chain.exits):
            self._collapsed(value)
            stacked = self.stacked(self.streams[value], self.streams[value].dim, value)
            streams.append(self.emit(value, "contiguous", stacked))
        visible: Any = copy_node(self.graph, node, self._collapsed)
        if streams:
            visible.args = ((*visible.args[0], *streams),)

    def _reader(self, node: Node) -> Callable[[Node], Node]:
        """Return how `node` reads its operands: a branch reads its site's layer input."""

        def read(operand: Node) -> Node:
            sites = self.reads.get((node, operand))
            return self._layer_input(sites[0]) if sites else self._collapsed(operand)

        return read

    def _inputs(self, parameters: Parameters) -> tuple[Node, Node, Node]:
        phi, scale, bias = (
            self.entered.get(node, self.plain[node]) for node in (parameters.phi, parameters.scale, parameters.bias)
        )
        return phi, scale, bias

    def _layer_input(self, site: BoundSite) -> Node:
        """Return what a site's branch reads, in the plain layout of its fork."""
        assert site.add.fork is not None
        layer_input, _, _ = self._coefficients(site)
        # For the add, not for the fork: that one may be frozen, and the mapping's gradient would be lost.
        return self.unstacked(layer_input, site.add.fork_dim, site.add.node)

    def _collapsed(self, value: Node) -> Node:
        """Return the plain form of a value; a stream value is read out, once."""
        if value not in self.plain:
            streams = self.streams[value]
            stacked = self.stacked(streams, streams.dim, value)
            readout = self.readouts.get(value)
            if readout is not None:
                arguments = (stacked, *self._inputs(readout), reference.NORM_EPS, 0.0, True)
                read = mark(self.emit(value, self.lowering.head, *arguments), Role.READOUT)
                out = self.emit(value, operator.getitem, read, 0)
            else:
                out = self.mean(stacked, value)
            mark(out, Role.READOUT)
            self.plain[value] = self.unstacked(out, streams.dim, value)
        return self.plain[value]

    def _streams_of(self, value: Node, dim: int) -> Streams:
        """Return the streams of a value; a chain's head is expanded to n equal ones."""
        if value not in self.streams:
            self.streams[value] = self._expanded(self.plain[value], dim, value)
        return self.streams[value]

    def _read_by(self, site: BoundSite, value: Node, dim: int) -> Streams:
        """Return the streams that a site reads; inside another's branch, they begin with what that branch reads."""
        outer = self.around.get(site.add.node)
        if outer is None or value is not site.add.fork:
            return self._streams_of(value, dim)
        return self._expanded(self._layer_input(outer), dim, site.add.node)

    def _expanded(self, plain: Node, dim: int, origin: Node) -> Streams:
        features_last = self.moved(plain, dim, -1, origin)
        wide = self.spelled(origin, equal_streams, features_last, self.n)
        return Streams(dim, stacked=mark(wide, Role.HEAD))

    def _coefficients(self, site: BoundSite) -> tuple[Node, Node, Node]:
        """Return (layer_input, post, res) of a site, computed where they are first needed."""
        if site.add.node not in self.coefficients:
            base, dim = site.add.fork if site.add.fork is not None else site.add.skip, site.add.fork_dim
            self.coefficients[site.add.node] = self._pre(site, self.stacked(self._read_by(site, base, dim), dim, base))
        return self.coefficients[site.add.node]

    def _pre(self, site: BoundSite, streams: Node) -> tuple[Node, Node, Node]:
        origin = site.add.node
        config = self.config
        assert site.parameters is not None
        constants = (config.sinkhorn_iters, reference.NORM_EPS, 0.0, config.manifold, True)
        result = self.emit(origin, self.lowering.pre, streams, *self._inputs(site.parameters), *constants)
        layer_input, post, res = (self.emit(origin, operator.getitem, result, index) for index in range(3))
        return layer_input, post, res

    def _write(self, site: BoundSite) -> None:
        """Emit a site's `post`: mix the streams and write the branch's output into each."""
        found = site.add
        dim = found.feature_dim
        streams = self.stacked(self._read_by(site, found.skip, dim), dim, found.skip)
        added, skipped = tensor_of(found.node), tensor_of(found.skip)
        assert added is not None
        assert skipped is not None
        if added.dtype != skipped.dtype:
            streams = self.emit(found.node, "to", streams, added.dtype)
        branch = self.moved(self._collapsed(found.branch), dim, -1, found.branch)
        if site.parameters is None:
            wide = self.spelled(found.node, equal_streams, branch, self.n)
            added_to_each = self.emit(found.node, operator.add, streams, wide)
            self.streams[found.node] = Streams(dim, stacked=added_to_each)
            return
        _, post, res = self._coefficients(site)
        if not self._same_tokens(found):
            # The branch reads a view whose tokens are laid out otherwise: coefficients are per token.
            _, post, res = self._pre(site, streams)
        written = self.emit(found.node, self.lowering.post, streams, branch, post, res)
        self.streams[found.node] = Streams(dim, stacked=written)

    @staticmethod
    def _same_tokens(found: ResidualAdd) -> bool:
        fork = found.fork if found.fork is not None else found.skip
        fork_tokens, tokens = list(sizes_at(fork)), list(sizes_at(found.node))
        del fork_tokens[found.fork_dim], tokens[found.feature_dim]
        return fork_tokens == tokens

    def _lift(self, carrier: Carrier) -> None:
        """Apply a carrier to each stream alone."""
        source = self.streams[carrier.source]
        dim = source.dim
        rank = len(sizes_at(carrier.source))
        linear = is_linear(carrier)
        if is_dropout(carrier.node):
            self.streams[carrier.node] = self._dropped(carrier.node, source)
        elif keeps_layout(carrier, features_last=dim == rank - 1):
            stacked = self.stacked(source, dim, carrier.source)
            if linear:
                stacked = self._copied(carrier, stacked)
            else:
                released = self.spelled(carrier.node, release, stacked)
                stacked = self.spelled(carrier.node, anchor, self._copied(carrier, released))
            self.streams[carrier.node] = Streams(dim, stacked=stacked)
        elif is_training_batch_norm(carrier.node):
            # One call over all streams: n calls would update the running statistics n times.
            joined = self.emit(carrier.node, torch.cat, self.released(source, carrier.source), 0)
            normed = self._copied(carrier, joined)
            pieces = self.emit(carrier.node, torch.chunk, normed, self.n, 0)
            parts = [self.emit(carrier.node, operator.getitem, pieces, index) for index in range(self.n)]
            self.streams[carrier.node] = Streams(dim, parts=self.anchored(parts, carrier.node))
        elif linear:
            parts = [self._copied(carrier, part) for part in self.parts(source, carrier.source)]
            self.streams[carrier.node] = Streams(self._dim_behind(carrier, dim), parts=parts)
        else:
            parts = [self._copied(carrier, part) for part in self.released(source, carrier.source)]
            parts = self.anchored(parts, carrier.node)
            self.streams[carrier.node] = Streams(self._dim_behind(carrier, dim), parts=parts)

    def _dropped(self, node: Node, source: Streams) -> Streams:
        """Drop the same features in every stream: equal streams stay equal, and the random draws are the plain ones."""
        stacked = self.stacked(source, source.dim, node)
        first = self.unstacked(self.one_of(stacked, 0, node), source.dim, node)
        ones = self.emit(node, torch.ones_like, first)
        assert isinstance(node.args[0], Node)
        old_input = node.args[0]
        mask = self._copy(node, {old_input: ones})
        mask = self.emit(node, torch.unsqueeze, self.moved(mask, source.dim, -1, node), -2)
        return Streams(source.dim, stacked=self.emit(node, operator.mul, stacked, mask))

    def _dim_behind(self, carrier: Carrier, dim: int) -> int:
        """Return the feature dimension behind a carrier that may permute or reshape."""
        before, behind = sizes_at(carrier.source), sizes_at(carrier.node)
        width = before[dim]
        if len(before) == len(behind) and behind[dim] == width:
            return dim
        return max((index for index, size in enumerate(behind) if size == width), default=len(behind) - 1)

    def _copied(self, carrier: Carrier, value: Node) -> Node:
        """Copy a carrier's nodes into the new graph, reading `value` for its source."""
        made = {carrier.source: value}
        for node in carrier.nodes:
            made[node] = self._copy(node, made)
        return made[carrier.node]

    def _copy(self, node: Node, made: dict[Node, Node]) -> Node:
        def read(operand: Node) -> Node:
            return made[operand] if operand in made else self._collapsed(operand)

        arguments = map_arg(node.args, read)
        keywords = map_arg(dict(node.kwargs), read)
        return self.emit(node, node.target, *arguments, **keywords)
