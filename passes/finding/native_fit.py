"""Which of our operators a piece of a model is: guessed from gradients and the numbers in it, then proved in float64.

What the piece's results read of each weight is told by their gradients: exactly the rows that a coefficient is made
of have one. What remains to be known (eps, iterations, orientation, the marginal that comes last) is tried. Nothing
depends on how the mathematics is spelled, and nothing is believed: the operator and the piece have to agree to 1e-9 on
streams and weights of several sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels import reference
from ...kernels.manifolds import MANIFOLDS, is_built_in
from ..fx.dataflow import op_name
from ..native import Mapping, NativeForm, Part
from .native_pieces import Piece, PieceError

TOLERANCE = 1e-9
# Sizes of weights and of streams that a form is proved for.
_SCALES = ((1.0, 1.0), (3.0, 30.0), (0.2, 0.02))
_LARGEST_EPS = 1e-2
_NORMALIZATIONS = {"softmax", "log_softmax", "logsumexp", "normalize", "div", "truediv", "itruediv", "div_"}


@dataclass(frozen=True)
class Mismatch:
    """The first thing that is not as in our operators.

    Attributes:
        what: such as "res".
        gap: the difference to the nearest that was tried, relative to the largest entry; None where none was.
    """

    what: str
    gap: float | None = None

    def __str__(self) -> str:
        """Return it as a phrase."""
        return self.what if self.gap is None else f"{self.what} differs by {self.gap:.1e}"


@dataclass(frozen=True)
class _Reads:
    """What one group of coefficients reads of the model's tensors."""

    phi: Part | None
    scale: Part | None
    bias: Part | None
    gain: Part | None


@dataclass
class _Sample:
    """One run of a piece."""

    piece: Piece
    given: dict[Node, Tensor]
    values: dict[Node, Tensor]

    @property
    def streams(self) -> Tensor:
        return self.given[self.piece.cut.node]

    def logits(self, reads: _Reads, rows: int, norm_eps: float) -> Tensor:
        """Return one group's logits [*, rows] as `pre` computes them."""
        mapping = Mapping(
            (_or_constant(reads.phi, rows, 0.0),),
            (_or_constant(reads.scale, 1, 1.0),),
            (_or_constant(reads.bias, rows, 0.0),),
            reads.gain,
        )
        phi, scale, bias = parameters_of(mapping, [self.given[leaf] for leaf in self.piece.leaves], self.piece.cut.flat)
        flat = self.streams.flatten(-2)
        inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
        return (flat @ phi.mT) * inverse_rms * scale + bias


