"""Compile kernels for the GPU that is here in many processes, before anything runs: one process compiles one at a time.

What is compiled lies in Triton's cache on disk, where the process that launches finds it in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from mhc_compile.kernels.dispatch import kernel_of
from mhc_compile.kernels.gpu.launch import recording
from mhc_compile.kernels.ops import OPERATORS
from torch import Tensor

from .problems import Shape, make_inputs, many
from .terminal import say

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches_of(shape: Shape, backend: str) -> list[Launch]:
    """Return (kernel, arguments, options) of the launches of an operator and its backward, on meta tensors."""
    found: list[Launch] = []
    signature = OPERATORS[shape.operator].signature
    tensors, constants = make_inputs(shape, "meta")
    known = constants[: len(signature.constants)]
    with recording(lambda kernel, grid, args, options: found.append((kernel, args, options)), backend):
        outputs = many(kernel_of(shape.operator)(*tensors, *known))
        if OPERATORS[shape.operator].backward is not None:
            count = len(signature.inputs)
            kept = outputs[len(signature.outputs) :] if signature.kept else tensors[count:][-1:]
            backward = kernel_of(OPERATORS[shape.operator].backward._name)  # type: ignore[union-attr]
            backward(*outputs[: len(signature.outputs)], *tensors[:count], *kept, *known)
    return found


def identity(launch: Launch) -> tuple[Any, ...]:
    """Return what a kernel is compiled from: dtypes, and of numbers what Triton specializes on."""
    kernel, args, options = launch
    return kernel.__name__, tuple(map(_kind, kernel.params, args)), tuple(sorted(options.items()))


def _kind(parameter: Any, arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype
    if isinstance(arg, int) and not parameter.do_not_specialize:
        return arg == 1, arg % 16 == 0
    return type(arg)


def distinct(shapes: Sequence[Shape], backend: str) -> list[Launch]:
    """Return the launches that compile something of their own, in order."""
    return list({identity(one): one for shape in shapes for one in launches_of(shape, backend)}.values())


class _Target:
    """Stands in for the driver: what there is to compile for, told from the parent, which alone holds the device."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_share(shapes: Sequence[Shape], target: Any, part: int, parts: int) -> int:
    """Compile every `parts`-th of the launches, and return how many."""
    import triton

    triton.runtime.driver.set_active(_Target(target))
    mine = distinct(shapes, target.backend)[part::parts]
    for kernel, args, options in mine:
        try:
            kernel.warmup(*args, grid=(1,), **options)
        except Exception as error:
            # The process that launches it meets the same error, and reports it where it belongs.
            say(f"{kernel.__name__}: {type(error).__name__}")
    return len(mine)


def precompile(shapes: Sequence[Shape], target: Any = None, processes: int | None = None) -> float:
    """Compile what operators of these shapes launch, and return the seconds that it took.

    Args:
        shapes: of the calls to come.
        target: a `GPUTarget`; left out, the GPU that is here.
        processes: left out, one a core.
    """
    import triton

    begin = time.monotonic()
    target = target or triton.runtime.driver.active.get_current_target()
    parts = processes or len(os.sched_getaffinity(0))
    # Not forked: the parent holds a device.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parts, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = [pool.submit(compile_share, shapes, target, part, parts) for part in range(parts)]
        count = sum(one.result() for one in done)
    seconds = time.monotonic() - begin
    say(f"{count} kernels compiled by {parts} processes in {seconds:.0f} s")
    return seconds
