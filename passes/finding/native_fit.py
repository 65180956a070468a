"""Which of our operators a piece of a model is: guessed from gradients and the numbers in it, then proved in float64.

What the piece's results read of each weight is told by their gradients: exactly the rows that a coefficient is made
of have one. What remains to be known (eps, iterations, orientation, the marginal that comes last) is tried. Nothing
depends on how the mathematics is spelled, and nothing is believed: the operator and the piece have to agree to 1e-9 on
streams and weights of several sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels.epsilons import eps_of_site
from ...kernels.manifolds import MANIFOLDS, is_built_in
from ..fx.dataflow import op_name, tensor_of
from ..fx.sources import path_of
from ..native import Mapping, NativeForm, Part
from .native_pieces import Piece
from .native_proof import TOLERANCE, Mismatch, gap_between, gradients, parameters_of, prove_head, prove_site

_LARGEST_EPS = 1e-2
# So near, a form is the one: a tiny eps in another place differs by more.
_SURE = 1e-13
# What logits may be multiplied by, beside what the piece's own numbers say.
_FACTORS = (1.0, 2.0, 0.5)
_LEAST_FACTOR, _LARGEST_FACTOR = 0.01, 200.0
# Of `torch.nn.functional.normalize`.
_SHORTEST = 1e-12
_Found = TypeVar("_Found")

_NORMALIZATIONS = {"softmax", "log_softmax", "logsumexp", "normalize", "div", "truediv", "itruediv", "div_"}


@dataclass(frozen=True)
class _Reads:
    """What one group of coefficients reads of the model's tensors, and how its logits are made of that.

    Attributes:
        phi: rows of weights.
        scale: one number, or none.
        bias: one number a row, or none.
        shift: another, that scale multiplies: the bias of the projection itself.
        gain: of the norm before the projection.
        norm_eps: of that norm.
        features_first: the streams are flattened as [C, n].
        factor: what the logits are multiplied by: the inverse of a temperature.
    """

    phi: Part
    scale: Part | None
    bias: Part | None
    gain: Part | None
    shift: Part | None = None
    norm_eps: float = 0.0
    features_first: bool = False
    factor: float = 1.0

    def mapping(self, rows: int) -> Mapping:
        """Return the mapping of this group alone."""
        return Mapping(
            (self.phi,),
            (self._numbers(self.scale, 1, 1.0),),
            (self._numbers(self.bias, rows, 0.0),),
            self.gain,
            self.features_first,
            (self.shift,) if self.shift is not None else (),
        )

    def readings(self) -> list[_Reads]:
        """Return what it may be: of numbers beside the rows, gradients do not tell whether scale multiplies them."""
        if self.bias is None or (self.scale is None and self.shift is None):
            return [self]
        return [self, replace(self, bias=self.shift, shift=self.bias)]

    def _numbers(self, part: Part | None, count: int, fill: float) -> Part:
        if part is None:
            return Part(None, 0, count, fill=fill * self.factor)
        return replace(part, factor=self.factor)


@dataclass
class _Sample:
    """One run of a piece."""

    piece: Piece
    given: dict[Node, Tensor]
    values: dict[Node, Tensor]

    @property
    def streams(self) -> Tensor:
        return self.given[self.piece.cut.node]

    def logits(self, reads: _Reads, rows: int) -> Tensor:
        """Return one group's logits [*, rows] as `pre` computes them."""
        cut = self.piece.cut
        leaves = [self.given[leaf] for leaf in self.piece.leaves]
        phi, scale, bias = parameters_of(reads.mapping(rows), leaves, cut.n_streams, cut.width)
        flat = self.streams.flatten(-2)
        inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + reads.norm_eps)
        return (flat @ phi.mT) * inverse_rms * scale + bias


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
    found = _fitted(lambda reading: _fit_pre(sample, layer_input, reading), reads)
    if isinstance(found, Mismatch):
        return found
    reads, eps = found
    groups = [reads]
    gates = _reads(sample, post, n)
    if isinstance(gates, Mismatch):
        return replace(gates, what=f"post {gates.what}")
    affine = _fitted(lambda reading: _fit_post(sample, post, reading), _normed_like(gates, reads))
    if isinstance(affine, Mismatch):
        return affine
    gates, magnitude, post_eps = affine
    groups.append(gates)
    form = NativeForm(
        Mapping((), (), ()), "identity", 1, reads.norm_eps, eps, magnitude=magnitude, post_eps=post_eps
    )  # fmt: skip
    if res is not None:
        mixing = _reads(sample, res, n * n)
        if isinstance(mixing, Mismatch):
            return replace(mixing, what=f"res {mixing.what}")
        like = _normed_like(mixing, reads)
        fitted = _fitted(lambda reading: _fit_res(sample, res, reading, mixes_by_rows, form), like)
        if isinstance(fitted, Mismatch):
            return fitted
        mixing, form = fitted
        groups.append(mixing)
    if any(group.gain != groups[0].gain for group in groups):
        return Mismatch("pre, post and res read norms of different weights")
    form = replace(form, mapping=_packed(groups, n))
    return prove_site(piece, layer_input, post, res, mixes_by_rows, form) or form


