"""Check every kernel against float64 on the device, then measure it.

    python -m benchmarks.kernels --device cuda [--quick] [--out results.json]

Each figure is a share of the copy bandwidth measured in the same run, counting only the least traffic of the
operator. On a CPU the checks run, in plain PyTorch or, with `MHC_KERNELS=triton TRITON_INTERPRET=1`, in the
interpreter, and times mean little. Exits 1 if a check fails, and then measures nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mhc_compile.kernels import cost, dispatch
from mhc_compile.kernels.dispatch import choosing, reference_of
from mhc_compile.kernels.ops import OPERATORS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One problem to check or to measure."""

    operator: str
    tokens: int
    n: int
    width: int
    dtype: torch.dtype

    def traffic(self, backward: bool) -> int:
        """Least bytes between the device's memory and its processors: each input and output once."""
        passes = cost.OPERATORS[self.operator]
        least = (passes.backward if backward else passes.forward).least
        sizes = {"tokens": self.tokens, "n_streams": self.n, "width": self.width}
        return int(cost.evaluate(least.bytes, **sizes, element_size=self.dtype.itemsize))


def make_inputs(shape: Shape, device: str) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return the operator's random tensors and its constants."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    tokens, n, width = shape.tokens, shape.n, shape.width
    rows = n if shape.operator == "head" else n * n + 2 * n
    site = (20, 1e-6, 0.0, "sinkhorn")
    if shape.operator == "sinkhorn":
        return (normal(tokens, n, n),), (20, 0.0)
    streams = normal(tokens, n, width).to(shape.dtype)
    coefficients = (normal(tokens, n).sigmoid() * 2, normal(tokens, n, n).softmax(-1))
    boundary = (streams, normal(tokens, width).to(shape.dtype), *coefficients)
    scale = torch.ones(1 if shape.operator == "head" else 3, device=device)
    mapping = (normal(rows, n * width) / (n * width) ** 0.5, scale, normal(rows))
    return {
        "pre": ((streams, *mapping), site),
        "post": (boundary, ()),
        "post_pre": ((*boundary, *mapping), site),
        "head": ((streams, *mapping), (1e-6, 0.0)),
    }[shape.operator]


