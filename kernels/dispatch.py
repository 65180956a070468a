"""Which implementation a call takes: the Triton kernels, the compiled C++ of `cpu`, or plain PyTorch.

On a CUDA or ROCm device the Triton kernels, on a CPU the C++, which is compiled at its first call. Plain PyTorch takes
what neither covers: float64, more than 8 streams, manifolds that others register, a machine without a C++ compiler, and
on a CPU the operators with a norm, which a graph for a CPU does not call.
Triton is imported on the first call that uses it, so that the operators work without it.

The environment variable `MHC_KERNELS`, or `choosing` for a block of code, overrides the choice: `reference` always
takes plain PyTorch; `cpu` takes the C++ on CPU tensors, or says why there is none; `triton` also runs the kernels on
CPU tensors, which needs Triton's interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import boundary, normed, reference
from .cpu import build
from .manifolds import MANIFOLDS, MAX_STREAMS, is_built_in
from .orientation import in_layout

CHOICES = ("auto", "triton", "cpu", "reference")

_KERNEL_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))
_chosen: str | None = None
# Operators of `gpu`, by function: those whose backward is another's share what is prepared of it.
_prepared: dict[Callable[..., Any], Callable[..., Any]] = {}


@contextlib.contextmanager
def choosing(choice: str) -> Iterator[None]:
    """Inside, operators take the given choice, one of `CHOICES`."""
    if choice not in CHOICES:
        raise ValueError(f"{choice!r} is not one of {', '.join(CHOICES)}")
    global _chosen
    previous, _chosen = _chosen, choice
    try:
        yield
    finally:
        _chosen = previous


def current_choice() -> str:
    """Return the choice in force."""
    return _chosen or os.environ.get("MHC_KERNELS", "auto")


@functools.cache
def have_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def covered(tensors: tuple[Tensor, ...], n_streams: int, manifold: str) -> bool:
    """Whether the kernels cover these dtypes, this number of streams and this manifold."""
    return (
        1 <= n_streams <= MAX_STREAMS
        and all(tensor.dtype in _KERNEL_DTYPES for tensor in tensors)
        and manifold in MANIFOLDS
        # A copy with another `project` names a kernel that does not compute it.
        and is_built_in(manifold)
        and MANIFOLDS[manifold].kernel_matrix is not None
    )


def implementation(
    tensors: tuple[Tensor, ...],
    n_streams: int,
    manifold: str = "sinkhorn",
    device: torch.device | None = None,
) -> str:
    """Return what a call takes: "triton", "cpu" (the compiled C++) or "reference" (plain PyTorch).

    Args:
        tensors: of the call; the first is of the streams' dtype.
        n_streams: n.
        manifold: a name of `MANIFOLDS`.
        device: where the tensors would be; None for where they are.

    Raises:
        BuildError: `MHC_KERNELS=cpu` asks for the C++, which cannot be compiled here.
    """
    choice = current_choice()
    kind = (device or tensors[0].device).type
    if choice == "reference" or kind not in ("cuda", "cpu") or not covered(tensors, n_streams, manifold):
        return "reference"
    if kind == "cuda" or choice == "triton":
        return "triton" if choice != "cpu" and have_triton() else "reference"
    reason = build.why_not(n_streams, tensors[0].dtype)
    if reason is not None and choice == "cpu":
        raise build.BuildError(f"MHC_KERNELS=cpu: {reason}. MHC_KERNELS=auto takes plain PyTorch instead.")
    return "cpu" if reason is None else "reference"


def run(
    name: str,
    tensors: tuple[Tensor, ...],
    n_streams: int,
    manifold: str,
    constants: tuple[Any, ...],
    kernel_constants: tuple[Any, ...],
    phi_at: int | None = None,
    transposed: bool = False,
) -> Any:
    """Call operator `name` (or `name_backward`) in the implementation that fits.

    Args:
        name: of an operator or its backward.
        tensors: of the call.
        n_streams: n.
        manifold: a name of `MANIFOLDS`.
        constants: of the call, as plain PyTorch takes them.
        kernel_constants: the same as kernels take them, which are given phi's layout beside them.
        phi_at: where phi, scale and bias begin among the tensors, None without.
        transposed: as in `PhiLayout`.
    """
    streams = tensors[0]
    chosen = implementation(tensors, n_streams, manifold)
    given = (tensors, kernel_constants, phi_at, name.endswith("_backward"), transposed)
    compiled = compiled_of(name) if chosen == "cpu" else None
    if compiled is not None:
        return in_layout(compiled, *given)
    if chosen == "triton":
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(streams):
            return in_layout(prepared_kernel_of(name), *given)
    # Ambient autocast would run the projection in bf16: its error in the row sums is 170 times larger.
    with torch.autocast(device_type=streams.device.type, enabled=False):
        plain = (tensor if index == phi_at else tensor.contiguous() for index, tensor in enumerate(tensors))
        return reference_of(name)(*plain, *constants)


def reference_of(name: str) -> Callable[..., Any]:
    """Return the plain PyTorch of an operator or its backward."""
    # The paper's split is another lowering of the same function.
    name = name.removeprefix("paper_")
    return getattr(next(module for module in (boundary, reference, normed) if hasattr(module, name)), name)


def kernel_of(name: str) -> Callable[..., Any]:
    """Return the Triton implementation of an operator or its backward."""
    module = importlib.import_module(f".gpu.{name.removesuffix('_backward')}", __package__)
    return getattr(module, name)


def prepared_kernel_of(name: str) -> Callable[..., Any]:
    """Return `kernel_of` with its calls prepared: see `gpu.prepared`."""
    function = kernel_of(name)
    if function not in _prepared:
        _prepared[function] = importlib.import_module(".gpu.prepared", __package__).PreparedOperator(function)
    return _prepared[function]


def compiled_of(name: str) -> Any:
    """Return the C++ implementation of an operator or its backward, None where there is none."""
    return getattr(importlib.import_module(".cpu.operators", __package__), name, None)