def fit_head(piece: Piece, output: Node) -> tuple[Mapping, float, float] | Mismatch:
    """Return (mapping, norm_eps, eps) of a learned readout, or what is in the way.

    Raises:
        PieceError: the piece cannot be run.
    """
    sample = _sample(piece)
    reads = _reads(sample, output, piece.cut.n_streams)
    if isinstance(reads, Mismatch):
        return reads
    found = _fitted(lambda reading: _fit_pre(sample, output, reading), reads)
    if isinstance(found, Mismatch):
        return found
    reads, eps = found
    mapping = _packed([reads], piece.cut.n_streams)
    return prove_head(piece, output, mapping, reads.norm_eps, eps) or (mapping, reads.norm_eps, eps)


def _fitted(fit: Callable[[_Reads], _Found | Mismatch], reads: _Reads) -> _Found | Mismatch:
    """Return the first fit of the readings, or how the likeliest differs."""
    first, *others = reads.readings()
    found = fit(first)
    for reading in others:
        if not isinstance(found, Mismatch):
            break
        other = fit(reading)
        found = found if isinstance(other, Mismatch) else other
    return found


def _normed_like(reads: _Reads, other: _Reads) -> _Reads:
    return replace(reads, norm_eps=other.norm_eps, features_first=other.features_first)


def _sample(piece: Piece) -> _Sample:
    given = piece.drawn(0, 1.0, 1.0)
    with torch.no_grad():
        return _Sample(piece, given, piece.run(given))


def _reads(sample: _Sample, result: Node, rows: int) -> _Reads | Mismatch:
    """Tell by gradients what a result, made of `rows` coefficients a token, reads of each of the model's tensors."""
    piece = sample.piece
    flat = piece.cut.flat
    leaves = [sample.given[leaf].detach().requires_grad_() for leaf in piece.leaves]
    values = piece.run({**sample.given, **dict(zip(piece.leaves, leaves, strict=True))})
    if not values[result].requires_grad:
        return Mismatch("reads no weights, or has no gradient")
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(values[result].shape, generator=generator, dtype=torch.float64)
    grads = gradients(values[result], weights, leaves)
    found: dict[str, Part] = {}
    for index, grad in enumerate(grads):
        if not (touched := grad != 0).any():
            continue
        kind, part = _kind_of(index, touched, rows, flat)
        if kind is None:
            return Mismatch(f"reads {int(touched.sum())} numbers of {path_of(piece.leaves[index])}, which fits nothing")
        if kind == "bias" and kind in found and "shift" not in found:
            kind = "shift"
        if kind in found:
            first = found[kind].leaf
            assert first is not None
            return Mismatch(f"has two of {kind}: {path_of(piece.leaves[first])} and {path_of(piece.leaves[index])}")
        found[kind] = part
    if "phi" not in found:
        return Mismatch("is no projection of the flattened streams")
    return _Reads(found["phi"], found.get("scale"), found.get("bias"), found.get("gain"), found.get("shift"))


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


def _fit_pre(sample: _Sample, result: Node, reads: _Reads) -> tuple[_Reads, float] | Mismatch:
    """Return what pre reads, and its eps, with which a collapse is nearest to ours."""
    piece = sample.piece
    tries: list[tuple[float, _Reads, float]] = []
    for features_first in (False, True):
        for norm_eps in _norm_epsilons(piece):
            read = replace(reads, norm_eps=norm_eps, features_first=features_first)
            logits = sample.logits(read, piece.cut.n_streams)
            for factor in _factors(piece):
                gate = torch.sigmoid(factor * logits)
                for eps in _small_numbers(piece):
                    ours = ((gate + eps).unsqueeze(-2) @ sample.streams).squeeze(-2)
                    gap = gap_between(sample.values[result], ours)
                    tries.append((gap, replace(read, factor=factor), eps))
        gap, read, eps = min(tries, key=lambda entry: entry[0])
        if gap <= TOLERANCE:
            return read, eps
    return Mismatch("pre", gap)


def _fit_post(sample: _Sample, result: Node, reads: _Reads) -> tuple[_Reads, float, float] | Mismatch:
    """Return what post reads, with its magnitude and eps, with which it is nearest to ours."""
    piece = sample.piece
    logits = sample.logits(reads, piece.cut.n_streams)
    numbers = [value for value in piece.numbers() if 0.05 <= value <= 100]
    tries: list[tuple[float, _Reads, float, float]] = []
    for factor in _factors(piece):
        gate = torch.sigmoid(factor * logits)
        for magnitude in dict.fromkeys((2.0, 1.0, *numbers)):
            for eps in _small_numbers(piece):
                gap = gap_between(sample.values[result], magnitude * gate + eps)
                tries.append((gap, replace(reads, factor=factor), magnitude, eps))
    gap, read, magnitude, eps = min(tries, key=lambda entry: entry[0])
    return (read, magnitude, eps) if gap <= TOLERANCE else Mismatch("post", gap)