def _many(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check(shape: Shape, device: str) -> list[str]:
    """Return what is wrong: errors beyond those of plain PyTorch in that dtype and one rounding."""
    tensors, constants = make_inputs(shape, device)
    operator = OPERATORS[shape.operator]
    ours = _many(operator.forward(*tensors, *constants))
    grads = tuple(torch.randn_like(out) for out in ours)
    calls = (
        ("forward", operator.forward, reference_of(shape.operator), ()),
        ("backward", operator.backward, reference_of(f"{shape.operator}_backward"), grads),
    )
    problems = []
    for name, kernel, plain, extra in calls:
        given = (*extra, *tensors)
        results = (_many(kernel(*given, *constants)), _many(plain(*given, *constants)))
        truth = _many(plain(*(tensor.double() for tensor in given), *constants))
        for index, (mine, theirs, true) in enumerate(zip(*results, truth, strict=True)):
            error, allowed = ((part.double() - true).abs().max().item() for part in (mine, theirs))
            size = max(true.abs().max().item(), 1e-3)
            slack = (64 * torch.finfo(torch.float32).eps + torch.finfo(shape.dtype).eps / 2) * size
            if not error <= allowed + slack:
                problems.append(f"{shape} {name} output {index}: {error:.2e}, plain PyTorch {allowed:.2e}")
    return problems


def measure(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Return the median seconds of a call, the cache flushed before each."""
    call()
    times = []
    if device == "cuda":
        flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
        for _ in range(repeats):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    else:
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_bandwidth(device: str, repeats: int) -> float:
    """Return bytes read and written a second by a large copy."""
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source), device, repeats)


def measure_shape(shape: Shape, device: str, bandwidth: float, repeats: int) -> dict[str, Any]:
    """Return seconds and shares of the copy bandwidth, with plain PyTorch beside them."""
    tensors, constants = make_inputs(shape, device)
    operator = OPERATORS[shape.operator]
    grads = tuple(torch.randn_like(out) for out in _many(operator.forward(*tensors, *constants)))
    row: dict[str, Any] = {**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")}
    for name, kernel, extra in (("forward", operator.forward, ()), ("backward", operator.backward, grads)):
        for choice in ("auto", "reference"):
            with choosing(choice):
                seconds = measure(lambda: kernel(*extra, *tensors, *constants), device, repeats)  # noqa: B023
            key = name if choice == "auto" else f"{name}_plain"
            row[f"{key}_seconds"] = seconds
            row[f"{key}_share_of_copy"] = shape.traffic(name == "backward") / seconds / bandwidth
    return row


def environment(device: str) -> dict[str, Any]:
    """Return the hardware and the versions that a result belongs to."""
    cuda = device == "cuda"
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if dispatch.have_triton():
        import triton

        versions["triton"] = triton.__version__
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "processors": torch.cuda.get_device_properties(0).multi_processor_count if cuda else None,
        "versions": versions,
    }


def shapes_to_check(quick: bool, device: str) -> list[Shape]:
    """Return both regimes of token counts, several numbers of streams and widths, every dtype."""
    tokens = (1, 3, 65) if quick or device == "cpu" else (1, 3, 64, 127, 1000)
    widths = (40,) if device == "cpu" else (17, 1280, 5129)
    streams = (2, 4, 5) if quick or device == "cpu" else (1, 2, 3, 4, 5, 6, 7, 8)
    return [
        Shape(operator, count, n, width, dtype)
        for operator in OPERATORS
        for count in tokens
        for width in widths
        for n in streams
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]


def shapes_to_measure(quick: bool, device: str) -> list[Shape]:
    """Return the shapes that the aims are stated for, and decoding."""
    if device == "cpu":
        return [Shape(operator, 64, 4, 256, torch.bfloat16) for operator in OPERATORS]
    widths = (4096,) if quick else (2560, 4096, 7168)
    counts = (1, 8192) if quick else (1, 16, 64, 8192, 32768)
    shapes = [Shape("sinkhorn", count, 4, 1, torch.float32) for count in counts]
    for operator in ("pre", "post", "post_pre", "head"):
        shapes += [Shape(operator, count, 4, width, torch.bfloat16) for width in widths for count in counts]
    return shapes


def _print(rows: list[dict[str, Any]], bandwidth: float) -> None:
    table = Table(title=f"share of the copy bandwidth ({bandwidth / 1e9:.0f} GB/s)", title_justify="left")
    for heading in ("operator", "tokens", "n", "C", "forward", "plain", "backward", "plain"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for row in rows:
        cells = [row["operator"], *(str(row[key]) for key in ("tokens", "n", "width"))]
        for key in ("forward", "forward_plain", "backward", "backward_plain"):
            cells.append(f"{row[f'{key}_share_of_copy']:.0%} {row[f'{key}_seconds'] * 1e6:.0f} µs")
        table.add_row(*cells)
    Console(width=120).print(table)


def main() -> int:
    """Check, measure, print, and write JSON; return 1 if a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    shapes = shapes_to_check(arguments.quick, arguments.device)
    console = Console(stderr=True)
    problems = [
        problem for shape in track(shapes, "checking", console=console) for problem in check(shape, arguments.device)
    ]
    if problems:
        print("\n".join(problems))
        return 1
    repeats = 5 if arguments.quick or arguments.device == "cpu" else 50
    bandwidth = copy_bandwidth(arguments.device, repeats)
    rows = [
        measure_shape(shape, arguments.device, bandwidth, repeats)
        for shape in track(shapes_to_measure(arguments.quick, arguments.device), "measuring", console=console)
    ]
    _print(rows, bandwidth)
    result = {
        **environment(arguments.device),
        "copy_bytes_per_second": bandwidth,
        "checked": len(shapes),
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
