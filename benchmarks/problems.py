"""Problems for the operators: shapes, random inputs, least traffic, and the check against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from mhc_compile.kernels.costs import traffic
from mhc_compile.kernels.dispatch import reference_of
from mhc_compile.kernels.ops import OPERATORS
from torch import Tensor

ITERS = 20
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """One problem to check or to measure.

    Attributes:
        operator: a name of `OPERATORS`.
        tokens: rows of streams.
        n: streams.
        width: channels C.
        dtype: of streams and branch.
    """

    operator: str
    tokens: int
    n: int
    width: int
    dtype: torch.dtype

    def traffic(self, backward: bool) -> int:
        """Least bytes between the device's memory and its processors: each input and output once."""
        passes = traffic.OPERATORS[self.operator]
        least = (passes.backward if backward else passes.forward).least
        sizes = {"tokens": self.tokens, "n_streams": self.n, "width": self.width}
        return int(traffic.evaluate(least.bytes, **sizes, element_size=self.dtype.itemsize))

    def with_tokens(self, tokens: int) -> Shape:
        """Return the same problem with another number of tokens."""
        return replace(self, tokens=tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON types."""
        names = {"operator": self.operator, "tokens": self.tokens, "n": self.n, "width": self.width}
        return {**names, "dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        """Return a short name, as it appears in lists of failures."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator}, {self.tokens} tokens, n={self.n}, C={self.width}, {dtype}"


def make_inputs(shape: Shape, device: str, seed: int = 0) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return the operator's random tensors and its constants."""
    # Drawn on the device: 8192 tokens of 4 x 4096 take seconds to draw on a CPU.
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    tokens, n, width = shape.tokens, shape.n, shape.width
    rows = n if shape.operator == "head" else n * n + 2 * n
    site = (ITERS, NORM_EPS, 0.0, "sinkhorn")
    if shape.operator == "sinkhorn":
        return (normal(tokens, n, n),), (ITERS, 0.0)
    streams = normal(tokens, n, width).to(shape.dtype)
    scale = torch.ones(1 if shape.operator == "head" else 3, device=device)
    mapping = (normal(rows, n * width) / (n * width) ** 0.5, scale, normal(rows))
    if shape.operator in ("pre", "paper_pre"):
        return (streams, *mapping), site
    if shape.operator == "head":
        return (streams, *mapping), (NORM_EPS, 0.0)
    coefficients = (normal(tokens, n).sigmoid() * 2, normal(tokens, n, n).softmax(-1))
    branch = normal(tokens, width).to(shape.dtype)
    if shape.operator == "post":
        return (streams, branch, *coefficients), ()
    return (streams, branch, *coefficients, *mapping), site


def many(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one or several outputs as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def excess(mine: Tensor, theirs: Tensor, true: Tensor, dtype: torch.dtype) -> str | None:
    """Return what is wrong with a result, None if nothing is.

    Args:
        mine: the result.
        theirs: plain PyTorch's in the same dtype: the error that is allowed, and one rounding more.
        true: the result in float64.
        dtype: of the streams.
    """
    if not mine.numel():
        return None
    error, allowed = ((part.double() - true).abs().max().item() for part in (mine, theirs))
    size = max(true.abs().max().item(), 1e-3)
    slack = (64 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2) * size
    # Not `error > …`: a NaN is wrong too.
    return None if error <= allowed + slack else f"errs by {error:.2e}, plain PyTorch by {allowed:.2e}"


def check(shape: Shape, device: str) -> list[str]:
    """Return what is wrong: errors beyond those of plain PyTorch in that dtype and one rounding."""
    tensors, constants = make_inputs(shape, device)
    operator = OPERATORS[shape.operator]
    grads = tuple(torch.randn_like(out) for out in many(operator.forward(*tensors, *constants)))
    calls = (
        ("forward", operator.forward, reference_of(shape.operator), ()),
        ("backward", operator.backward, reference_of(f"{shape.operator}_backward"), grads),
    )
    problems = []
    for name, kernel, plain, extra in calls:
        given = (*extra, *tensors)
        truth = many(plain(*(tensor.double() for tensor in given), *constants))
        results = zip(many(kernel(*given, *constants)), many(plain(*given, *constants)), truth, strict=True)
        for index, (mine, theirs, true) in enumerate(results):
            wrong = excess(mine, theirs, true, shape.dtype)
            if wrong:
                problems.append(f"{shape}: {name}, output {index} {wrong}")
    return problems


def shapes_to_check(quick: bool, device: str) -> list[Shape]:
    """Return both regimes of token counts, several numbers of streams and widths, every dtype.

    The most used first: a kernel is compiled for each n and dtype, which takes most of the time.
    """
    tokens = (1, 3, 65) if quick or device == "cpu" else (1, 3, 64, 127, 1000)
    widths = (40,) if device == "cpu" else (4096, 17, 5129)
    streams = (4, 2, 5) if quick or device == "cpu" else (4, 2, 8, 1, 3, 5, 6, 7)
    return [
        Shape(operator, count, n, width, dtype)
        for n in streams
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for width in widths
        for operator in OPERATORS
        for count in tokens
    ]