def _fit_res(
    sample: _Sample, result: Node, reads: _Reads, by_rows: bool, form: NativeForm
) -> tuple[_Reads, NativeForm] | Mismatch:
    """Return what res reads, and the form with what makes the mixing matrix ours."""
    n = sample.piece.cut.n_streams
    logits = sample.logits(reads, n * n).unflatten(-1, (n, n))
    wanted = sample.values[result] if by_rows else sample.values[result].mT
    best, nearest, read = float("inf"), form, reads
    for tried in _mixings(sample.piece, result, form):
        for factor in _factors(sample.piece):
            given = factor * (logits.mT if tried.transposed else logits)
            within = eps_of_site(tried.eps, tried.sinkhorn_eps, tried.manifold)
            matrix = MANIFOLDS[tried.manifold].project(given, tried.iters, within)
            gap = gap_between(wanted, matrix.mT if tried.columns_last else matrix)
            if gap < best:
                best, nearest, read = gap, tried, replace(reads, factor=factor)
            if gap <= _SURE:
                return read, nearest
    return (read, nearest) if best <= TOLERANCE else Mismatch("res", best, f"from {nearest.mixing}")


def _mixings(piece: Piece, result: Node, form: NativeForm) -> Iterator[NativeForm]:
    """Yield what a mixing matrix may be, the likely first."""
    count = sum(op_name(node) in _NORMALIZATIONS for node in piece.before(result))
    likely = [value for value in dict.fromkeys(((count + 1) // 2, count // 2, (count - 1) // 2, count)) if value > 0]
    others = [value for value in range(1, count) if value not in likely]
    ways = [(transposed, columns_last) for transposed in (True, False) for columns_last in (False, True)]
    for name, manifold in MANIFOLDS.items():
        if not (is_built_in(name) and manifold.gated and manifold.mixes and manifold.logits is None):
            continue
        tries: list[tuple[tuple[float, ...], int]] = [((), 1)]
        if name == "sinkhorn":
            tries = [(places, iters) for places in _places(piece) for iters in likely or [1]]
            tries += [((), iters) for iters in others]
        for places, iters in tries:
            for transposed, columns_last in ways:
                yield replace(
                    form,
                    manifold=name,
                    iters=iters,
                    sinkhorn_eps=places,
                    transposed=transposed,
                    columns_last=columns_last,
                )


def _places(piece: Piece) -> Iterator[tuple[float, ...]]:
    """Yield what `sinkhorn_eps` may be, the likely first: that of pre as DeepSeek-V4 has it, and one of its own."""
    yield ()
    for eps in _small_numbers(piece):
        yield from dict.fromkeys(((eps, 0.0, eps), (0.0, eps, eps), (0.0, 0.0, eps)))


def _small_numbers(piece: Piece) -> list[float]:
    """Return what may be an eps: the piece's small numbers, and none."""
    return [*dict.fromkeys((*(value for value in piece.numbers() if 0 < value <= _LARGEST_EPS), 0.0))]


def _norm_epsilons(piece: Piece) -> list[float]:
    """Return what may be the eps of the norm: also what a norm has that is given none, or that clamps the length."""
    small = _small_numbers(piece)
    dtypes = {tensor.dtype for node in piece.moving if (tensor := tensor_of(node)) is not None}
    own = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point]
    # x / max(|x|, 1e-12), times the root of the number of features.
    lengths = [value**2 / piece.cut.flat for value in (*small, _SHORTEST) if value > 0]
    return [*dict.fromkeys((*small, *own, *lengths))]


def _factors(piece: Piece) -> list[float]:
    """Return what logits may be multiplied by, the likely first: temperatures and their inverses among them."""
    numbers = [number for value in piece.numbers() if value > 0 for number in (1.0 / value, value)]
    return [*dict.fromkeys((*_FACTORS, *(n for n in numbers if _LEAST_FACTOR <= n <= _LARGEST_FACTOR)))]


def _packed(groups: Sequence[_Reads], n: int) -> Mapping:
    alone = [group.mapping(rows) for group, rows in zip(groups, (n, n, n * n), strict=False)]
    return Mapping(
        phi=_joined([part for mapping in alone for part in mapping.phi]),
        scale=_joined([part for mapping in alone for part in mapping.scale]),
        bias=_joined([part for mapping in alone for part in mapping.bias]),
        gain=groups[0].gain,
        features_first=groups[0].features_first,
        shift=_shifts(groups, n),
    )


def _shifts(groups: Sequence[_Reads], n: int) -> tuple[Part, ...]:
    if all(group.shift is None for group in groups):
        return ()
    return tuple(group.shift or Part(None, 0, rows) for group, rows in zip(groups, (n, n, n * n), strict=False))


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """Join neighbors that are consecutive rows of one tensor."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and part.leaf is not None and last == replace(part, start=last.start, stop=part.start):
            joined[-1] = replace(last, stop=part.stop)
        else:
            joined.append(part)
    return tuple(joined)
