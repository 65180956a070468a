"""Arguments of GPU operators by the names of their parameters, for tools that call every operator and run none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mhc_compile.kernels.dispatch import kernel_of
from mhc_compile.kernels.epsilons import Eps, epsilons
from mhc_compile.kernels.manifolds import MANIFOLDS
from mhc_compile.kernels.orientation import ROWS_FIRST, PhiLayout


@dataclass(frozen=True)
class Case:
    """Shapes to launch with."""

    n: int
    dtype: torch.dtype
    tokens: int
    width: int = 4096
    manifold: str = "sinkhorn"
    anchored: bool = False
    centered: bool = True
    layout: PhiLayout = ROWS_FIRST
    eps: Eps = 0.0

    @property
    def label(self) -> str:
        """Short name for the table."""
        words = [f"n={self.n} {str(self.dtype).removeprefix('torch.')} {self.tokens}×{self.width}"]
        words += ["anchored"] * self.anchored + [self.manifold] * (self.manifold != "sinkhorn")
        words += ["eps in every sum" if epsilons(self.eps).first else "eps"] * epsilons(self.eps).within
        words += ["columns"] * self.layout.columns + ["[in, out]"] * self.layout.transposed
        return " ".join(words)


def arguments_of(name: str, case: Case, device: str = "meta") -> list[Any]:
    """Return the arguments of an operator or a backward for a case: streams in its dtype, the rest in float32."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    family = MANIFOLDS[case.manifold]
    tokens, n, width = case.tokens, case.n, case.width
    rows, scales = (n, 1) if name.startswith("head") else (family.rows(n), family.scales)
    makers: dict[str, Callable[[], Any]] = {
        **dict.fromkeys(("streams", "fresh"), lambda: make(tokens, n, width, dtype=case.dtype)),
        **dict.fromkeys(("branch", "layer_input", "normed", "output"), lambda: make(tokens, width, dtype=case.dtype)),
        **dict.fromkeys(("post", "next_post"), lambda: make(tokens, n)),
        **dict.fromkeys(("res", "next_res", "logits"), lambda: make(tokens, n, n)),
        **dict.fromkeys(("norm_weight", "norm_bias"), lambda: make(width, dtype=case.dtype)),
        "statistics": lambda: make(tokens, 2),
        "layer_eps": lambda: 1e-5,
        "centered": lambda: case.centered,
        "phi": lambda: make(n * width, rows) if case.layout.columns else make(rows, n * width),
        "scale": lambda: make(scales),
        "bias": lambda: make(rows),
        "projection": lambda: make(tokens, rows + 1),
        "iters": lambda: 20,
        "norm_eps": lambda: 1e-6,
        "eps": lambda: case.eps,
        "manifold": lambda: case.manifold,
        "anchored": lambda: case.anchored,
        "layout": lambda: case.layout,
    }
    return [makers[parameter.removeprefix("grad_")]() for parameter in inspect.signature(kernel_of(name)).parameters]
