"""Prepared calls: what an operator allocates and launches, worked out once for a shape and then repeated.

An operator of this folder chooses its launches by shapes, dtypes and constants alone. The first call of a kind runs it
on tensors without memory, with its launches recorded; every call of the kind allocates what that one did and launches.
From the second on, kernels are launched by what Triton compiled in the first: its binder looks at every argument of
every launch again, which for a small model takes longer than the kernels do.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .launch import launch, observed, recording

# Kinds of calls that are kept. A server that sees every number of tokens would fill the memory with them.
_MOST_KEPT = 1024
# Bytes that scratch tensors are aligned to, as tensors of their own would be: kernels are compiled for that.
_ALIGNMENT = 256


@dataclass(frozen=True)
class _Memory:
    """A contiguous tensor within the scratch memory that the launches of a call share, from byte `begin` on."""

    shape: torch.Size
    dtype: torch.dtype
    begin: int

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.begin + prod(self.shape) * self.dtype.itemsize

    def within(self, scratch: Tensor) -> Tensor:
        """Return the tensor, given the memory."""
        return scratch[self.begin : self.end].view(self.dtype).view(self.shape)


@dataclass
class _Launch:
    """One launch: its tensors by their places among a call's, then numbers and options, which are the kind's."""

    kernel: Any
    grid: tuple[int, ...]
    places: tuple[int, ...]
    numbers: tuple[Any, ...]
    options: dict[str, Any]
    direct: Callable[[Any, Any], None] | None = None

    def by_triton(self, tensors: Sequence[Tensor]) -> None:
        """Launch through Triton's binder, and keep what it compiled."""
        picked = operator.itemgetter(*self.places)(tensors)
        compiled = launch(self.kernel, self.grid, *picked, *self.numbers, **self.options)
        # Nothing is compiled where the launch is recorded or interpreted.
        if getattr(compiled, "function", None) is not None:
            self.direct = self._direct(compiled)

    def _direct(self, compiled: Any) -> Callable[[Any, Any], None]:
        pick = operator.itemgetter(*self.places)
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
        x, y, z = (*self.grid, 1, 1)[:3]
        # All parameters of the kernel in their order, compile-time ones too, as Triton's binder hands them on.
        names = self.kernel.arg_names[len(self.places) + len(self.numbers) :]
        rest = (*self.numbers, *(self.options[name] for name in names))

        def go(pointers: Any, stream: Any) -> None:
            # No metadata and no hooks: where a profiler has set them, calls go by Triton.
            run(x, y, z, stream, function, packed, None, None, None, *pick(pointers), *rest)

        return go


@dataclass
class Prepared:
    """The calls of one kind.

    Attributes:
        launches: in their order.
        results: shape, stride and dtype of each tensor that is returned.
        scratch: tensors that launches hand on to each other.
        alone: one tensor is returned, and not a tuple.
    """

    launches: tuple[_Launch, ...]
    results: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    scratch: tuple[_Memory, ...]
    alone: bool
    direct: bool = False
    begins: tuple[int, ...] = field(init=False)
    scratch_shape: tuple[int] = field(init=False)

    def __post_init__(self) -> None:
        """Work out what every call asks."""
        self.begins = tuple(memory.begin for memory in self.scratch)
        self.scratch_shape = (self.scratch[-1].end if self.scratch else 0,)

    def __call__(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> Any:
        """Run on contiguous tensors of the kind, whose data begin at `pointers`."""
        device = tensors[0].device
        results = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in self.results
        ]
        scratch = torch.empty_strided(self.scratch_shape, (1,), dtype=torch.uint8, device=device)
        if self.direct and not observed():
            start = scratch.data_ptr()
            places = [
                *pointers, *[result.data_ptr() for result in results], *[start + begin for begin in self.begins]
            ]  # fmt: skip
            driver = triton.runtime.driver.active
            stream = driver.get_current_stream(driver.get_current_device())
            for one in self.launches:
                one.direct(places, stream)  # type: ignore[misc]
        else:
            views = [memory.within(scratch) for memory in self.scratch]
            for one in self.launches:
                one.by_triton((*tensors, *results, *views))
            self.direct = all(one.direct for one in self.launches)
        return results[0] if self.alone else tuple(results)


class _AllocationsAlone(TorchDispatchMode):
    """Inside, PyTorch allocates and does nothing else: what it computes between launches would not be repeated."""

    allowed = frozenset((torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse what does not allocate."""
        if func.overloadpacket not in self.allowed:
            raise AssertionError(f"an operator of the GPU calls {func} beside its launches, which is not prepared")
        return func(*args, **(kwargs or {}))


def prepare(function: Callable[..., Any], tensors: Sequence[Tensor], constants: tuple[Any, ...]) -> Prepared:
    """Return the calls of `function` on tensors of these shapes and dtypes, which have tokens."""
    inputs = [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]
    found: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append((kernel, grid, args, options))

    with recording(record, "cuda" if torch.version.hip is None else "hip"), _AllocationsAlone():
        returned = function(*inputs, *constants)
    outputs = (returned,) if isinstance(returned, Tensor) else tuple(returned)
    known = {id(tensor): place for place, tensor in enumerate((*inputs, *outputs))}
    assert len(known) == len(inputs) + len(outputs), "an operator returns a tensor twice, or one that it was given"
    launches, scratch, end = [], [], 0
    for kernel, grid, args, options in found:
        given = [arg for arg in args if isinstance(arg, Tensor)]
        for tensor in given:
            if id(tensor) not in known:
                known[id(tensor)] = len(known)
                scratch.append(_Memory(tensor.shape, tensor.dtype, -(-end // _ALIGNMENT) * _ALIGNMENT))
                end = scratch[-1].end
        places = tuple(known[id(tensor)] for tensor in given)
        launches.append(_Launch(kernel, grid, places, args[len(given) :], options))
    used = {place for one in launches for place in one.places}
    assert used.issuperset(range(len(inputs), len(inputs) + len(outputs))), "no launch writes what is returned"
    results = tuple((output.shape, output.stride(), output.dtype) for output in outputs)
    return Prepared(tuple(launches), results, tuple(scratch), isinstance(returned, Tensor))


class PreparedOperator:
    """An operator of this folder, with the calls that it has prepared."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Take the operator, whose arguments are always so many tensors, and then constants."""
        self.function = function
        self._count: int | None = None
        self._kinds: dict[Any, Prepared | None] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """Return what the operator returns; its tensors lie on the current device."""
        if self._count is None:
            self._count = sum(isinstance(argument, Tensor) for argument in arguments)
        constants = arguments[self._count :]
        tensors = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in arguments[: self._count]]
        pointers = [tensor.data_ptr() for tensor in tensors]
        # Kernels are compiled for pointers that are or are not multiples of 16.
        kind = (
            tensors[0].device, constants, *[tensor.shape for tensor in tensors],
            *[tensor.dtype for tensor in tensors], *[pointer % 16 == 0 for pointer in pointers],
        )  # fmt: skip
        try:
            prepared = self._kinds[kind]
        except KeyError:
            prepared = self._prepare(kind, tensors, constants)
        return self.function(*tensors, *constants) if prepared is None else prepared(tensors, pointers)

    def _prepare(self, kind: Any, tensors: Sequence[Tensor], constants: tuple[Any, ...]) -> Prepared | None:
        # Without tokens nothing is launched, and gradients of parameters are zeros.
        prepared = prepare(self.function, tensors, constants) if tensors[0].numel() else None
        with self._lock:
            if len(self._kinds) >= _MOST_KEPT:
                del self._kinds[next(iter(self._kinds))]
            self._kinds[kind] = prepared
        return prepared
