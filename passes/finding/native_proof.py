"""Prove that a piece of a model is one of our operators: outputs and gradients in float64, on several sizes of numbers.

Outputs alone would not do: a value that the model detaches, or computes without gradients, has the right value and
another gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...kernels import reference
from ..native import Mapping, NativeForm, Part
from .native_pieces import Piece, PieceError

TOLERANCE = 1e-9
# Gradients are differences of nearly equal numbers.
GRADIENT_TOLERANCE = 1e-6
# Sizes of weights and of streams that a form is proved for.
_SCALES = ((1.0, 1.0), (3.0, 30.0), (0.2, 0.02))


@dataclass(frozen=True)
class Mismatch:
    """The first thing that is not as in our operators.

    Attributes:
        what: such as "res".
        gap: the difference to the nearest that was tried, relative to the largest entry; None where none was.
        nearest: what that is, or on which numbers it differs; "" where there is nothing to say.
        of_gradient: the values agree, and what differs is their gradient.
    """

    what: str
    gap: float | None = None
    nearest: str = ""
    of_gradient: bool = False

    def __str__(self) -> str:
        """Return it as a phrase."""
        told = self.what if self.gap is None else f"{self.what} differs by {self.gap:.1e}"
        return f"{told} {self.nearest}" if self.nearest else told


def parameters_of(mapping: Mapping, leaves: Sequence[Tensor], n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return phi [rows, n·C], scale and bias that a mapping makes of the model's tensors."""
    flat = n * width

    def vector(parts: tuple[Part, ...]) -> Tensor:
        like = leaves[0]
        return torch.cat(
            [
                like.new_full((part.stop - part.start,), part.fill)
                if part.leaf is None
                else leaves[part.leaf].reshape(-1)[part.start : part.stop] * part.factor
                for part in parts
            ]
        )

    def rows(part: Part) -> Tensor:
        if part.leaf is None:
            return leaves[0].new_zeros(part.stop - part.start, flat)
        leaf = leaves[part.leaf]
        return (leaf.reshape(flat, -1).mT if part.columns else leaf.reshape(-1, flat))[part.start : part.stop]

    phi = torch.cat([rows(part) for part in mapping.phi])
    if mapping.gain is not None:
        assert mapping.gain.leaf is not None
        phi = phi * leaves[mapping.gain.leaf].reshape(-1)
    if mapping.features_first:
        phi = phi.unflatten(-1, (width, n)).mT.flatten(-2)
    scale, bias = vector(mapping.scale), vector(mapping.bias)
    if mapping.shift:
        bias = bias + torch.cat([one * vector((part,)) for one, part in zip(scale, mapping.shift, strict=True)])
    return phi, scale, bias


