"""Streams between the graphs of one process: they travel beside the visible value.

A graph that ends in the middle of a stream returns its readout, an ordinary tensor that Python code and the user see,
and the streams. `CarriedStreams` keeps these until the next graph asks for them with the visible value that it was
given.

- Found by the memory of the visible value, its geometry, dtype and version: Python code that computes the value anew,
  or changes it in place, loses the streams, and the next graph raises. So does an autograd node between two graphs that
  may edit the gradient: the streams' own gradient would bypass it.
- The streams pass a `_Tie`, which hands the visible value a gradient of zeros: hooks that wait for its gradient, such
  as those that FSDP2 reduces gradients by, then run in their order.
- Dynamo guards on the visible value, not on the streams: their layout and dtype are fixed, and whether they need a
  gradient follows the visible value.
- The visible value shares no memory with the streams, or neither would ever be freed.

What this cannot see: `value.data.mul_(2)`, an in-place collective, a hook on the value that edits its gradient. The
option `check_carried` finds the first two.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import StreamCutError

# Autograd nodes that hand a gradient on as it is: views, and what FSDP2 registers its hooks by.
_TRANSPARENT = {"ViewBackward0", "AliasBackward0", "ExpandBackward0", "RegisterPostBackwardFunctionBackward"}
_MULTIPLE_INPUTS = "RegisterPostBackwardFunctionBackward"


@dataclass(frozen=True)
class _Held:
    """Streams, and how their visible value looked when they were put here; `streams` is None where a stream ended."""

    memory: StorageWeakRef
    streams: Tensor | None
    geometry: tuple[Any, ...]
    version: int | None
    producer: tuple[Any, int]
    origin: str


class CarriedStreams:
    """The streams that are on their way from one graph to another. Safe to use from several threads."""

    def __init__(self) -> None:
        """Start empty."""
        self._held: dict[int, _Held] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of values that are still alive."""
        with self._lock:
            self._drop_dead()
            return len(self._held)

    def put(self, visible: Tensor, streams: Tensor | None, origin: str) -> None:
        """Keep the streams of a value that a graph returns.

        Args:
            visible: the streams' readout, [*, C] or with its features elsewhere.
            streams: [*, n, C], contiguous, anchored; None notes that a stream ended here.
            origin: the place that the value was computed at, for messages.
        """
        held = _Held(
            StorageWeakRef(visible.untyped_storage()),
            streams,
            _geometry(visible),
            _version(visible),
            (visible.grad_fn, visible.output_nr),
            origin,
        )
        with self._lock:
            self._drop_dead()
            self._held[_key(visible)] = held

    def take(self, visible: Tensor, site: str, check: bool = False) -> Tensor:
        """Return the streams of a value that a graph is given; they stay here for whoever asks again.

        Args:
            visible: the value.
            site: what asks, for messages.
            check: compare the value with the streams' readout.

        Raises:
            StreamCutError: the value bears no streams, or not the streams that it was returned with.
        """
        held = self._find(visible)
        if held is None or held.streams is None:
            _refuse(site, "its input is not a value that a rewritten graph of this model has returned")
        if held.geometry != _geometry(visible):
            _refuse(site, "its input is a view of a carried value with another shape, layout or dtype", held)
        if held.version != _version(visible):
            _refuse(site, "its input was changed in place on the way", held)
        streams = held.streams
        if torch.is_grad_enabled():
            if visible.requires_grad:
                _check_ancestry(visible, held, site)
                if not streams.requires_grad:
                    _refuse(
                        site,
                        "the value needs a gradient but its streams do not: a reentrant checkpoint detaches them, "
                        "use_reentrant=False does not",
                        held,
                    )
            elif streams.requires_grad:
                streams = streams.detach()
        if check:
            _compare(visible, streams, site, held)
        if torch.is_grad_enabled() and streams.requires_grad:
            streams = _Tie.apply(visible, streams)
        return streams

    def ended_at(self, visible: Tensor) -> str | None:
        """Return where the stream ended whose readout a value is, if it is one."""
        held = self._find(visible)
        return held.origin if held is not None and held.streams is None else None

    def _find(self, visible: Tensor) -> _Held | None:
        with self._lock:
            held = self._held.get(_key(visible))
        return None if held is None or held.memory.expired() else held

    def _drop_dead(self) -> None:
        for key in [key for key, held in self._held.items() if held.memory.expired()]:
            del self._held[key]


class _Tie(torch.autograd.Function):
    """Hands the streams on, and their visible value a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, visible: Tensor, streams: Tensor) -> Tensor:
        ctx.zeros = _maker_of_zeros(visible)
        return streams.view_as(streams)

    @staticmethod
    def backward(ctx: Any, grad_streams: Tensor) -> tuple[Tensor | None, Tensor]:
        return ctx.zeros() if ctx.needs_input_grad[0] else None, grad_streams


def _maker_of_zeros(like: Tensor) -> Callable[[], Tensor]:
    """Return what makes zeros of a tensor's form, without keeping the tensor."""
    form: dict[str, Any] = {"dtype": like.dtype}
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(like, distributed.DTensor):
        form |= {"device_mesh": like.device_mesh, "placements": like.placements}
        return functools.partial(distributed.zeros, like.shape, **form)
    return functools.partial(torch.zeros, like.shape, device=like.device, **form)


def _key(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _geometry(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype


def _version(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version


def _check_ancestry(visible: Tensor, held: _Held, site: str) -> None:
    """Walk from a value's autograd node back to the graph that returned it."""
    producer, output = held.producer
    node, number = visible.grad_fn, visible.output_nr
    while producer is not None and not (node is producer and number == output):
        name = type(node).__name__ if node is not None else "a leaf"
        if node is None or name not in _TRANSPARENT:
            _refuse(site, f"{name} stands between the graphs, and may change the gradient", held)
        step = number if name == _MULTIPLE_INPUTS and number < len(node.next_functions) else 0
        node, number = node.next_functions[step]


def _compare(visible: Tensor, streams: Tensor, site: str, held: _Held) -> None:
    """Check that a value is the readout of its streams, up to rounding in its dtype."""
    with torch.no_grad():
        first, others = streams[..., 0, :].double(), streams[..., 1:, :].double()
        readout = first + others.sum(-2) / streams.shape[-2]
        # Where the features lie does not matter: both hold the same numbers.
        wanted, got = readout.flatten().sort().values, visible.detach().double().flatten().sort().values
        slack = 8 * torch.finfo(visible.dtype).eps * max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1e-30)
        if wanted.shape != got.shape or not torch.allclose(wanted, got, rtol=0.0, atol=slack, equal_nan=True):
            _refuse(site, "its input no longer is the readout of the streams beside it", held)


def _refuse(site: str, why: str, held: _Held | None = None) -> NoReturn:
    origin = f" The streams were last seen at {held.origin}." if held is not None else ""
    raise StreamCutError(
        f"the streams are lost before {site}: {why}.{origin} Python code between two residual blocks may look at the "
        "hidden state, but not compute it anew: move such code into a block, compile it together with the blocks, or "
        "use on_graph_break='collapse', which averages the streams there and is another model."
    )


STREAMS = CarriedStreams()
