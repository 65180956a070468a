"""Measure every kernel against Inductor, each checked against float64 first.

    python -m benchmarks.kernels [--device cuda] [--quick] [--minutes 8] [--only post_pre] [--out DIR]

Times are those of differentiable calls on rotating inputs, and shares are of the copy bandwidth measured in the same
run, counting only the least traffic of the operator. `post_pre` is the boundary between two sites: each fusion choice
is a way to compute it. What fails its check is measured all the same, and its row says so; the exit status is 1. On a
CPU the compiled C++ is measured; with `MHC_KERNELS=triton TRITON_INTERPRET=1` the Triton kernels run in the
interpreter, and times mean little. `python -m benchmarks.checks` checks more shapes and measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mhc_compile.kernels import dispatch
from mhc_compile.kernels.ops import OPERATORS

from . import kernels_report
from .implementations import INDUCTOR, Implementation, implementations_of, prepare, problems_of
from .precompile import precompile
from .problems import Shape, make_inputs
from .record import Benchmark, Options, Record, in_time, run_as_script
from .terminal import say, track
from .timing import copies_to_rotate, copy_bandwidth, graph_seconds, median_seconds

# With fewer tokens a call is bound by its launches, which a CUDA graph takes away.
_FEW_TOKENS = 256


def shapes_to_measure(quick: bool, device: str) -> list[Shape]:
    """Return the shapes, the most important first: training at C = 4096, then decoding, then the rest."""
    narrow = torch.bfloat16
    if device == "cpu":
        return [Shape(operator, 64, 4, 256, narrow) for operator in ("post_pre", "pre", "post", "head", "sinkhorn")]
    operators = ("post_pre", "pre", "post", "sinkhorn", "head")
    grid = [(8192, 4096, 4, narrow), (1, 4096, 4, narrow)]
    if not quick:
        grid += [(64, 4096, 4, narrow), (8192, 2560, 4, narrow), (8192, 7168, 4, narrow), (32768, 4096, 4, narrow)]
        grid += [
            (1024, 4096, 4, narrow),
            (256, 4096, 4, narrow),
            (16, 4096, 4, narrow),
            (8192, 4096, 2, narrow),
            (8192, 4096, 8, narrow),
        ]
        grid += [(8192, 4096, 4, torch.float32), (8192, 4096, 4, torch.float16)]
    shapes = []
    for tokens, width, n, dtype in grid:
        for operator in operators:
            shape = Shape(operator, tokens, n, width, dtype)
            # Sinkhorn knows neither width nor the streams' dtype.
            alone = Shape(operator, tokens, n, 1, torch.float32) if operator == "sinkhorn" else shape
            shapes += [] if alone in shapes else [alone]
    return shapes


def measure(implementation: Implementation, shape: Shape, options: Options, repeats: int) -> dict[str, Any]:
    """Return median seconds of the forward and of the backward, on inputs that rotate."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in make_inputs(shape, options.device)[0])
    sets = []
    for seed in range(copies_to_rotate(size, options.device)):
        tensors, constants = make_inputs(shape, options.device, seed)
        sets.append(prepare(implementation, tensors, constants, seed))
    forwards = [_forward(implementation, one.leaves, constants) for one in sets]
    row: dict[str, Any] = {
        "copies": len(sets),
        "forward_seconds": median_seconds(forwards, options.device, repeats),
        "backward_seconds": median_seconds([one.backward for one in sets], options.device, repeats),
    }
    if captured(shape, options.device):
        try:
            row["graph_forward_seconds"] = graph_seconds(forwards, repeats)
        except RuntimeError as error:
            row["graph_error"] = first_line(error)
    return row


def captured(shape: Shape, device: str) -> bool:
    """Whether to time a shape within a CUDA graph too."""
    return device == "cuda" and shape.tokens <= _FEW_TOKENS


def _forward(
    implementation: Implementation, leaves: tuple[torch.Tensor, ...], constants: tuple[Any, ...]
) -> Callable[[], Any]:
    return lambda: implementation(*leaves, *constants)


def first_line(error: Exception) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def checked(implementation: Implementation, shape: Shape, device: str) -> list[str]:
    """Return what is wrong with an implementation, an error included."""
    try:
        return problems_of(implementation, shape, device)
    except Exception as error:
        return [first_line(error)]


def measure_shape(shape: Shape, options: Options, record: Record, bandwidth: float, repeats: int) -> None:
    """Add a row for each way to compute an operator; one that fails its check is timed too, and its row says so."""
    for name, implementation in implementations_of(shape.operator).items():
        where = f"{shape}, {name}"
        # Inductor's unrolled Sinkhorn takes long to compile on a CPU.
        if options.quick and options.device == "cpu" and name == INDUCTOR and shape.operator != "post":
            continue
        if not in_time(options, record, where, needs=5.0):
            continue
        problems = checked(implementation, shape, options.device)
        if problems:
            record.fail(where, "; ".join(problems))
        try:
            row = measure(implementation, shape, options, repeats)
        except torch.OutOfMemoryError:
            record.skip(where, "out of device memory")
            continue
        except Exception as error:
            record.fail(where, first_line(error))
            continue
        if "graph_error" in row:
            record.fail(f"{where}, captured by a CUDA graph", row["graph_error"])
        for backward, direction in enumerate(("forward", "backward")):
            rate = shape.traffic(bool(backward)) / row[f"{direction}_seconds"]
            row[f"{direction}_bytes_per_second"] = rate
            row[f"{direction}_share_of_copy"] = rate / bandwidth
        record.add(**shape.to_dict(), implementation=name, problems=problems, **row)


def run(options: Options, record: Record) -> None:
    """Check and measure, the most important shapes first."""
    shapes = [shape for shape in shapes_to_measure(options.quick, options.device) if options.wants(shape.operator)]
    chosen = dispatch.implementation((torch.empty(1, device=options.device),), 4)
    record.fact(
        implementation=kernels_report.NAMES[chosen],
        precompile_seconds=precompile(shapes) if options.device == "cuda" else 0.0,
    )
    if options.device == "cpu":
        say("No GPU: times are those of a CPU, and shares of its copy bandwidth.")
    repeats = 5 if options.quick or options.device == "cpu" else 30
    bandwidth = copy_bandwidth(options.device, repeats)
    record.fact(copy_bytes_per_second=bandwidth)
    for shape in track(shapes, "measuring"):
        measure_shape(shape, options, record, bandwidth, repeats)
        # Each shape is compiled anew; Dynamo would count them towards its limit.
        torch._dynamo.reset()


BENCHMARK = Benchmark(
    "kernels",
    "Kernels: every operator and fusion choice",
    run,
    kernels_report.tables,
    kernels_report.figures,
)

assert OPERATORS, "importing the table registers torch.ops.mhc"

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
