"""Count the bytes that each kernel loads and stores, in Triton's interpreter, beside what the cost model says.

    python -m benchmarks.traffic [--tokens 48 256 1024] [--widths 1024 4096] [--only post_pre] [--label after]

The launches are those of a GPU, configurations and all; no GPU is needed. `memory` counts each byte once a launch,
`loads` as often as programs ask for it, which a cache has to serve. Units are C elements a token. Exits 1 where the
cost model is off by more than 3 %.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from mhc_compile.kernels.costs import traffic
from mhc_compile.kernels.dispatch import choosing, kernel_of
from mhc_compile.kernels.gpu import launch
from mhc_compile.kernels.ops import OPERATORS
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from .counted import add_arguments, keep
from .problems import Shape, make_inputs, many, saved
from .terminal import Table, show

TOLERANCE = 0.03
OPERATORS_COUNTED = (
    "post_pre", "post_pre_norm", "post_collapse", "post_collapse_norm", "post_measure", "pre", "pre_norm", "collapse",
    "collapse_norm", "measure", "post", "head",
)  # fmt: skip


@dataclass
class Counted:
    """What one launch moves, in bytes.

    Attributes:
        kernel: its name.
        memory: each byte that is loaded once, and each that is stored once.
        loads: loaded, by all programs together.
        stores: stored.
    """

    kernel: str
    memory: int = 0
    loads: int = 0
    stores: int = 0


@dataclass
class _Counter:
    """Follows launches: the tensors of the one that runs, and which of their elements it has touched."""

    launches: list[Counted] = field(default_factory=list)
    touched: list[tuple[int, int, int, dict[str, np.ndarray[Any, Any]]]] = field(default_factory=list)

    def begin(self, kernel: str, tensors: Sequence[Tensor]) -> None:
        self.launches.append(Counted(kernel))
        memory = {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}
        self.touched = [
            (
                place,
                place + tensor.numel() * tensor.element_size(),
                tensor.element_size(),
                {kind: np.zeros(tensor.numel(), bool) for kind in ("load", "store")},
            )
            for place, tensor in memory.items()
        ]

    def note(self, kind: str, places: Any, mask: Any) -> None:
        """Count one load or store of a program."""
        flat = np.asarray(places.data).ravel().astype(np.int64)
        if mask is not None:
            flat = flat[np.broadcast_to(np.asarray(mask.data), np.shape(places.data)).ravel().astype(bool)]
        if not len(flat):
            return
        begin, _, size, seen = next(found for found in self.touched if found[0] <= flat[0] < found[1])
        seen[kind][(flat - begin) // size] = True
        counted = self.launches[-1]
        if kind == "load":
            counted.loads += len(flat) * size
        else:
            counted.stores += len(flat) * size

    def end(self) -> None:
        self.launches[-1].memory = sum(
            int(seen.sum()) * size for *_, size, kinds in self.touched for seen in kinds.values()
        )


@contextlib.contextmanager
def counting() -> Iterator[list[Counted]]:
    """Inside, kernels run in the interpreter; yields the list that each launch is added to."""
    counter = _Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, places: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        counter.note("load", places, mask)
        return load(self, places, mask, *rest, **keywords)

    def counted_store(self: Any, places: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        counter.note("store", places, mask)
        return store(self, places, value, mask, *rest, **keywords)

    def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        counter.begin(kernel.__name__, [arg for arg in args if isinstance(arg, Tensor)])
        kernel[grid](*args, **options)
        counter.end()

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        launch.recording(run),
    ):
        yield counter.launches


def count(shape: Shape) -> tuple[list[Counted], list[Counted]]:
    """Return the launches of an operator's forward, and of its backward (none, if it has no backward)."""
    operator = OPERATORS[shape.operator]
    outputs_count, inputs_count = len(operator.signature.outputs), len(operator.signature.inputs)
    with choosing("triton"):
        tensors, constants = make_inputs(shape, "cpu")
        known = constants[: len(operator.signature.constants)]
        with counting() as forward:
            outputs = many(kernel_of(shape.operator)(*tensors, *known))
        if operator.backward is None:
            return forward, []
        kept = saved(operator, tensors, outputs)
        backward = operator.backward._name
        with counting() as after:
            kernel_of(backward)(*outputs[:outputs_count], *tensors[:inputs_count], *kept, *known)
    return forward, after


