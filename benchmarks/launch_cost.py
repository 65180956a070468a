"""Time what a call of a GPU operator costs on the host, with its launches mocked: no GPU is needed, and none is used.

    python -m benchmarks.launch_cost [--calls 2000] [--tokens 256] [--operators post] [--label after]

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
from collections.abc import Callable, Iterator, Sequence
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
from triton.backends.compiler import GPUTarget

from .by_name import Case, arguments_of
from .counted import add_arguments, keep
from .terminal import Table

_BATCH = 50
BOUNDARY = ("post_pre", "post_pre_backward")
OPERATORS = (*BOUNDARY, "pre", "pre_backward", "post", "post_backward", "head", "head_backward")


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


def launches_of(function: Callable[..., Any], arguments: Sequence[Any]) -> list[str]:
    """Return the kernels that a call launches."""
    names: list[str] = []
    with recording(lambda kernel, grid, args, options: names.append(kernel.__name__)):
        function(*arguments)
    return names


def ways() -> dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Return how an operator can be called; commits before there were prepared calls have one way."""
    found: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {"binder": lambda function: function}
    with contextlib.suppress(ImportError):
        from mhc_compile.kernels.gpu.prepared import PreparedOperator

        found["prepared"] = PreparedOperator
    return found


def main() -> int:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--operators", nargs="+", default=BOUNDARY, choices=OPERATORS)
    add_arguments(parser)
    given = parser.parse_args()
    rows = []
    with mocked():
        for name in given.operators:
            for tokens in given.tokens:
                case = Case(given.streams, torch.bfloat16, tokens, given.width, anchored=True)
                arguments = arguments_of(name, case, "cpu")
                function = kernel_of(name)
                count = str(len(launches_of(function, arguments)))
                for way, wrap in ways().items():
                    call = wrap(function)
                    taken = microseconds(lambda call=call, given=arguments: call(*given), given.calls)  # type: ignore
                    rows.append((name, str(tokens), count, way, f"{taken:.0f}"))
    table = Table(
        "Microseconds a call on the host, launches mocked",
        ("pass", "tokens", "launches", "way", "µs"),
        tuple(rows),
        note="Measured on a shared CPU with launches mocked: the Python of an operator, PyTorch's allocations and the "
        "binder. Medians of batches. `prepared` is what a model runs.",
    )
    keep("launch_cost", table, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
