"""Find the sites of streams that a model carries itself, by dataflow, and prove what they compute. Reads only.

A site is known by its write: a sum, in any spelling, of coefficients times the branch, spread over n streams, and of
the streams, mixed by a small matrix per token or as they are. From the write the search goes back to the streams, and
from the streams forward to what collapses them. What the pieces compute is not read from their text but fitted and
proved (`finding.native_fit`); a piece that is not ours stays, and the first difference is told.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .finding.native_cuts import Surroundings
from .finding.native_fit import fit_head, fit_site
from .finding.native_pieces import Cut, Piece, PieceError
from .finding.native_proof import Mismatch
from .finding.native_writes import Write, cut_of, writes_of
from .fx.dataflow import (
    CAST_NAMES,
    VIEW_NAMES,
    is_activation_input,
    is_add,
    is_float,
    op_name,
    output_values,
    shape_of,
)
from .fx.grad_modes import grad_modes
from .fx.node_info import location_of, module_path_of
from .fx.regions import regions_of
from .native import Mapping, NativeFindings, NativeForm, NativeHead, NativeSite, NativeWrite
from .residual import Reason, Rejection

_CALLED = {"mhc::post", "mhc::post_pre"}
# Values of a layer input's shape that are tried for one.
_MOST_COLLAPSES = 16


def recognize_native(graph_module: GraphModule, known: dict[str, Any] | None = None) -> NativeFindings:
    """Return the sites, proved, that the model writes itself, and the writes that are not ours with the difference.

    Args:
        graph_module: normalized torch IR, its regions open.
        known: what pieces turned out to be in an earlier search, by their fingerprints; is added to.
    """
    return _Recognizer(graph_module, {} if known is None else known).run()


@dataclass
class _Recognizer:
    """The state of one search.

    Attributes:
        graph_module: the graph.
        known: what pieces that were fitted before turned out to be, by their fingerprints: a model repeats its layers.
    """

    graph_module: GraphModule
    known: dict[str, Any] = field(default_factory=dict)

    def run(self) -> NativeFindings:
        graph = self.graph_module.graph
        self.surroundings = Surroundings(graph)
        self.order = self.surroundings.order
        self.modes = grad_modes(self.graph_module)
        sites: list[NativeSite] = []
        writes: list[NativeWrite] = []
        rejections: list[Rejection] = []
        for node in self.order:
            found = self._written(node) if is_add(node) and is_float(node) else None
            if isinstance(found, NativeSite):
                sites.append(found)
            elif isinstance(found, NativeWrite):
                writes.append(found)
            elif isinstance(found, Rejection):
                rejections.append(found)
            elif found is not None:
                rejections.append(Rejection(node.name, location_of(node), Reason.NATIVE_DIFFERS, str(found)))
        called = tuple(location_of(node) for node in self.order if _schema_name(node) in _CALLED)
        heads = tuple(self._heads(sites))
        sites += self._halves({site.streams for site in sites})
        return NativeFindings(tuple(sites), heads, tuple(writes), called, tuple(rejections))

    def _written(self, node: Node) -> NativeSite | NativeWrite | Mismatch | Rejection | None:
        """Return what a sum writes, or what is in the way: of several readings, the nearest."""
        differences: list[tuple[int, Mismatch | Rejection]] = []
        for write in writes_of(node, self.surroundings):
            found = self._site(write)
            if isinstance(found, NativeSite | NativeWrite):
                return found
            if found is not None:
                unlike = 0 if self._by_rows(write) in (True, False) else 1
                differences.append((unlike if isinstance(found, Mismatch) else 2, found))
        return min(differences, key=operator.itemgetter(0), default=(0, None))[1]

    def _site(self, write: Write) -> NativeSite | NativeWrite | Mismatch | Rejection | None:
        """Return the site of a write, what is in the way, or None where nothing behind it speaks of streams."""
        cut = write.cut
        if all(is_activation_input(node) for node in write.inputs if node is not write.branch):
            return self._write_alone(write)
        try:
            sources = [node for node in (write.post, write.res) if node is not None]
            between = self.surroundings.piece(sources, cut, (cut.node,))
        except PieceError as error:
            # A state that is written to, such as a linear attention's, looks the same: the finder is to say what it is.
            return Rejection(write.node.name, location_of(write.node), Reason.NATIVE_STREAMS, f"post or res: {error}")
        if not between.leaves:
            return None
        by_rows = self._by_rows(write)
        if isinstance(by_rows, Mismatch):
            return by_rows
        return self._collapsed(cut, write.post, write.res, by_rows, write)

    def _collapsed(
        self, cut: Cut, post: Node, res: Node | None, by_rows: bool, write: Write | None
    ) -> NativeSite | Mismatch:
        """Return the site with these coefficients, or how the nearest thing that collapses the streams differs."""
        worst: Mismatch | None = None
        sources = [node for node in (post, res) if node is not None]
        for collapse in self._collapses(cut):
            try:
                piece = self.surroundings.piece([collapse, *sources], cut, (cut.node,))
                form = self._fitted(piece, (collapse, *sources), by_rows)
            except PieceError as error:
                form = Mismatch(str(error))
            if isinstance(form, NativeForm):
                return self._made(cut, post, res, write, collapse, piece, form)
            if worst is None or (form.gap is not None and (worst.gap is None or form.gap < worst.gap)):
                worst = form
        return worst or Mismatch("nothing collapses these streams")

    def _collapses(self, cut: Cut) -> list[Node]:
        """Return what may be the layer input, [*, C] from the streams and parameters alone, nearest first."""
        shape = cut.per_token(cut.width)
        found = [node for node in self.surroundings.computed_from(cut) if shape_of(node) == shape and is_float(node)]
        return found[:_MOST_COLLAPSES]

    def _by_rows(self, write: Write) -> bool | Mismatch:
        """Return whether a write is `post` with its res as res[out, in], or with the transpose; else how it differs."""
        try:
            piece = self._piece_of(write)
            key = f"write\n{piece.fingerprint()}"
            if key not in self.known:
                with _apart():
                    differences = {by_rows: write.difference(piece, by_rows) for by_rows in (True, False)}
                fitting = [by_rows for by_rows, difference in differences.items() if difference is None]
                nearest = min((entry for entry in differences.values() if entry), key=_distance, default=None)
                self.known[key] = fitting[0] if fitting else nearest
        except PieceError as error:
            return Mismatch(f"the write: {error}")
        found: bool | Mismatch = self.known[key]
        return found

    def _piece_of(self, write: Write) -> Piece:
        return self.surroundings.piece([write.node], write.cut, write.inputs)

    def _write_alone(self, write: Write) -> NativeWrite | None:
        """Return a write whose coefficients and streams come into the graph."""
        by_rows = self._by_rows(write)
        if isinstance(by_rows, Mismatch) or shape_of(write.node) != shape_of(write.cut.node):
            return None
        return NativeWrite(
            location=location_of(write.node),
            n_streams=write.cut.n_streams,
            width=write.cut.width,
            streams=write.cut.node,
            branch=write.branch,
            post=write.post,
            res=write.res,
            by_rows=by_rows,
            write=write.node,
            pieces=self._piece_of(write).nodes,
        )

    def _halves(self, read: set[Node]) -> list[NativeSite]:
        """Return the sites whose coefficients leave the graph: their writes lie in another one."""
        returned = [
            node for node in output_values(self.graph_module.graph) if isinstance(node, Node) and is_float(node)
        ]
        inputs = [node for node in self.order if is_activation_input(node)]
        found: list[NativeSite] = []
        for streams in dict.fromkeys((*returned, *inputs)):
            cut = cut_of(streams)
            if cut is None or streams in read:
                continue
            n = cut.n_streams
            posts = [node for node in returned if shape_of(node) == cut.per_token(n)]
            mixings: list[Node | None] = [node for node in returned if shape_of(node) == cut.per_token(n, n)]
            tried = (self._collapsed(cut, post, res, True, None) for post in posts for res in mixings or [None])
            site = next((site for site in tried if isinstance(site, NativeSite)), None)
            found += [site] if site is not None else []
        return found

    def _fitted(self, piece: Piece, results: tuple[Node, ...], by_rows: bool) -> NativeForm | Mismatch:
        places = [piece.nodes.index(node) for node in results]
        key = f"{places} {by_rows}\n{piece.fingerprint()}"
        if key not in self.known:
            with _apart():
                self.known[key] = fit_site(piece, results[0], results[1], next(iter(results[2:]), None), by_rows)
        form: NativeForm | Mismatch = self.known[key]
        return form

    def _made(
        self,
        cut: Cut,
        post: Node,
        res: Node | None,
        write: Write | None,
        collapse: Node,
        piece: Piece,
        form: NativeForm,
    ) -> NativeSite | Mismatch:
        written = self._piece_of(write).nodes if write is not None else ()
        leaves = set(piece.leaves)
        pieces = tuple(sorted({*piece.nodes, *written} - leaves, key=self.order.__getitem__))
        first = self._first(piece)
        regions = {regions_of(node) for node in (first, collapse, post, res) if node is not None}
        if len(regions) > 1:
            return Mismatch("its coefficients are computed in several regions, such as checkpointed bodies")
        if not self._in_one_mode(pieces, piece, first):
            return Mismatch("a part of it is computed without gradients")
        return NativeSite(
            name=_name_of(collapse),
            module=next(reversed(module_path_of(collapse)), None),
            location=location_of(collapse if write is None else write.node),
            n_streams=cut.n_streams,
            width=cut.width,
            form=form,
            leaves=piece.leaves,
            streams=cut.node,
            layer_input=collapse,
            post=post,
            res=res,
            branch=write.branch if write is not None else None,
            write=write.node if write is not None else None,
            first=first,
            pieces=pieces,
        )

    def _first(self, piece: Piece) -> Node:
        """Return the first node of a piece that depends on the streams."""
        moving: set[Node] = {piece.cut.node}
        for node in piece.moving:
            if any(source in moving for source in node.all_input_nodes):
                return node
        raise PieceError("nothing depends on the streams")

    def _in_one_mode(self, nodes: Iterable[Node], piece: Piece, first: Node) -> bool:
        """Return whether all nodes, and leaves that are made after the first, run with gradients on, or all without."""
        late = [leaf for leaf in piece.leaves if self.order[leaf] > self.order[first]]
        return len({self.modes[node] for node in (first, *nodes, *late)}) == 1

    def _heads(self, sites: Iterable[NativeSite]) -> Iterable[NativeHead]:
        sites = list(sites)
        read = {site.streams for site in sites}
        taken = {site.layer_input for site in sites}
        for site in sites:
            assert site.write is not None
            ends = [site.write, *_copies(site.write, shape_of(site.streams))]
            for end in ends:
                if not read & set(ends):
                    head = self._head(Cut(end, tuple(shape_of(end)[:-2]), site.n_streams, site.width))
                    if head is not None and head.output not in taken:
                        yield head
                        break

    def _head(self, cut: Cut) -> NativeHead | None:
        for collapse in self._collapses(cut):
            try:
                piece = self.surroundings.piece([collapse], cut, (cut.node,))
                key = f"head {piece.nodes.index(collapse)}\n{piece.fingerprint()}"
                if key not in self.known:
                    with _apart():
                        self.known[key] = fit_head(piece, collapse)
            except PieceError:
                continue
            found: tuple[Mapping, float, float] | Mismatch = self.known[key]
            first = self._first(piece)
            if not isinstance(found, Mismatch) and self._in_one_mode(piece.moving, piece, first):
                mapping, norm_eps, eps = found
                return NativeHead(
                    name=_name_of(collapse),
                    module=next(reversed(module_path_of(collapse)), None),
                    location=location_of(collapse),
                    n_streams=cut.n_streams,
                    width=cut.width,
                    mapping=mapping,
                    leaves=piece.leaves,
                    norm_eps=norm_eps,
                    eps=eps,
                    streams=cut.node,
                    output=collapse,
                    first=first,
                    pieces=piece.moving,
                )
        return None


def _distance(difference: Mismatch) -> tuple[bool, float]:
    """Return a key that is smaller for the nearer: where only gradients differ, values agree."""
    return not difference.of_gradient, float("inf") if difference.gap is None else difference.gap


def _copies(node: Node, shape: tuple[Any, ...]) -> list[Node]:
    return [user for user in node.users if op_name(user) in CAST_NAMES | VIEW_NAMES and shape_of(user) == shape]


def _name_of(node: Node) -> str:
    """Return the path of the innermost module around a node, as the model names it."""
    path = module_path_of(node)
    text = path[-1][1] if path else ""
    return re.sub(r"^L\['\w+'\]\.?", "", re.sub(r"\._modules\['([^']+)'\]", r".\1", text)) or node.name


def _schema_name(node: Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


@contextmanager
def _apart() -> Iterator[None]:
    """Inside, tensors are real ones that have gradients, whatever mode the compiler runs in."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.inference_mode(False), torch.enable_grad():
        yield