def predicted(shape: Shape, backward: bool, amount: str) -> float:
    """Return the bytes of the cost model: `amount` is "least" or "ours"."""
    passes = traffic.OPERATORS[shape.operator]
    moved = getattr(passes.backward if backward else passes.forward, amount)
    sizes = {"tokens": shape.tokens, "n_streams": shape.n, "width": shape.width, "anchored": int(shape.anchored)}
    return traffic.evaluate(moved.bytes, shape.manifold, **sizes, element_size=shape.dtype.itemsize)


def disagreement(shape: Shape, counted: list[Counted], backward: bool) -> float:
    """Return how far the cost model is off, as a share of what was counted."""
    memory = sum(one.memory for one in counted)
    return abs(predicted(shape, backward, "ours") - memory) / memory if memory else 0.0


def main() -> int:
    """Count, print, keep the totals, and return 1 where the cost model is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[48, 256, 1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--layout", default="both", choices=["both", "anchored", "plain"])
    parser.add_argument("--only", default="", choices=["", *OPERATORS_COUNTED])
    add_arguments(parser)
    arguments = parser.parse_args()
    layouts = [layout == "anchored" for layout in ("anchored", "plain") if arguments.layout in ("both", layout)]
    totals: list[tuple[str, ...]] = []
    worst = 0.0
    for operator in (arguments.only,) if arguments.only else OPERATORS_COUNTED:
        for anchored in layouts if operator != "post" else (True,):
            for width in arguments.widths:
                for tokens in arguments.tokens:
                    shape = Shape(operator, tokens, arguments.streams, width, torch.bfloat16, anchored)
                    for backward, counted in enumerate(count(shape)):
                        if counted:
                            worst = max(worst, disagreement(shape, counted, bool(backward)))
                            totals.append(_total(shape, bool(backward), counted))
                            show(_launches(shape, bool(backward), counted))
    table = Table(
        f"Bytes counted, in elements of C a token, n={arguments.streams}, bfloat16",
        ("pass", "tokens", "C", "layout", "launches", "memory", "loads", "stores", "ours", "least", "off"),
        tuple(totals),
        note="Memory: each byte once a launch. Loads and stores: as often as programs ask, which a cache serves. Ours "
        "and least: by the cost model. Of few tokens phi and its gradient's parts are most of it.",
    )
    keep("traffic", table, arguments, identity=4)
    print(f"the cost model is off by at most {worst:.1%}")
    return 1 if worst > TOLERANCE else 0


def _cells(shape: Shape, one: Counted) -> list[str]:
    unit = shape.tokens * shape.width * shape.dtype.itemsize
    return [f"{amount / unit:.2f}" for amount in (one.memory, one.loads, one.stores)]


def _total(shape: Shape, backward: bool, counted: list[Counted]) -> tuple[str, ...]:
    unit = shape.tokens * shape.width * shape.dtype.itemsize
    whole = Counted("", *(sum(getattr(one, key) for one in counted) for key in ("memory", "loads", "stores")))
    return (
        f"{shape.operator} {'backward' if backward else 'forward'}", str(shape.tokens), str(shape.width),
        "anchored" if shape.anchored else "plain", str(len(counted)), *_cells(shape, whole),
        *(f"{predicted(shape, backward, amount) / unit:.2f}" for amount in ("ours", "least")),
        f"{disagreement(shape, counted, backward):.1%}",
    )  # fmt: skip


def _launches(shape: Shape, backward: bool, counted: list[Counted]) -> Table:
    return Table(
        f"{shape}, {'backward' if backward else 'forward'}",
        ("launch", "memory", "loads", "stores"),
        tuple((one.kernel.removesuffix("_kernel"), *_cells(shape, one)) for one in counted),
    )


if __name__ == "__main__":
    sys.exit(main())
