"""Time what a call of a GPU operator costs on the host, with its launches mocked: no GPU is needed, and none is used.

    python -m benchmarks.launch_cost [--calls 2000] [--tokens 256] [--only post_pre]

Small tensors on the CPU stand in, nothing is compiled, and the launcher that Triton would have compiled does nothing:
what is left is the Python of the operator, PyTorch's allocations, and the binder, none of which depends on sizes.
`binder` goes by Triton's binder for each launch, `prepared` is what a model runs (`kernels/gpu/prepared.py`). Not in
either: the launcher and the driver, 2 to 4 µs a launch, the dispatch of the operator, and autograd. Medians of batches.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"
# Triton 3.9 warns when this is unset.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.compiler
from mhc_compile.kernels.dispatch import kernel_of
from mhc_compile.kernels.gpu.launch import recording
from mhc_compile.kernels.gpu.prepared import PreparedOperator
from mhc_compile.kernels.manifolds import MANIFOLDS
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget

_BATCH = 50
OPERATORS = ("post_pre", "post_collapse", "post_measure", "pre", "post", "head")


class MockDriver:
    """Stands in for the driver of an H100."""

    def get_current_target(self) -> GPUTarget:
        """Return the target to compile for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the device to launch on."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the stream to launch on."""
        return 0


class MockKernel:
    """Stands in for what Triton compiles; keeps what it is launched with if `launched` is a list."""

    function = 1
    packed_metadata = ()

    def __init__(self, name: str, launched: list[tuple[Any, ...]] | None) -> None:
        """Take the kernel's name."""
        self.name = name
        self.launched = launched
        self.run: Callable[..., None] = self._skip if launched is None else self._keep

    def launch_metadata(self, grid: Any, stream: Any, *args: Any) -> None:
        """Return what profilers ask."""
        return

    def _skip(self, *args: Any) -> None:
        return

    def _keep(self, *args: Any) -> None:
        assert self.launched is not None
        self.launched.append((self.name, *args))


@contextlib.contextmanager
def mocked(launched: list[tuple[Any, ...]] | None = None) -> Iterator[None]:
    """Inside, kernels are neither compiled nor launched; `launched` gets (kernel, arguments of Triton's launcher …)."""

    def compile_nothing(src: Any, *args: Any, **keywords: Any) -> MockKernel:
        return MockKernel(src.fn.__name__, launched)

    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(MockDriver())
    try:
        with mock.patch.object(triton.compiler, "compile", compile_nothing):
            yield
    finally:
        triton.runtime.driver.set_active(previous)


def arguments_of(
    operator: str, backward: bool, tokens: int, n: int, width: int
) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
    """Return bfloat16 streams and float32 coefficients, and the constants of an operator."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    streams, branch = (make(tokens, *shape, width, dtype=torch.bfloat16) for shape in ((n,), ()))
    post, res = make(tokens, n), make(tokens, n, n)
    if operator == "head":
        phi, constants = (make(n, n * width), make(1), make(n)), (1e-6, 0.0, True)
        projection = make(tokens, n + 1)
        grads = (branch, streams, *phi, projection)
        return (grads if backward else (streams, *phi)), constants
    rows = MANIFOLDS["sinkhorn"].rows(n)
    phi, projection = (make(rows, n * width), make(3), make(rows)), make(tokens, rows + 1)
    site = (20, 1e-6, 0.0, "sinkhorn", True)
    mixing = (streams, branch, post, res)
    if operator == "post":
        return ((streams, *mixing) if backward else mixing), ()
    if operator == "pre":
        return ((branch, post, res, streams, *phi, projection) if backward else (streams, *phi)), site
    if backward:
        return (*mixing, *mixing, *phi, projection), site
    measured = (post, res, projection) if operator == "post_collapse" else ()
    return (*mixing, *phi, *measured), site


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Return the median over batches of the time of one call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(max(1, calls // _BATCH)):
        begin = time.perf_counter()
        for _ in range(_BATCH):
            call()
        times.append((time.perf_counter() - begin) / _BATCH * 1e6)
    return statistics.median(times)


def launches_of(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[str]:
    """Return the kernels that a call launches."""
    names: list[str] = []
    with recording(lambda kernel, grid, args, options: names.append(kernel.__name__)):
        function(*arguments)
    return names


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--only", default="", choices=["", *OPERATORS])
    given = parser.parse_args()
    table = Table(title="microseconds a call on the host, launches mocked", title_justify="left")
    for heading in ("pass", "tokens"):
        table.add_column(heading, no_wrap=True)
    for heading in ("launches", "binder", "prepared"):
        table.add_column(heading, justify="right", no_wrap=True)
    with mocked():
        for operator in (given.only,) if given.only else OPERATORS:
            for backward in (False, True):
                if backward and operator in ("post_measure", "post_collapse"):
                    continue
                for tokens in given.tokens:
                    name = f"{operator}_backward" if backward else operator
                    tensors, constants = arguments_of(operator, backward, tokens, given.streams, given.width)
                    arguments = (*tensors, *constants)
                    function = kernel_of(name)
                    prepared = PreparedOperator(function)
                    times = [
                        microseconds(lambda call=call, given=arguments: call(*given), given.calls)  # type: ignore[misc]
                        for call in (function, prepared)
                    ]
                    table.add_row(
                        f"{operator} {'backward' if backward else 'forward'}", str(tokens),
                        str(len(launches_of(function, arguments))), *(f"{one:.1f}" for one in times),
                    )  # fmt: skip
    Console(width=100 if not sys.stdout.isatty() else None).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