def parameters_of(mapping: Mapping, leaves: Sequence[Tensor], flat: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return phi [rows, n·C], scale and bias that a mapping makes of the model's tensors."""

    def vector(parts: tuple[Part, ...]) -> Tensor:
        like = leaves[0]
        return torch.cat(
            [
                like.new_full((part.stop - part.start,), part.fill)
                if part.leaf is None
                else leaves[part.leaf].reshape(-1)[part.start : part.stop]
                for part in parts
            ]
        )

    phi = torch.cat([_rows(leaves, part, flat) for part in mapping.phi])
    if mapping.gain is not None:
        assert mapping.gain.leaf is not None
        phi = phi * leaves[mapping.gain.leaf].reshape(-1)
    return phi, vector(mapping.scale), vector(mapping.bias)


def _rows(leaves: Sequence[Tensor], part: Part, flat: int) -> Tensor:
    if part.leaf is None:
        return leaves[0].new_zeros(part.stop - part.start, flat)
    leaf = leaves[part.leaf]
    return (leaf.reshape(flat, -1).mT if part.columns else leaf.reshape(-1, flat))[part.start : part.stop]


def _or_constant(part: Part | None, rows: int, fill: float) -> Part:
    return Part(None, 0, rows, fill=fill) if part is None else part


def fit_site(
    piece: Piece, layer_input: Node, post: Node, res: Node | None, mixes_by_rows: bool
) -> NativeForm | Mismatch:
    """Return the form of a site whose results a piece computes, or what is in the way.

    Args:
        piece: from the streams to the results.
        layer_input: [*, C].
        post: [*, n].
        res: [*, n, n]; None where streams do not mix.
        mixes_by_rows: `res` is res[out, in] for the write, not its transpose.

    Raises:
        PieceError: the piece cannot be run.
    """
    n = piece.cut.n_streams
    sample = _sample(piece)
    reads = _reads(sample, layer_input, n)
    if isinstance(reads, Mismatch):
        return replace(reads, what=f"pre {reads.what}")
    found = _fit_pre(sample, layer_input, reads)
    if isinstance(found, Mismatch):
        return found
    norm_eps, eps = found
    groups = [reads]
    gates = _reads(sample, post, n)
    if isinstance(gates, Mismatch):
        return replace(gates, what=f"post {gates.what}")
    groups.append(gates)
    affine = _fit_post(sample, post, gates, norm_eps)
    if isinstance(affine, Mismatch):
        return affine
    form = NativeForm(Mapping((), (), ()), "identity", 1, norm_eps, eps, magnitude=affine[0], post_eps=affine[1])
    if res is not None:
        mixing = _reads(sample, res, n * n)
        if isinstance(mixing, Mismatch):
            return replace(mixing, what=f"res {mixing.what}")
        groups.append(mixing)
        fitted = _fit_res(sample, res, mixing, mixes_by_rows, form)
        if isinstance(fitted, Mismatch):
            return fitted
        form = fitted
    if any(group.gain != groups[0].gain for group in groups):
        return Mismatch("pre, post and res read norms of different weights")
    form = replace(form, mapping=_packed(groups, n))
    return prove_site(piece, layer_input, post, res, mixes_by_rows, form) or form


def fit_head(piece: Piece, output: Node) -> tuple[Mapping, float, float] | Mismatch:
    """Return (mapping, norm_eps, eps) of a learned readout, or what is in the way.

    Raises:
        PieceError: the piece cannot be run.
    """
    n = piece.cut.n_streams
    sample = _sample(piece)
    reads = _reads(sample, output, n)
    if isinstance(reads, Mismatch):
        return reads
    found = _fit_pre(sample, output, reads)
    if isinstance(found, Mismatch):
        return found
    mapping = _packed([reads], n)
    for seed, (weight, size) in enumerate(_SCALES):
        sample = _sample(piece, seed + 1, weight, size)
        parameters = parameters_of(mapping, [sample.given[leaf] for leaf in piece.leaves], piece.cut.flat)
        got, _ = reference.head(sample.streams, *parameters, *found)
        if (gap := _gap(sample.values[output], got)) > TOLERANCE:
            return Mismatch("the readout", gap)
    return mapping, *found


def prove_site(
    piece: Piece, layer_input: Node, post: Node, res: Node | None, mixes_by_rows: bool, form: NativeForm
) -> Mismatch | None:
    """Compare a piece with `pre` on streams and weights of several sizes; None where they agree."""
    for seed, (weight, size) in enumerate(_SCALES):
        sample = _sample(piece, seed + 1, weight, size)
        parameters = parameters_of(form.mapping, [sample.given[leaf] for leaf in piece.leaves], piece.cut.flat)
        got = reference.pre(
            sample.streams, *parameters, form.iters, form.norm_eps, form.eps, form.manifold, False, form.transposed
        )
        wanted = [("pre", sample.values[layer_input], got.layer_input)]
        wanted.append(("post", sample.values[post], got.post * (form.magnitude / 2) + form.post_eps))
        if res is not None:
            matrix = sample.values[res] if mixes_by_rows else sample.values[res].mT
            wanted.append(("res", matrix, got.res.mT if form.columns_last else got.res))
        for what, theirs, ours in wanted:
            if (gap := _gap(theirs, ours)) > TOLERANCE:
                return Mismatch(what, gap)
    return None


def _sample(piece: Piece, seed: int = 0, weight: float = 1.0, size: float = 1.0) -> _Sample:
    given = piece.drawn(seed, weight, size)
    with torch.no_grad():
        return _Sample(piece, given, piece.run(given))


def _gap(theirs: Tensor, ours: Tensor) -> float:
    """Return the largest difference, relative to the largest entry where that is above 1."""
    if theirs.shape != ours.shape:
        return float("inf")
    gap = float((theirs - ours).abs().max()) / max(1.0, float(theirs.abs().max()))
    return gap if gap == gap else float("inf")


def _reads(sample: _Sample, result: Node, rows: int) -> _Reads | Mismatch:
    """Tell by gradients what a result, made of `rows` coefficients a token, reads of each of the model's tensors."""
    piece = sample.piece
    flat = piece.cut.flat
    leaves = [sample.given[leaf].detach().requires_grad_() for leaf in piece.leaves]
    with torch.enable_grad():
        values = piece.run({**sample.given, **dict(zip(piece.leaves, leaves, strict=True))})
        if not values[result].requires_grad:
            return Mismatch("reads no weights")
        generator = torch.Generator().manual_seed(7)
        weights = torch.randn(values[result].shape, generator=generator, dtype=torch.float64)
        grads = torch.autograd.grad((values[result] * weights).sum(), leaves, allow_unused=True)
    found: dict[str, Part] = {}
    for index, grad in enumerate(grads):
        if grad is None or not (touched := grad != 0).any():
            continue
        kind, part = _kind_of(index, touched, rows, flat)
        if kind is None or kind in found:
            return Mismatch(f"reads {piece.leaves[index].name} in a way that is not known")
        found[kind] = part
    if "phi" not in found:
        return Mismatch("is no projection of the flattened streams")
    return _Reads(found["phi"], found.get("scale"), found.get("bias"), found.get("gain"))


def _kind_of(index: int, touched: Tensor, rows: int, flat: int) -> tuple[str | None, Part]:
    """Return what a tensor is, by which of its entries are read, and which part of it is."""
    nothing = Part(None, 0, 0)
    shape = touched.shape
    if len(shape) > 1 and int(touched.sum()) == rows * flat:
        for columns in (False, True):
            near = (shape[0], shape[0] * shape[1]) if columns else (shape[-1], shape[-1] * shape[-2])
            if flat not in near[: len(shape) - 1]:
                continue
            matrix = touched.reshape(flat, -1).mT if columns else touched.reshape(-1, flat)
            used = matrix.all(-1)
            if int(used.sum()) == rows and (part := _run(index, used)) is not None:
                return "phi", replace(part, columns=columns)
        return None, nothing
    part_of_vector = _run(index, touched.reshape(-1))
    if part_of_vector is None:
        return None, nothing
    size = part_of_vector.stop - part_of_vector.start
    kind = {1: "scale", rows: "bias", flat: "gain"}.get(size)
    if kind == "gain" and touched.numel() != flat:
        return None, nothing
    return kind, part_of_vector


def _run(index: int, used: Tensor) -> Part | None:
    """Return the one run of true entries of a vector."""
    places = used.nonzero().flatten().tolist()
    if not places or places[-1] - places[0] + 1 != len(places):
        return None
    return Part(index, places[0], places[-1] + 1)


def _fit_pre(sample: _Sample, result: Node, reads: _Reads) -> tuple[float, float] | Mismatch:
    """Return (norm_eps, eps) with which a collapse is ours."""
    best = float("inf")
    for norm_eps in _small_numbers(sample.piece):
        gate = torch.sigmoid(sample.logits(reads, sample.piece.cut.n_streams, norm_eps))
        for eps in _small_numbers(sample.piece):
            ours = ((gate + eps).unsqueeze(-2) @ sample.streams).squeeze(-2)
            gap = _gap(sample.values[result], ours)
            if gap <= TOLERANCE:
                return norm_eps, eps
            best = min(best, gap)
    return Mismatch("pre", best)


def _fit_post(sample: _Sample, result: Node, reads: _Reads, norm_eps: float) -> tuple[float, float] | Mismatch:
    """Return (magnitude, eps) with which post is ours."""
    gate = torch.sigmoid(sample.logits(reads, sample.piece.cut.n_streams, norm_eps))
    numbers = [value for value in sample.piece.numbers() if 0.05 <= value <= 100 and value not in (1.0, 2.0)]
    best = float("inf")
    for magnitude in (2.0, 1.0, *numbers):
        for eps in _small_numbers(sample.piece):
            gap = _gap(sample.values[result], magnitude * gate + eps)
            if gap <= TOLERANCE:
                return magnitude, eps
            best = min(best, gap)
    return Mismatch("post", best)


def _fit_res(sample: _Sample, result: Node, reads: _Reads, by_rows: bool, form: NativeForm) -> NativeForm | Mismatch:
    """Return the form with what makes its mixing matrix ours."""
    n = sample.piece.cut.n_streams
    logits = sample.logits(reads, n * n, form.norm_eps).unflatten(-1, (n, n))
    wanted = sample.values[result] if by_rows else sample.values[result].mT
    best, eps_of_best = float("inf"), form.eps
    for tried in _mixings(sample.piece, form):
        matrix = MANIFOLDS[tried.manifold].project(logits.mT if tried.transposed else logits, tried.iters, tried.eps)
        gap = _gap(wanted, matrix.mT if tried.columns_last else matrix)
        if gap <= TOLERANCE and tried.eps == form.eps:
            return tried
        if gap < best:
            best, eps_of_best = gap, tried.eps
    if best <= TOLERANCE:
        return Mismatch(f"res has eps {eps_of_best:g} where pre has {form.eps:g}")
    return Mismatch("res", best)


def _mixings(piece: Piece, form: NativeForm) -> Iterator[NativeForm]:
    """Yield what a mixing matrix may be, the likely first."""
    count = sum(op_name(node) in _NORMALIZATIONS for node in piece.nodes)
    iterations = [
        value for value in dict.fromkeys(((count + 1) // 2, count // 2, (count - 1) // 2, count)) if value > 0
    ]
    epsilons = dict.fromkeys((form.eps, *_small_numbers(piece)))
    for name, manifold in MANIFOLDS.items():
        if not (is_built_in(name) and manifold.gated and manifold.mixes and manifold.logits is None):
            continue
        for transposed in (True, False):
            for columns_last in (False, True):
                for eps in epsilons:
                    for iters in iterations if name == "sinkhorn" else [1]:
                        yield replace(
                            form, manifold=name, iters=iters, eps=eps, transposed=transposed, columns_last=columns_last
                        )


def _small_numbers(piece: Piece) -> list[float]:
    """Return what may be an eps: the piece's small numbers, and none."""
    small = [value for value in piece.numbers() if 0 < value <= _LARGEST_EPS]
    if any(op_name(node) == "rms_norm" for node in piece.nodes):
        small += [torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps]
    return [*dict.fromkeys(small), 0.0]


def _packed(groups: Sequence[_Reads], n: int) -> Mapping:
    rows = (n, n, n * n)
    return Mapping(
        phi=_joined([_or_constant(group.phi, count, 0.0) for group, count in zip(groups, rows, strict=False)]),
        scale=_joined([_or_constant(group.scale, 1, 1.0) for group in groups]),
        bias=_joined([_or_constant(group.bias, count, 0.0) for group, count in zip(groups, rows, strict=False)]),
        gain=groups[0].gain,
    )


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """Join neighbors that are consecutive rows of one tensor."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and part.leaf is not None and (last.leaf, last.stop) == (part.leaf, part.start):
            joined[-1] = replace(last, stop=part.stop)
        else:
            joined.append(part)
    return tuple(joined)


__all__ = ["Mismatch", "PieceError", "fit_head", "fit_site", "parameters_of"]
