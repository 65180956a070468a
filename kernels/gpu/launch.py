"""What every launch shares: a call's geometry, the target's options, one function that launches.

All launches pass through `launch`, so that a tool without a GPU can see each kernel with the arguments and
the configuration it would really get (`recording`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..orientation import ROWS_FIRST, PhiLayout
from .configurations import Geometry

Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]


class _Recording(threading.local):
    """Where a thread's launches go: autograd runs backwards in threads of their own."""

    recorder: Recorder | None = None
    backend = "cuda"


_recording = _Recording()


def geometry_of(streams: Tensor, phi: Tensor, anchored: bool, layout: PhiLayout = ROWS_FIRST) -> Geometry:
    """Return the geometry of [*, n, C] streams and their phi, which lies as `layout` says."""
    n, width = streams.shape[-2:]
    pieces = 2 if streams.dtype == torch.bfloat16 else 1
    tokens = streams.shape[:-2].numel()
    return Geometry(tokens, n, width, layout.rows(phi), anchored, streams.element_size(), pieces, layout)


def product_options() -> dict[str, Any]:
    """Return the compile-time options of float32 products on the current target.

    TF32 alone keeps 11 bits; three TF32 products keep float32's. AMD multiplies float32 natively.
    """
    return {"PRECISION": "ieee" if _on_hip() else "tf32x3"}


def register_limit(most: int | None) -> dict[str, int]:
    """Return the launch option that lets a thread have up to `most` registers; None leaves it to the compiler.

    Left alone, ptxas aims at an occupancy and spills a value or two to reach it, also where few programs run and
    occupancy gains nothing. AMD's compiler has no such option and needs none.
    """
    return {} if most is None or _on_hip() else {"maxnreg": most}


def warps_for(warps: int) -> dict[str, int]:
    """Return the launch option that gives a program the threads of so many warps of 32; AMD's have 64."""
    return {"num_warps": warps // 2 if _on_hip() else warps}


def _on_hip() -> bool:
    return _recording.backend == "hip" if _recording.recorder is not None else torch.version.hip is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """Launch `kernel` over `grid` and return what Triton compiled, or hand the launch to the recorder."""
    if _recording.recorder is not None:
        return _recording.recorder(kernel, grid, args, options)
    return kernel[grid](*args, **options)


def observed() -> bool:
    """Whether launches are recorded, or a profiler has set Triton's hooks: both are to see every argument."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return _recording.recorder is not None or any(getattr(hook, "calls", hook) for hook in hooks)


@contextlib.contextmanager
def recording(recorder: Recorder, backend: str = "cuda") -> Iterator[None]:
    """Inside, this thread's launches go to `recorder(kernel, grid, args, options)` in place of the device."""
    previous = _recording.recorder, _recording.backend
    _recording.recorder, _recording.backend = recorder, backend
    try:
        yield
    finally:
        _recording.recorder, _recording.backend = previous


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return scratch memory on the device of `like`."""
    return torch.empty(shape, dtype=dtype, device=like.device)
