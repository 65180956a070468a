"""What every launch shares: a call's padded geometry, the target's options, one function that launches.

The configurations that the heuristics beside the kernels choose were fitted to the registers, ahead of time,
for sm_80, sm_90, sm_100 and gfx942 (`python -m benchmarks.compile_ahead`). They have not been timed on a
device yet.

All launches pass through `launch`, so that a tool without a GPU can see each kernel with the arguments and
the configuration it would really get (`recording`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]

_recorder: Recorder | None = None
_recorded_backend = "cuda"


@dataclass(frozen=True)
class Geometry:
    """The shape of a call and of its register tiles.

    Attributes:
        tokens: product of the leading dimensions.
        n: streams.
        width: channels of a stream, C.
        groups: groups of n rows in phi: 1 (a head), 2 (pre and post) or n + 2 (and the matrix).
        anchored: the streams are stored as stream 0 and differences from it (see `anchored`).
    """

    tokens: int
    n: int
    width: int
    groups: int
    anchored: bool = False

    @property
    def padded_n(self) -> int:
        """`n` padded to a power of two."""
        return triton.next_power_of_2(self.n)

    @property
    def padded_groups(self) -> int:
        """Groups padded to a power of two, and to 16 slots, the narrowest product of tensor cores."""
        needed = 1 if self.groups == 1 else self.n + 2
        return max(triton.next_power_of_2(needed), 16 // self.padded_n)

    @property
    def slots(self) -> int:
        """Width of a token's padded coefficient tile."""
        return self.padded_n * self.padded_groups

    @property
    def rows(self) -> int:
        """Rows of phi."""
        return self.groups * self.n

    def constants(self) -> dict[str, int]:
        """Return the compile-time constants that describe the tile."""
        return {
            "n": self.n,
            "N": self.padded_n,
            "Q": self.padded_groups,
            "GROUPS": self.groups,
            "ANCHORED": self.anchored,
        }


def operand_size(streams: Tensor) -> int:
    """Return the bytes of a stream's element as matmuls take it: float16 goes through float32."""
    return 2 if streams.dtype == torch.bfloat16 else 4


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return bool(triton.knobs.runtime.interpret)


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


def _on_hip() -> bool:
    return _recorded_backend == "hip" if _recorder is not None else torch.version.hip is not None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch `kernel` over `grid`, or hand the launch to the recorder."""
    if _recorder is not None:
        _recorder(kernel, grid, args, options)
    else:
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recording(recorder: Recorder, backend: str = "cuda") -> Iterator[None]:
    """Inside, launches go to `recorder(kernel, grid, args, options)` in place of the device."""
    global _recorder, _recorded_backend
    previous = _recorder, _recorded_backend
    _recorder, _recorded_backend = recorder, backend
    try:
        yield
    finally:
        _recorder, _recorded_backend = previous


def ceil_div(count: int, size: int) -> int:
    """Number of blocks of `size` that cover `count`."""
    return -(-count // size)


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return scratch memory on the device of `like`."""
    return torch.empty(shape, dtype=dtype, device=like.device)
