"""Times: medians of calls whose inputs rotate, so that no cache flatters them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# What one timed batch should take: long against the resolution of events and of the clock.
_BATCH_SECONDS = {"cuda": 2e-3, "cpu": 5e-3}
# Rotating inputs are several times as large as the last cache: 60 MB on an H200, 126 MB on a B200.
_ROTATION_BYTES = {"cuda": 2**29, "cpu": 2**26}
# Of a few tokens phi is all there is: 64 times 1.5 MB.
_MOST_COPIES = 64


def copies_to_rotate(bytes_each: int, device: str) -> int:
    """Return how many sets of inputs of this size overflow the caches together."""
    return max(1, min(_MOST_COPIES, -(-_ROTATION_BYTES[device] // max(bytes_each, 1))))


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


class CompiledWhileTimedError(RuntimeError):
    """Something was compiled within what was timed: the time is not that of the call."""


_compiled_by_triton = 0


def _count(*_: Any, **__: Any) -> None:
    global _compiled_by_triton
    _compiled_by_triton += 1


def compilations() -> int:
    """Return how many graphs and kernels this process has compiled since the first call."""
    with contextlib.suppress(ImportError):
        import triton

        if triton.knobs.runtime.jit_post_compile_hook is None:
            triton.knobs.runtime.jit_post_compile_hook = _count
    counters = torch._dynamo.utils.counters
    return _compiled_by_triton + sum(sum(counters[kind].values()) for kind in ("stats", "aot_autograd"))


def median_seconds(calls: Sequence[Callable[[], Any]], device: str, repeats: int) -> float:
    """Return the median time of one call, over batches that go round all `calls`.

    On a GPU a batch is queued as a whole, so what is measured is what a model sees: the time between calls that
    follow one another, launches included where they are slower than the kernels.

    Raises:
        CompiledWhileTimedError: a call that had run before compiled something.
    """
    for call in calls:
        call()
    synchronize(device)
    begin = time.perf_counter()
    for call in calls:
        call()
    synchronize(device)
    once = (time.perf_counter() - begin) / len(calls)
    size = max(1, min(64, round(_BATCH_SECONDS[device] / max(once, 1e-7))))
    size = -(-size // len(calls)) * len(calls) if device == "cuda" else size
    times = []
    position = 0
    before = compilations()
    for _ in range(repeats):
        batch = [calls[(position + offset) % len(calls)] for offset in range(size)]
        position += size
        times.append(_batch_seconds(batch, device) / size)
    if compilations() != before:
        raise CompiledWhileTimedError("something was compiled while it was timed, though every call had run before")
    return statistics.median(times)


def _batch_seconds(batch: Sequence[Callable[[], Any]], device: str) -> float:
    if device != "cuda":
        begin = time.perf_counter()
        for call in batch:
            call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in batch:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(device: str, repeats: int) -> float:
    """Return bytes read and written a second by a large copy: the limit that shares are taken of."""
    amount = 2**30 if device == "cuda" else 2**26
    source = torch.empty(amount, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * amount / median_seconds([lambda: target.copy_(source)], device, repeats)


def graph_seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
    """Return the median time of one call within a CUDA graph of all `calls`.

    Raises:
        RuntimeError: they cannot be captured.
    """
    with torch.no_grad():
        # Capture wants warm caches, on the stream that is captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    return median_seconds([graph.replay], "cuda", repeats) / len(calls)
