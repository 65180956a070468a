"""Have sites that a model writes itself run our operators. Searches nothing: the findings say where.

The model's own parameters go into the operators as they lie, where one tensor holds all rows in the operators' order;
otherwise they are joined in the graph. What nothing reads any more is left out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..kernels import ops
from .fx.added_nodes import Role, mark
from .fx.dataflow import CAST_NAMES, VIEW_NAMES, op_name, shape_of, tensor_of
from .fx.grad_modes import grad_modes
from .fx.graph_copy import copy_node, module_like
from .fx.regions import Region, put_into, regions_of
from .native import NativeFindings, NativeHead, NativeSite, NativeWrite, Part

assert ops.OPERATORS, "importing the table registers torch.ops.mhc"

# What expands a value to equal streams; it can be computed again.
_EXPANDING = {"expand", "repeat", "contiguous", "stack", "repeat_interleave", "unsqueeze", "clone"}


def lower_native(graph_module: GraphModule, findings: NativeFindings) -> GraphModule:
    """Return a graph whose proved sites and heads run `pre`, `post` and `head`; the same graph, if there are none.

    Args:
        graph_module: the graph that the findings speak of; it is left as it is.
        findings: of `recognize_native`.
    """
    if not findings.sites and not findings.writes:
        return graph_module
    return _Lowerer(graph_module, findings).run()


class _Lowerer:
    """The state of one lowering: the new graph, and what each old value has become."""

    def __init__(self, graph_module: GraphModule, findings: NativeFindings) -> None:
        self.graph_module = graph_module
        self.findings = findings
        self.graph = Graph()
        self.values: dict[Node, Node] = {}
        self.coefficients: dict[NativeSite, tuple[Node, Node, Node]] = {}
        self.readouts: dict[NativeHead, Node] = {}
        # A cast behind a write or a collapse goes with it: the operators return the streams' dtype.
        self.replaced: dict[Node, Callable[[], Node]] = {}
        for site in findings.sites:
            if site.write is not None:
                self._replace(site.write, site.streams, lambda site=site: self._write(site))  # type: ignore[misc]
            else:
                self.replaced[site.post] = lambda site=site: self.coefficients[site][1]  # type: ignore[misc]
                if site.res is not None:
                    self.replaced[site.res] = lambda site=site: self.coefficients[site][2]  # type: ignore[misc]
            self._replace(site.layer_input, site.streams, lambda site=site: self.coefficients[site][0])  # type: ignore[misc]
        for write in findings.writes:
            self._replace(write.write, write.streams, lambda write=write: self._write_alone(write))  # type: ignore[misc]
        for head in findings.heads:
            self._replace(head.output, head.streams, lambda head=head: self.readouts[head])  # type: ignore[misc]
        self.pieces: tuple[NativeSite | NativeHead, ...] = (*findings.sites, *findings.heads)
        self.opens: dict[Node, list[NativeSite | NativeHead]] = {}
        for piece in self.pieces:
            self.opens.setdefault(piece.first, []).append(piece)
        self.dead = self._dead()
        self.parameters: dict[NativeSite | NativeHead, tuple[Node, Node, Node]] = {}
        switches = set(grad_modes(graph_module).values())
        # Known from the start, they hinder no boundary from being joined; not so where they would lose their gradient.
        self.early = len(switches) == 1

    def _replace(self, node: Node, streams: Node, value: Callable[[], Node]) -> None:
        """Note what replaces a node: or the casts and views behind it that give it the streams' dtype and tokens."""
        value = cache(value)
        made, wanted = tensor_of(node), tensor_of(streams)
        assert made is not None
        assert wanted is not None
        tokens = wanted.dim() - 2 - (made.dim() - (2 if made.shape[-2:] == wanted.shape[-2:] else 1))
        copies = [
            user
            for user in node.users
            if (op_name(user) in CAST_NAMES and _dtype_of(user) == wanted.dtype)
            or (tokens and op_name(user) in VIEW_NAMES and shape_of(user) == shape_of(streams))
        ]
        if (made.dtype != wanted.dtype or tokens) and copies and len(copies) == len(node.users):
            self.replaced |= dict.fromkeys(copies, value)
        elif tokens:
            self.replaced[node] = lambda: self._emit(node, torch.flatten, value(), 0, tokens)
        else:
            self.replaced[node] = value

    def _dead(self) -> set[Node]:
        """Return what nothing reads once the operators run."""
        order = {node: index for index, node in enumerate(self.graph_module.graph.nodes)}
        pieces = {node for piece in (*self.pieces, *self.findings.writes) for node in piece.pieces}
        wanted = {node for site in self.findings.sites for node in (site.branch, site.streams)}
        dead: set[Node] = set()
        for node in sorted(pieces - set(self.replaced), key=order.__getitem__, reverse=True):
            if node not in wanted and all(user in dead or user in self.replaced for user in node.users):
                dead.add(node)
        return dead

    def run(self) -> GraphModule:
        heads = self._heads_of_chains()
        pending = self.early
        for node in self.graph_module.graph.nodes:
            if pending and node.op != "placeholder":
                self._join_parameters()
                pending = False
            for piece in self.opens.get(node, ()):
                self._open(piece)
            if node in self.replaced:
                self.values[node] = self._in_dtype(self.replaced[node](), node)
            elif node not in self.dead and node not in self.values:
                self.values[node] = copy_node(self.graph, node, self.values.__getitem__)
                if node in heads:
                    mark(self.values[node], Role.HEAD)
        return module_like(self.graph_module, self.graph)

    def _heads_of_chains(self) -> set[Node]:
        """Return the values, expanded by the model, that its streams begin with."""
        return {site.streams for site in self.findings.sites if op_name(site.streams) in _EXPANDING}

    def _join_parameters(self) -> None:
        """Emit the parameters of every site whose tensors are inputs of the graph."""
        for piece in self.pieces:
            if all(leaf in self.values for leaf in piece.leaves):
                self.parameters[piece] = self._parameters(piece, ())

    def _open(self, piece: NativeSite | NativeHead) -> None:
        """Emit what computes a site's coefficients and layer input, or a readout."""
        origin = piece.layer_input if isinstance(piece, NativeSite) else piece.output
        streams = self.values[piece.streams]
        parameters = self.parameters.get(piece) or self._parameters(piece, regions_of(origin))
        if isinstance(piece, NativeHead):
            target = torch.ops.mhc.head.default
            made = self._emit(origin, target, streams, *parameters, piece.norm_eps, piece.eps, False)
            output = self._emit(origin, operator.getitem, mark(made, Role.READOUT), 0)
            self.readouts[piece] = mark(output, Role.READOUT)
            return
        form = piece.form
        within = (list(form.sinkhorn_eps),) if form.sinkhorn_eps else ()
        constants = (form.iters, form.norm_eps, form.eps, form.manifold, False, form.transposed, *within)
        result = self._emit(origin, torch.ops.mhc.pre.default, streams, *parameters, *constants)
        layer_input, post, res = (self._emit(origin, operator.getitem, result, index) for index in range(3))
        if form.magnitude != 2.0:
            post = self._emit(origin, operator.mul, post, form.magnitude / 2)
        if form.post_eps:
            post = self._emit(origin, operator.add, post, form.post_eps)
        if form.columns_last:
            res = self._emit(origin, torch.transpose, res, -1, -2)
        self.coefficients[piece] = layer_input, post, res

    def _write_alone(self, write: NativeWrite) -> Node:
        """Emit the write of a site whose coefficients come into the graph."""
        post = self.values[write.post]
        if write.res is None:
            ones = self._emit(write.write, torch.ones_like, post)
            res = self._emit(write.write, torch.diag_embed, ones)
        else:
            res = self.values[write.res]
            if not write.by_rows:
                res = self._emit(write.write, torch.transpose, res, -1, -2)
        streams, branch = self.values[write.streams], self.values[write.branch]
        return self._emit(write.write, torch.ops.mhc.post.default, streams, branch, post, res)

    def _write(self, site: NativeSite) -> Node:
        assert site.write is not None
        assert site.branch is not None
        _, post, res = self.coefficients[site]
        streams, branch = self.values[site.streams], self.values[site.branch]
        if len(_shape(branch)) != len(_shape(streams)) - 1:
            branch = self._emit(site.write, "reshape_as", branch, self._emit(site.write, "select", streams, -2, 0))
        return self._emit(site.write, torch.ops.mhc.post.default, streams, branch, post, res)

    def _in_dtype(self, value: Node, origin: Node) -> Node:
        """Return a value in the dtype that the model's readers expect."""
        if _dtype_of(value) == _dtype_of(origin):
            return value
        return self._emit(origin, "to", value, _dtype_of(origin))

    def _parameters(self, piece: NativeSite | NativeHead, regions: tuple[Region, ...]) -> tuple[Node, Node, Node]:
        """Return phi [rows, n·C], scale and bias: the model's own tensors, or joined from them."""
        mapping = piece.form.mapping if isinstance(piece, NativeSite) else piece.mapping
        origin = piece.layer_input if isinstance(piece, NativeSite) else piece.output
        held = [self._early(leaf) for leaf in piece.leaves]
        flat = piece.n_streams * piece.width

        def emit(target: Any, *args: Any, **kwargs: Any) -> Node:
            node = self._emit(origin, target, *args, **kwargs)
            put_into(node, regions)
            return node

        def narrowed(leaf: Node, part: Part) -> Node:
            if (part.start, part.stop) == (0, _shape(leaf)[0]):
                return leaf
            return emit(torch.narrow, leaf, 0, part.start, part.stop - part.start)

        def rows(part: Part) -> Node:
            assert part.leaf is not None
            leaf = held[part.leaf]
            if len(_shape(leaf)) != 2:
                leaf = emit("reshape", leaf, *((flat, -1) if part.columns else (-1, flat)))
            return narrowed(emit(torch.transpose, leaf, 0, 1) if part.columns else leaf, part)

        def numbers(part: Part) -> Node:
            if part.leaf is None:
                return emit("new_full", held[0], (part.stop - part.start,), part.fill, dtype=torch.float32)
            leaf = held[part.leaf]
            result = narrowed(emit("reshape", leaf, -1) if len(_shape(leaf)) != 1 else leaf, part)
            return emit(operator.mul, result, part.factor) if part.factor != 1.0 else result

        def joined(parts: list[Node]) -> Node:
            return parts[0] if len(parts) == 1 else emit(torch.cat, parts)

        phi = joined([rows(part) for part in mapping.phi])
        if mapping.gain is not None:
            assert mapping.gain.leaf is not None
            phi = emit(operator.mul, phi, emit("reshape", held[mapping.gain.leaf], -1))
        if mapping.features_first:
            phi = emit("reshape", phi, -1, piece.width, piece.n_streams)
            phi = emit("reshape", emit(torch.transpose, phi, 1, 2), -1, flat)
        scale = joined([numbers(part) for part in mapping.scale])
        bias = joined([numbers(part) for part in mapping.bias])
        if mapping.shift:
            ones = [emit(torch.narrow, scale, 0, index, 1) for index in range(len(mapping.shift))]
            shifts = [emit(operator.mul, one, numbers(part)) for one, part in zip(ones, mapping.shift, strict=True)]
            bias = emit(operator.add, bias, joined(shifts))
        return phi, scale, bias

    def _early(self, leaf: Node) -> Node:
        """Return one of the model's tensors, computed before its place in the graph if need be."""
        if leaf not in self.values:
            self.values[leaf] = copy_node(self.graph, leaf, self._early)
        return self.values[leaf]

    def _emit(self, origin: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a node that speaks for `origin`: its metadata, with the example value of its own computation."""
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args, kwargs)
        node.meta = {key: value for key, value in origin.meta.items() if key != "grapharg"}
        node.meta["example_value"] = _evaluate(target, args, kwargs)
        put_into(node, regions_of(origin))
        return mark(node, Role.STREAM)


def _evaluate(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation on example values (fake tensors: shapes and dtypes, no arithmetic)."""
    values: Any = map_arg(args, lambda node: node.meta["example_value"])
    keywords: Any = map_arg(kwargs, lambda node: node.meta["example_value"])
    with torch.no_grad():
        if isinstance(target, str):
            return getattr(values[0], target)(*values[1:], **keywords)
        return target(*values, **keywords)


def _dtype_of(node: Node) -> Any:
    tensor = tensor_of(node)
    return tensor.dtype if tensor is not None else None


def _shape(node: Node) -> tuple[Any, ...]:
    tensor = tensor_of(node)
    assert tensor is not None
    return tuple(tensor.shape)