def prove_site(
    piece: Piece, layer_input: Node, post: Node, res: Node | None, mixes_by_rows: bool, form: NativeForm
) -> Mismatch | None:
    """Compare a piece with `pre` on streams and weights of several sizes; None where they agree."""

    def ours(streams: Tensor, parameters: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        layout = (False, form.transposed)
        site: tuple[Any, ...] = (form.iters, form.norm_eps, form.eps, form.manifold, *layout, form.sinkhorn_eps)
        got = reference.pre(streams, *parameters, *site)
        matrix = got.res.mT if form.columns_last == mixes_by_rows else got.res
        gates = got.post * (form.magnitude / 2) + form.post_eps
        return [got.layer_input, gates] if res is None else [got.layer_input, gates, matrix]

    results = [("pre", layer_input), ("post", post), *([("res", res)] if res is not None else [])]
    return _prove(piece, results, form.mapping, ours)


def prove_head(piece: Piece, output: Node, mapping: Mapping, norm_eps: float, eps: float) -> Mismatch | None:
    """Compare a piece with `head`; None where they agree."""

    def ours(streams: Tensor, parameters: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        output, _ = reference.head(streams, *parameters, norm_eps, eps)
        return [output]

    return _prove(piece, [("the readout", output)], mapping, ours)


def _prove(
    piece: Piece,
    results: list[tuple[str, Node]],
    mapping: Mapping,
    ours: Callable[[Tensor, tuple[Tensor, Tensor, Tensor]], list[Tensor]],
) -> Mismatch | None:
    cut = piece.cut
    for seed, (weight, size) in enumerate(_SCALES):
        drawn = {node: value.requires_grad_() for node, value in piece.drawn(seed + 1, weight, size).items()}
        given = [drawn[cut.node], *(drawn[leaf] for leaf in piece.leaves)]
        values = piece.run(dict(drawn))
        got = ours(given[0], parameters_of(mapping, given[1:], cut.n_streams, cut.width))
        wanted = [values[node].reshape(value.shape) for (_, node), value in zip(results, got, strict=True)]
        # Saturated coefficients have gradients of rounding alone.
        found = first_difference([name for name, _ in results], wanted, got, given if weight <= 1.0 else ())
        if found is not None:
            told = f"with weights {weight:g} and streams {size:g} times the usual size, not at that" if seed else ""
            return replace(found, nearest=told)
    if piece.untried:
        return Mismatch(f"{next(iter(piece.untried)).name} chooses or clamps, and no number that was tried is beyond")
    return None


def first_difference(
    names: Sequence[str], wanted: Sequence[Tensor], got: Sequence[Tensor], given: Sequence[Tensor]
) -> Mismatch | None:
    """Return the first result that differs, in value or in its gradients with respect to what was given.

    Args:
        names: of the results.
        wanted: the model's.
        got: ours.
        given: what both were computed from; the first are the streams [*, n, C], which are compared by tokens. Nothing,
            if gradients do not matter.
    """
    with torch.no_grad():
        for name, left, right in zip(names, wanted, got, strict=True):
            if (gap := gap_between(left, right)) > TOLERANCE:
                return Mismatch(name, gap)
    if not given:
        return None
    for name, left, right in zip(names, wanted, got, strict=True):
        weights = torch.randn(left.shape, generator=torch.Generator().manual_seed(7), dtype=left.dtype)
        pairs = list(zip(gradients(left, weights, given), gradients(right, weights, given), strict=True))
        sizes = [max(float(theirs.abs().max()), float(ours.abs().max()), 1e-12) for theirs, ours in pairs]
        theirs, ours, difference = (
            gradient.flatten(0, -3).abs().amax((-2, -1)) for gradient in (*pairs[0], pairs[0][0] - pairs[0][1])
        )
        tokens = theirs.maximum(ours)
        gaps = [float((difference / tokens.maximum(tokens.median()).clamp(min=1e-12)).max())]
        gaps += [
            float((theirs - ours).abs().max()) / max(size, 1e-6 * max(sizes[1:]))
            for (theirs, ours), size in zip(pairs[1:], sizes[1:], strict=True)
        ]
        gap = max(gaps) if all(gap == gap for gap in gaps) else float("inf")
        if gap > GRADIENT_TOLERANCE:
            return Mismatch(f"the gradient of {name}", gap, of_gradient=True)
    return None


def gap_between(theirs: Tensor, ours: Tensor) -> float:
    """Return the largest difference, relative to the largest entry where that is above 1; tokens may be flattened."""
    if theirs.numel() != ours.numel():
        return float("inf")
    gap = float((theirs.reshape(ours.shape) - ours).abs().max()) / max(1.0, float(theirs.abs().max()))
    return gap if gap == gap else float("inf")


def gradients(value: Tensor, weights: Tensor, given: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of the sum of a value times weights; zeros where it depends on nothing.

    Raises:
        PieceError: a hook, or a derivative of the model's own, cannot be run here.
    """
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in given]
    try:
        found = torch.autograd.grad((value * weights).sum(), given, retain_graph=True, allow_unused=True)
    except Exception as error:
        raise PieceError(f"its gradient cannot be run: {error}") from error
    return [
        torch.zeros_like(tensor) if gradient is None else gradient
        for tensor, gradient in zip(given, found, strict=True)
    ]
