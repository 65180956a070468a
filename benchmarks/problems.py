"""Problems for the operators: shapes, random inputs, least traffic, and the check against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from mhc_compile.kernels.costs import traffic
from mhc_compile.kernels.dispatch import reference_of
from mhc_compile.kernels.manifolds import MANIFOLDS
from mhc_compile.kernels.ops import OPERATORS, Operator
from torch import Tensor

ITERS = 20
NORM_EPS = 1e-6
_WITHOUT_LAYOUT = ("sinkhorn", "post")


@dataclass(frozen=True)
class Shape:
    """One problem to check or to measure.

    Attributes:
        operator: a name of `OPERATORS`.
        tokens: rows of streams.
        n: streams.
        width: channels C.
        dtype: of streams and branch.
        anchored: how the streams are held, where the operator asks; as in rewritten graphs by default.
        manifold: of the mixing matrix, where the operator makes one.
    """

    operator: str
    tokens: int
    n: int
    width: int
    dtype: torch.dtype
    anchored: bool = True
    manifold: str = "sinkhorn"

    def traffic(self, backward: bool) -> int:
        """Least bytes between the device's memory and its processors: each input and output once."""
        passes = traffic.OPERATORS[self.operator]
        least = (passes.backward if backward else passes.forward).least
        sizes = {"tokens": self.tokens, "n_streams": self.n, "width": self.width}
        return int(traffic.evaluate(least.bytes, self.manifold, **sizes, element_size=self.dtype.itemsize))

    def with_tokens(self, tokens: int) -> Shape:
        """Return the same problem with another number of tokens."""
        return replace(self, tokens=tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON types."""
        names = {"operator": self.operator, "tokens": self.tokens, "n": self.n, "width": self.width}
        return {**names, "dtype": str(self.dtype).removeprefix("torch."), "anchored": self.anchored}

    def __str__(self) -> str:
        """Return a short name, as it appears in lists of failures."""
        dtype = str(self.dtype).removeprefix("torch.")
        layout = "" if self.anchored or self.operator in _WITHOUT_LAYOUT else ", plain layout"
        manifold = "" if self.manifold == "sinkhorn" else f", {self.manifold}"
        return f"{self.operator}, {self.tokens} tokens, n={self.n}, C={self.width}, {dtype}{layout}{manifold}"


def make_inputs(shape: Shape, device: str, seed: int = 0) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return the operator's random tensors and its constants; on the device "meta" they have no memory."""
    # Drawn on the device: 8192 tokens of 4 x 4096 take seconds to draw on a CPU.
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    tokens, n, width = shape.tokens, shape.n, shape.width
    family = MANIFOLDS[shape.manifold]
    rows = n if shape.operator == "head" else family.rows(n)
    site = (ITERS, NORM_EPS, 0.0, shape.manifold, shape.anchored)
    if shape.operator == "sinkhorn":
        return (normal(tokens, n, n),), (ITERS, 0.0)
    streams = normal(tokens, n, width).to(shape.dtype)
    scale = torch.ones(1 if shape.operator == "head" else family.scales, device=device)
    mapping = (normal(rows, n * width) / (n * width) ** 0.5, scale, normal(rows))
    if shape.operator in ("pre", "paper_pre", "measure"):
        return (streams, *mapping), site
    if shape.operator == "collapse":
        return (streams, *mapping, *many(OPERATORS["measure"].forward(streams, *mapping, *site))), site

    def norm() -> tuple[Tensor, Tensor]:
        # Drawn where it is wanted, so that problems without are what they were.
        return normal(width).to(shape.dtype), normal(width).to(shape.dtype)

    normed_site = (*site[:4], NORM_EPS, False, *site[4:])
    if shape.operator == "pre_norm":
        return (streams, *norm(), *mapping), normed_site
    if shape.operator == "collapse_norm":
        measured = many(OPERATORS["measure"].forward(streams, *mapping, *site))
        return (streams, *norm(), *mapping, *measured), normed_site
    if shape.operator == "head":
        return (streams, *mapping), (NORM_EPS, 0.0, shape.anchored)
    coefficients = (normal(tokens, n).sigmoid() * 2, normal(tokens, n, n).softmax(-1))
    branch = normal(tokens, width).to(shape.dtype)
    if shape.operator == "post":
        return (streams, branch, *coefficients), ()
    tensors = (streams, branch, *coefficients, *mapping)
    if shape.operator in ("post_pre_norm", "post_collapse_norm"):
        halved = shape.operator == "post_collapse_norm"
        measured = many(OPERATORS["post_measure"].forward(*tensors, *site)) if halved else ()
        return (*tensors[:4], *norm(), *mapping, *measured), normed_site
    if shape.operator == "post_collapse":
        tensors = (*tensors, *many(OPERATORS["post_measure"].forward(*tensors, *site)))
    return tensors, site


def many(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one or several outputs as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def sizes_of(results: Sequence[Tensor]) -> list[float]:
    """Return the largest entries of an operator's true outputs or gradients, which their errors are measured by.

    Where gradients of scale and bias come last, scale's sums the terms of bias's, which cancel: it errs by as much as
    they do.
    """
    sizes = [max(true.abs().max().item(), 1e-3) if true.numel() else 0.0 for true in results]
    if len(results) >= 4 and results[-1].dim() == 1:
        sizes[-2] = max(sizes[-2:])
    return sizes


def excess(mine: Tensor, theirs: Tensor, true: Tensor, size: float, held: torch.dtype | None = None) -> str | None:
    """Return what is wrong with a result, None if nothing is.

    Args:
        mine: the result.
        theirs: plain PyTorch's in the same dtype: the error that is allowed, and one rounding of that dtype more.
        true: the result in float64.
        size: of its entries, from `sizes_of`.
        held: dtype of an intermediate that the result is a product with, where it is narrower.
    """
    if not mine.numel():
        return None
    error, allowed = ((part.double() - true).abs().max().item() for part in (mine, theirs))
    # Sums are taken in another order, and products with bfloat16 streams take float32 factors in 16 bits: 64 roundings
    # of float32 each.
    slack = 128 * torch.finfo(torch.float32).eps * size
    narrowest = held or mine.dtype
    if narrowest != torch.float32:
        slack += torch.finfo(narrowest).eps / 2 * size
    # Not `error > …`: a NaN is wrong too.
    return None if error <= allowed + slack else f"errs by {error:.2e}, plain PyTorch by {allowed:.2e}"


def held_dtype(shape: Shape, index: int) -> torch.dtype | None:
    """Return `excess`'s `held` of a gradient: a boundary holds that of its new streams in their dtype."""
    behind_post = shape.operator in ("post_pre", "post_collapse", "post_pre_norm", "post_collapse_norm")
    return shape.dtype if behind_post and index in (2, 3) else None


def check(shape: Shape, device: str) -> list[str]:
    """Return what is wrong: errors beyond those of plain PyTorch in that dtype and one rounding."""
    tensors, constants = make_inputs(shape, device)
    operator = OPERATORS[shape.operator]
    count = len(operator.signature.outputs)
    given = tuple(tensor.double() for tensor in tensors)
    plain = reference_of(shape.operator)
    outputs = tuple(
        many(call(*arguments, *constants))
        for call, arguments in ((operator.forward, tensors), (plain, tensors), (plain, given))
    )
    problems = _excesses(f"{shape}: forward", outputs)
    if operator.backward is not None:
        generator = torch.Generator(device).manual_seed(1)
        grads = tuple(
            torch.randn(out.shape, generator=generator, device=device).to(out.dtype) for out in outputs[0][:count]
        )
        wide = tuple(grad.double() for grad in grads)
        inputs = len(operator.signature.inputs)
        plain = reference_of(operator.backward._name)
        results = tuple(
            many(call(*into, *held[:inputs], *saved(operator, held, made), *constants))
            for call, into, held, made in (
                (operator.backward, grads, tensors, outputs[0]),
                (plain, grads, tensors, outputs[1]),
                (plain, wide, given, outputs[2]),
            )
        )
        problems += _excesses(f"{shape}: backward", results, [held_dtype(shape, index) for index in range(inputs)])
    return problems


def saved(operator: Operator, tensors: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return what an operator's backward takes beside its inputs, of its tensors and outputs."""
    signature = operator.signature
    named = dict(zip((*signature.tensors, *signature.results), (*tensors, *outputs), strict=True))
    return tuple(named[name] for name in signature.saved)


def _excesses(
    what: str, results: tuple[tuple[Tensor, ...], ...], held: Sequence[torch.dtype | None] | None = None
) -> list[str]:
    rest = (sizes_of(results[2]), held or [None] * len(results[0]))
    found = (excess(*each) for each in zip(*results, *rest, strict=True))
    return [f"{what}, output {index} {wrong}" for index, wrong in enumerate(found) if wrong]


def shapes_to_check(quick: bool, device: str) -> list[Shape]:
    """Return both regimes of token counts, several numbers of streams and widths, every dtype.

    The most used first: a kernel is compiled for each n and dtype, which takes most of the time.
    """
    tokens = (1, 3, 65) if quick or device == "cpu" else (1, 3, 64, 100, 127, 1000)
    widths = (40,) if device == "cpu" else (4096, 17, 5129)
    streams = (4, 2, 5) if quick or device == "cpu" else (4, 2, 8, 1, 3, 5, 6, 7)
    return [
        Shape(operator, count, n, width, dtype, anchored)
        for anchored in (True, False)
        for n in (streams if anchored else streams[:1])
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for width in widths
        for operator in OPERATORS
        if anchored or operator not in _WITHOUT_LAYOUT
        for count in tokens
    ]
