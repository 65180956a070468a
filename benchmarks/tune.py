"""Search around a kernel's launch heuristic and print the fastest configuration, ready to paste into it.

    python -m benchmarks.tune post_pre --tokens 8192 --width 4096 [--backward]

Each configuration function that the operator's launches ask is varied in turn, the others left as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from mhc_compile.kernels.dispatch import choosing, kernel_of
from mhc_compile.kernels.gpu import (
    coefficient_gradients,
    coefficients,
    collapse,
    gates,
    post,
    projection,
    sinkhorn,
    stream_gradients,
)
from mhc_compile.kernels.ops import OPERATORS

from .problems import Shape, make_inputs, many
from .terminal import track
from .timing import copies_to_rotate, median_seconds

_FORWARD = (
    (projection, "projection_config"),
    (coefficients, "coefficients_config"),
    (collapse, "collapse_config"),
)
_BACKWARD = (
    (gates, "gates_config"),
    (coefficient_gradients, "coefficients_config"),
    (stream_gradients, "stream_gradients_config"),
)
# Where each configuration function is looked up when an operator launches.
HEURISTICS: dict[str, tuple[tuple[ModuleType, str], ...]] = {
    "sinkhorn": ((sinkhorn, "forward_config"),),
    "sinkhorn_backward": ((sinkhorn, "backward_config"),),
    "post": ((post, "forward_config"),),
    "post_backward": ((post, "backward_config"),),
    **dict.fromkeys(("pre", "head", "post_pre"), _FORWARD),
    **dict.fromkeys(("pre_backward", "head_backward"), _BACKWARD),
    "post_pre_backward": (*_BACKWARD, (post, "backward_config")),
}
_VARIED = {
    "block_tokens": (0.5, 1, 2),
    "block_width": (0.5, 1, 2),
    "warps": (0.5, 1, 2),
    "splits": (0.5, 1, 2),
}


def variations(config: Any) -> Iterator[Any]:
    """Yield a configuration and its neighbors: tiles, warps and splits halved and doubled."""
    fields = [field.name for field in dataclasses.fields(config) if field.name in _VARIED]
    for factors in itertools.product(*(_VARIED[field] for field in fields)):
        changes = {
            field: max(1, int(getattr(config, field) * factor)) for field, factor in zip(fields, factors, strict=True)
        }
        yield dataclasses.replace(config, **changes)


def search(
    module: ModuleType, function: str, call: Callable[[], Any], seconds: Callable[[Callable[[], Any]], float]
) -> tuple[Any, float, float] | None:
    """Return the fastest configuration, its seconds and the heuristic's; None if it is not asked."""
    heuristic = getattr(module, function)
    asked: list[Any] = []

    def watch(*arguments: Any, **keywords: Any) -> Any:
        asked.append(heuristic(*arguments, **keywords))
        return asked[-1]

    try:
        setattr(module, function, watch)
        call()
        if not asked or asked[-1] is None:
            return None
        best, least, base = asked[-1], float("inf"), float("inf")
        candidates = list(dict.fromkeys(variations(asked[-1])))
        for candidate in track(candidates, f"{module.__name__}.{function}"):
            setattr(module, function, lambda *_, chosen=candidate, **__: chosen)
            try:
                taken = seconds(call)
            except Exception as error:  # what does not compile or does not fit is no candidate
                print(f"{candidate}: {str(error).splitlines()[:1]}", file=sys.stderr)
                continue
            if candidate == asked[-1]:
                base = taken
            if taken < least:
                best, least = candidate, taken
        return best, least, base
    finally:
        setattr(module, function, heuristic)


def _inputs(shape: Shape, device: str, backward: bool) -> list[tuple[Any, ...]]:
    """Return arguments of the kernel, several sets in turn, so that the cache does not choose."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in make_inputs(shape, device)[0])
    sets = []
    for seed in range(copies_to_rotate(size, device)):
        tensors, constants = make_inputs(shape, device, seed)
        if backward:
            outputs = many(kernel_of(shape.operator)(*tensors, *constants))
            count = len(OPERATORS[shape.operator].signature.outputs)
            tensors = (*(torch.randn_like(output) for output in outputs[:count]), *tensors, *outputs[count:])
        sets.append((*tensors, *constants))
    return sets


def main() -> int:
    """Search, and print the best configuration of each heuristic."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("operator", choices=["sinkhorn", "pre", "post", "post_pre", "head"])
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    shape = Shape(arguments.operator, arguments.tokens, arguments.streams, arguments.width, dtype)
    name = f"{arguments.operator}_backward" if arguments.backward else arguments.operator
    with choosing("triton"):
        sets = itertools.cycle(_inputs(shape, arguments.device, arguments.backward))

        def call() -> Any:
            return kernel_of(name)(*next(sets))

        for module, function in HEURISTICS[name]:
            found = search(
                module, function, call, lambda run: median_seconds([run], arguments.device, arguments.repeats)
            )
            if found:
                best, least, base = found
                print(f"{module.__name__}.{function}: {best}  # {least * 1e6:.0f} µs, was {base * 1e6:.0f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
