"""Measure one site in each choice of `fusion="auto"`, and write the table that it reads.

    python -m benchmarks.fusion_choice --out kernels/costs/fusion_times.json

The rows go into the package (`kernels/costs/fusion_times.json`) once a GPU has written them. Operators only: the
launches of a compiled model come in the same order, with branches between them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mhc_compile.kernels.costs.fusion_choice import CANDIDATES
from mhc_compile.kernels.costs.gpus import gpu_of_device
from mhc_compile.kernels.ops import OPERATORS

from .problems import Shape, make_inputs, many
from .timing import copies_to_rotate, median_seconds

# The operators of one site in each choice.
SITES: dict[str, tuple[str, ...]] = {"site": ("post", "pre"), "boundary": ("post_pre",)}


def site_call(fusion: str, shape: Shape, device: str, training: bool, seed: int) -> Callable[[], None]:
    """Return a function that runs one site: its forward and, with `training`, its backward."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    backwards: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
    for name in SITES[fusion]:
        tensors, constants = make_inputs(replace(shape, operator=name), device, seed)
        operator = OPERATORS[name]
        calls.append((operator.forward, (*tensors, *constants)))
        if training:
            assert operator.backward is not None
            outputs = many(operator.forward(*tensors, *constants))
            count = len(operator.signature.outputs)
            grads = tuple(torch.randn_like(output) for output in outputs[:count])
            backwards.append((operator.backward, (*grads, *tensors, *outputs[count:], *constants)))
    streams = make_inputs(replace(shape, operator="pre"), device, seed)[0][0]

    def run() -> None:
        for call, arguments in (*calls, *backwards):
            call(*arguments)
        if training and fusion == "site":
            # `pre` and `post` read the same streams: autograd adds up their gradients.
            torch.add(streams, streams)

    return run


def site_calls(fusion: str, shape: Shape, device: str, training: bool) -> list[Callable[[], None]]:
    """Return `site_call` on as many inputs as the caches do not hold."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in make_inputs(shape, "meta")[0])
    return [site_call(fusion, shape, device, training, seed) for seed in range(copies_to_rotate(size, device))]


def measure_row(shape: Shape, device: str, gpu: str, training: bool, repeats: int) -> dict[str, Any]:
    """Return one row of the table."""
    seconds = {name: median_seconds(site_calls(name, shape, device, training), device, repeats) for name in CANDIDATES}
    return {
        "gpu": gpu,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "n_streams": shape.n,
        "width": shape.width,
        "tokens": shape.tokens,
        "training": training,
        "microseconds": {name: round(second * 1e6, 2) for name, second in seconds.items()},
    }


def main() -> int:
    """Measure every shape, print the table or write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--streams", type=int, nargs="+", default=[4, 2, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 2560, 7168, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    gpu = gpu_of_device(torch.cuda.get_device_name())
    if gpu is None:
        parser.error(f"{torch.cuda.get_device_name()} is not in kernels/costs/gpus.py: add a row for it first")
    rows: list[dict[str, Any]] = []
    shapes = [
        Shape("post_pre", tokens, n, width, torch.bfloat16)
        for n in arguments.streams
        for width in arguments.widths
        for tokens in arguments.tokens
    ]
    for shape, training in itertools.product(shapes, (False, True)):
        try:
            rows.append(measure_row(shape, "cuda", gpu.name, training, arguments.repeats))
        except Exception as error:  # one shape that fails must not take the others with it
            print(f"{shape}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(json.dumps(rows[-1]), flush=True)
        if arguments.out:
            # As it goes: a machine that is taken away leaves what was measured.
            draft = arguments.out.with_name(f"{arguments.out.name}.tmp")
            draft.write_text(json.dumps(rows, indent=1) + "\n")
            draft.replace(arguments.out)
    return 0 if len(rows) == 2 * len(shapes) else 1


if __name__ == "__main__":
    sys.exit(main())
