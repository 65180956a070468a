"""The records of sites that a model writes itself: what `recognize_native` found and `lower_native` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from .residual import Rejection


@dataclass(frozen=True)
class Part:
    """Rows of one of the model's tensors.

    Attributes:
        leaf: number of the tensor among a site's `leaves`; None for a constant.
        start: the first row; of a vector or a matrix of numbers, flattened, the first number.
        stop: behind the last.
        columns: the rows are the tensor's columns.
        fill: the constant.
        factor: what numbers are multiplied by; 1 for rows of weights.
    """

    leaf: int | None
    start: int
    stop: int
    columns: bool = False
    fill: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class Mapping:
    """What a site's phi, scale and bias are made of, in the order of the operators' rows: pre, post, res.

    Attributes:
        phi: rows of weights [rows, n·C].
        scale: one number each.
        bias: one number a row.
        gain: weights [n·C] of a norm before the projection, which multiply phi's columns.
        features_first: phi's columns, and the gain, are ordered [C, n].
        shift: the bias of the projection itself, which scale multiplies: a part for each scale; none without.
    """

    phi: tuple[Part, ...]
    scale: tuple[Part, ...]
    bias: tuple[Part, ...]
    gain: Part | None = None
    features_first: bool = False
    shift: tuple[Part, ...] = ()


@dataclass(frozen=True)
class NativeForm:
    """The mathematics of a site, as arguments of `pre`, and what is applied to its results.

    Attributes:
        mapping: what its parameters are made of.
        manifold: a name of `MANIFOLDS`.
        iters: Sinkhorn iterations.
        norm_eps: as in `pre`.
        eps: as in `pre`.
        transposed: the rows of res are ordered [in, out]; with `columns_last` the matrix that is normalized is.
        columns_last: columns of res are normalized last, not rows.
        magnitude: post is this times a sigmoid; `pre` takes 2.
        post_eps: added to post.
        sinkhorn_eps: as in `pre`.
    """

    mapping: Mapping
    manifold: str
    iters: int
    norm_eps: float
    eps: float
    transposed: bool = False
    columns_last: bool = False
    magnitude: float = 2.0
    post_eps: float = 0.0
    sinkhorn_eps: tuple[float, ...] = ()

    @property
    def mixing(self) -> str:
        """How the matrix is made, in a few words."""
        if self.manifold != "sinkhorn":
            return self.manifold
        stored = "[in, out]" if self.transposed != self.columns_last else "[out, in]"
        return f"sinkhorn, {self.iters} iterations, {'columns' if self.columns_last else 'rows'} last, stored {stored}"

    def __str__(self) -> str:
        """Return it in a few words for the report."""
        words = [self.mixing, f"eps {self.eps:g}, norm eps {self.norm_eps:g}"]
        if self.sinkhorn_eps:
            first, matrix, sums = self.sinkhorn_eps
            place = "every sum" if first else "the matrix and later sums" if matrix else "later sums"
            words.append(f"Sinkhorn's eps {sums:g} in {place}" if sums else "no eps in Sinkhorn")
        if self.magnitude != 2.0 or self.post_eps:
            words.append(f"post {self.magnitude:g}·sigmoid + {self.post_eps:g}")
        return ", ".join(words)


@dataclass(frozen=True)
class NativeSite:
    """A site that the model writes itself, proved to be what the operators compute.

    Attributes:
        name: path, from the graph's root, of the module that computes its coefficients: "model.layers.0.attn_hc".
        module: the same module's entry (key, path) of the module stack; None where there is none.
        location: "file:line  source text" of its write.
        n_streams: n.
        width: C.
        form: its mathematics.
        leaves: the model's tensors that `form.mapping` speaks of.
        streams: [*, n, C], what it reads and writes back.
        layer_input: [*, C].
        post: [*, n].
        res: [*, n, n], what the write multiplies the streams by; None where streams do not mix.
        branch: [*, C]; None where the write lies in another graph.
        write: the new streams; None likewise. post and res then leave this graph.
        first: the first node of the piece that depends on the streams.
        pieces: what computes the coefficients, the layer input and the write.
    """

    name: str
    module: tuple[str, str] | None
    location: str
    n_streams: int
    width: int
    form: NativeForm
    leaves: tuple[Node, ...]
    streams: Node
    layer_input: Node
    post: Node
    res: Node | None
    branch: Node | None
    write: Node | None
    first: Node
    pieces: tuple[Node, ...]


@dataclass(frozen=True)
class NativeWrite:
    """The write of a site whose coefficients come from another graph, proved to be `post`.

    Attributes:
        location: "file:line  source text".
        n_streams: n.
        width: C.
        streams: [*, n, C], an input of the graph, as are post and res.
        branch: [*, C].
        post: [*, n].
        res: [*, n, n]; None where streams do not mix.
        by_rows: `res` is res[out, in], not its transpose.
        write: the new streams.
        pieces: what computes the write.
    """

    location: str
    n_streams: int
    width: int
    streams: Node
    branch: Node
    post: Node
    res: Node | None
    by_rows: bool
    write: Node
    pieces: tuple[Node, ...]


@dataclass(frozen=True)
class NativeHead:
    """A readout by learned weights that the model writes itself, proved to be `head`.

    Attributes:
        name: path of the module that computes it, from the graph's root.
        module: the same module's entry (key, path) of the module stack; None where there is none.
        location: "file:line  source text".
        n_streams: n.
        width: C.
        mapping: what its parameters are made of.
        leaves: the model's tensors that `mapping` speaks of.
        norm_eps: as in `head`.
        eps: as in `head`.
        streams: [*, n, C].
        output: [*, C].
        first: the first node of the piece that depends on the streams.
        pieces: what computes it.
    """

    name: str
    module: tuple[str, str] | None
    location: str
    n_streams: int
    width: int
    mapping: Mapping
    leaves: tuple[Node, ...]
    norm_eps: float
    eps: float
    streams: Node
    output: Node
    first: Node
    pieces: tuple[Node, ...]


@dataclass(frozen=True)
class NativeRow:
    """One site or readout of streams that the model carries itself, as the report shows it.

    Attributes:
        name: path of the module that computes it, or the source line of a call.
        kind: "site", "head" or "call".
        mathematics: what it computes, in a few words.
        n_streams: n; 0 where it is not known.
        width: C; 0 where it is not known.
        location: "file:line  source text".
    """

    name: str
    kind: str
    mathematics: str
    n_streams: int
    width: int
    location: str


@dataclass(frozen=True)
class NativeFindings:
    """What one graph holds of streams that the model carries itself.

    Attributes:
        sites: proved ones, in graph order.
        heads: learned readouts, proved.
        writes: of sites whose coefficients come from another graph, proved.
        called: "file:line  source text" of sites that call the operators themselves (`mhc_compile.functional`).
        rejections: writes to streams that stay as they are, and why.
    """

    sites: tuple[NativeSite, ...] = ()
    heads: tuple[NativeHead, ...] = ()
    writes: tuple[NativeWrite, ...] = ()
    called: tuple[str, ...] = ()
    rejections: tuple[Rejection, ...] = ()

    @property
    def found(self) -> bool:
        """Whether any site runs our operators."""
        return bool(self.sites or self.writes or self.called)

    def rows(self, name_of: Callable[[str, str], str | None]) -> tuple[NativeRow, ...]:
        """Return what the report shows.

        Args:
            name_of: a module's path on the model, by its entry (key, path) of the module stack.
        """

        def name(piece: NativeSite | NativeHead) -> str:
            return (name_of(*piece.module) if piece.module is not None else None) or piece.name

        sites = (
            NativeRow(name(site), "site", _told(site), site.n_streams, site.width, site.location) for site in self.sites
        )
        heads = (
            NativeRow(
                name(head), "head", f"eps {head.eps:g}, norm eps {head.norm_eps:g}", head.n_streams, head.width,
                head.location,
            )
            for head in self.heads
        )  # fmt: skip
        writes = (
            NativeRow(
                write.location, "write", "of a site of another graph", write.n_streams, write.width, write.location
            )
            for write in self.writes
        )
        calls = (NativeRow(line, "call", "calls the operators", 0, 0, line) for line in self.called)
        return (*sites, *heads, *writes, *calls)


def _told(site: NativeSite) -> str:
    return str(site.form) + (", written in another graph" if site.write is None else "")
