"""Which operators `fusion="auto"` runs, `site` or `boundary`, by device, number of tokens and width.

On a CPU the implementation decides; on a GPU a measurement where there is one, the cost model elsewhere. Measurements
are rows of `fusion_times.json` beside this file, a list of

    {"gpu": "h200", "dtype": "bfloat16", "n_streams": 4, "width": 4096, "tokens": 8192, "training": true,
     "microseconds": {"site": 310.0, "boundary": 220.0}}

with the time of one site (forward, and with `training` backward) in each choice. They are Sinkhorn's, and taken for
every manifold: the streams decide which choice is faster, a matrix's logits are few beside them. There is no such file
until a GPU has run the benchmark.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...errors import MHCError
from .. import dispatch
from ..cpu import build
from ..fusions import CANDIDATES
from . import traffic
from .gpus import GPU, GPUS, LAUNCH_SECONDS, gpu_of_device

TABLE = Path(__file__).with_name("fusion_times.json")

# A row speaks for tokens and widths up to this factor away.
_REACH = 2.0


class FusionReason(Enum):
    """Why a fusion choice was taken; the value is the phrase that the report shows."""

    ASKED = "asked for"
    PLAIN_PYTORCH = "plain PyTorch runs the operators here, and joining them saves it nothing"
    COMPILED = "C++ compiled for this CPU runs the operators"
    MEASURED = "the faster one in a measurement on this GPU"
    PREDICTED = "the faster one in the cost model; not measured"


@dataclass(frozen=True)
class FusionChoice:
    """A fusion choice and where it comes from.

    Attributes:
        fusion: a value of the option `fusion`, not "auto".
        reason: why.
        detail: the times compared, possibly empty.
    """

    fusion: str
    reason: FusionReason
    detail: str = ""

    def __str__(self) -> str:
        """Return one line for the report."""
        return f"{self.fusion}, {self.reason.value}" + (f" ({self.detail})" if self.detail else "")


def choose_fusion(
    tokens: int,
    width: int,
    n_streams: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    manifold: str = "sinkhorn",
    training: bool = True,
    table: Sequence[dict[str, Any]] | None = None,
) -> FusionChoice:
    """Choose between `site` and `boundary` for one site within a chain.

    Args:
        tokens: of a call; a hint where the graph serves several.
        width: C.
        n_streams: n.
        dtype: of the streams.
        device: where they lie.
        manifold: a name of `MANIFOLDS`; the kernels cover those with a `kernel_matrix`.
        training: count the backward too.
        table: measurements; None reads `TABLE`, if it is there.
    """
    device = torch.device(device)
    one = (torch.empty(0, dtype=dtype, device="cpu"),)
    chosen = dispatch.implementation(one, n_streams, manifold, device)
    if device.type != "cuda" or chosen != "triton":
        if chosen == "cpu":
            return FusionChoice("site", FusionReason.COMPILED)
        return FusionChoice("site", FusionReason.PLAIN_PYTORCH, _missing(device, one, n_streams, manifold))
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    if gpu is not None:
        return choose_on(gpu, tokens, width, n_streams, dtype, manifold=manifold, training=training, table=table)
    # A GPU that the table lacks differs from the others in scale more than in the ratio that decides here.
    stand_in = GPUS["h100"]
    choice = choose_on(stand_in, tokens, width, n_streams, dtype, manifold=manifold, training=training, table=())
    return replace(choice, detail=f"this GPU is not in the table; {choice.detail}")


def choose_on(
    gpu: GPU,
    tokens: int,
    width: int,
    n_streams: int,
    dtype: torch.dtype,
    *,
    manifold: str = "sinkhorn",
    training: bool = True,
    table: Sequence[dict[str, Any]] | None = None,
) -> FusionChoice:
    """Choose for a GPU of the table, which need not be here; arguments as in `choose_fusion`."""
    row = _nearest(_table() if table is None else table, gpu, tokens, width, n_streams, dtype, training)
    if row is not None:
        seconds = {name: row["microseconds"][name] / 1e6 for name in CANDIDATES}
        return _fastest(seconds, FusionReason.MEASURED, row["tokens"], row["width"], gpu)
    size = (tokens, width, n_streams, dtype.itemsize)
    seconds = {name: site_seconds(name, gpu, *size, training, manifold) for name in CANDIDATES}
    return _fastest(seconds, FusionReason.PREDICTED, tokens, width, gpu)


def site_seconds(
    fusion: str,
    gpu: GPU,
    tokens: int,
    width: int,
    n_streams: int,
    element_size: int,
    training: bool,
    manifold: str = "sinkhorn",
) -> float:
    """Predict the time of one site within a chain: what these kernels move, and their launches."""
    passes = traffic.PER_SITE[fusion]
    sizes = {"tokens": max(tokens, 1), "width": width, "n_streams": n_streams, "element_size": element_size}
    return sum(
        traffic.evaluate(one.ours.bytes, manifold, **sizes) / gpu.kernel_rate
        + traffic.evaluate(one.launches, manifold, **sizes) * LAUNCH_SECONDS
        for one in ((passes.forward, passes.backward) if training else (passes.forward,))
    )


def _missing(device: torch.device, tensors: tuple[torch.Tensor, ...], n_streams: int, manifold: str) -> str:
    """Return why there is no C++ for a CPU that would run it, empty for any other case."""
    wanted = device.type == "cpu" and dispatch.current_choice() == "auto"
    if not wanted or not dispatch.covered(tensors, n_streams, manifold):
        return ""
    return build.why_not(n_streams, tensors[0].dtype) or ""


def _fastest(seconds: dict[str, float], reason: FusionReason, tokens: int, width: int, gpu: GPU) -> FusionChoice:
    times = ", ".join(f"{name} {second * 1e6:.0f} µs" for name, second in seconds.items())
    detail = f"{tokens} tokens of width {width} on {gpu.name}: {times} a site"
    return FusionChoice(min(seconds, key=lambda name: seconds[name]), reason, detail)


_COLUMNS = ("gpu", "dtype", "n_streams", "width", "tokens", "training", "microseconds")


@cache
def _table() -> tuple[dict[str, Any], ...]:
    """Return the measurements.

    Raises:
        MHCError: the file holds something else.
    """
    if not TABLE.is_file():
        return ()
    try:
        rows = json.loads(TABLE.read_text(encoding="utf-8"))
        return tuple({name: row[name] for name in _COLUMNS} for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise MHCError(
            f"the measurements in {TABLE} cannot be read ({type(error).__name__}: {error}). Install mhc-compile again, "
            "delete the file (the cost model then decides), or choose with the option fusion='site' or 'boundary'."
        ) from error


def _nearest(
    rows: Sequence[dict[str, Any]],
    gpu: GPU,
    tokens: int,
    width: int,
    n_streams: int,
    dtype: torch.dtype,
    training: bool,
) -> dict[str, Any] | None:
    """Return the measurement nearest in tokens and width, None if none is near enough."""
    wanted = (gpu.name, str(dtype).removeprefix("torch."), n_streams, training)
    best, least = None, math.inf
    for row in rows:
        if (row["gpu"], row["dtype"], row["n_streams"], row["training"]) != wanted:
            continue
        apart = [abs(math.log(max(asked, 1) / row[name])) for name, asked in (("tokens", tokens), ("width", width))]
        if max(apart) <= math.log(_REACH) and sum(apart) < least:
            best, least = row, sum(apart)
    return best
