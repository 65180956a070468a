"""Predict what mHC costs on a GPU: activation memory and step time. Nothing is measured here.

The step of the plain model is taken as its matrix products at the rate that the GPU reaches in training, three times
the forward's; mHC adds the counted traffic of its kernels at the share of a copy's rate that they are taken to reach,
less what the plain residual adds move, and with boundaries joined less what the norms move that `fold_norms` folds in.
Beside it stands what no kernel could do better: the least traffic at that rate. Whatever else a step does (other norms,
activations, optimizer, communication) is in neither, so a real share is smaller, and gaps between launches come on top
where tokens are few.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import MHCOptionError
from ..kernels.costs import traffic
from ..kernels.costs.fusion_choice import FusionChoice, choose_on
from ..kernels.costs.gpus import KERNEL_SHARE, find_gpu
from ..kernels.fusions import FUSIONS
from ..passes.count_branch_work import BranchWork
from ..planning.chain_sizes import ChainSize
from .pipeline_prediction import Pipeline

_GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """What to predict for.

    Args:
        tokens: tokens of a step on one GPU; None is as many as the example input has. Sequences keep the example's
            length: more tokens are more of them.
        gpu: a name of `kernels.costs.gpus.GPUS`.
        pipeline: predict a pipeline, too, whose microbatches have that many tokens.

    Raises:
        MHCOptionError: the GPU is not known, or fewer than one token.
    """

    tokens: int | None = None
    gpu: str = "h200"
    pipeline: Pipeline | None = None

    def __post_init__(self) -> None:
        """Check both."""
        find_gpu(self.gpu)
        if self.tokens is not None and self.tokens < 1:
            raise MHCOptionError(f"tokens={self.tokens}: must be at least 1.")


@dataclass(frozen=True)
class FusionOverhead:
    """What one fusion choice adds to the step, as shares of the plain model's.

    Attributes:
        fusion: the choice.
        least_stored: with the streams stored, every kernel moving the least that it can, as fast as a copy.
        stored: the same, with the counted traffic of the kernels that exist, at their rate.
        least_recomputed: with streams stored at intervals and replayed, the least as fast as a copy.
        recomputed: the same, with the kernels that exist.
    """

    fusion: str
    least_stored: float
    stored: float
    least_recomputed: float
    recomputed: float


@dataclass(frozen=True)
class Prediction:
    """Predicted memory and time of a training step on one GPU.

    Attributes:
        gpu: name of the GPU.
        tokens: of the step, counted on the first chain.
        dtype: of the streams.
        plain_seconds: the plain model's step, its matrix products alone.
        plain_bytes: activations that eager autograd saves in the plain model.
        stored_bytes: the same with mHC, all streams stored.
        recomputed_bytes: the same with mHC, streams stored at intervals, and one interval being replayed.
        intervals: sites between stored streams, for each chain.
        fusions: what each fusion choice adds, the slowest first.
        auto: what `fusion="auto"` would take.
        sites: of all chains.
        normed: those whose norm is folded in where boundaries are joined.
    """

    gpu: str
    tokens: int
    dtype: str
    plain_seconds: float
    plain_bytes: int
    stored_bytes: int
    recomputed_bytes: int
    intervals: tuple[int, ...]
    fusions: tuple[FusionOverhead, ...]
    auto: FusionChoice
    sites: int
    normed: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {"measured": False, **asdict(self), "auto": {**asdict(self.auto), "reason": self.auto.reason.value}}

    @property
    def summary(self) -> list[str]:
        """Sentences that say what the table of fusion choices does not."""
        gpu = find_gpu(self.gpu)
        intervals = " and ".join(str(interval) for interval in dict.fromkeys(self.intervals))
        memory = {
            "the plain model": self.plain_bytes,
            "with mHC": self.stored_bytes,
            "with mHC recomputed": self.recomputed_bytes,
        }
        return [
            f"Predicted, not measured: one training step of {self.tokens:,} tokens in {self.dtype} on one {gpu.name}.",
            "Activations saved: "
            + ", ".join(f"{name} {size / _GIB:.1f} GiB" for name, size in memory.items())
            + f" (streams kept every {intervals} sites). Counted as eager autograd saves them; compiled graphs save "
            "less of the plain part.",
            f"Plain step: {self.plain_seconds * 1e3:.1f} ms of matrix products at {gpu.matmul_share:.0%} of the "
            f"datasheet's rate. mHC's kernels move what was counted, less what the residual adds move, at "
            f"{KERNEL_SHARE:.0%} of a copy's rate, {gpu.copy_share:.0%} of {gpu.bandwidth / 1e12:.1f} TB/s. "
            f"fusion='boundary' folds in the norms of {self.normed} of {self.sites} sites: what they moved is taken "
            "off. The rest of a step (other norms, activations, optimizer) is left out: real shares are smaller.",
            f"fusion='auto' takes {self.auto}.",
        ]

    def __str__(self) -> str:
        """Return sentences and a table that a person can read."""
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for heading in ("fusion", "streams stored", "recomputed"):
            table.add_column(heading, justify="left" if heading == "fusion" else "right")
        for row in self.fusions:
            stored = f"{row.least_stored:.1%} / {row.stored:.1%}"
            table.add_row(row.fusion, stored, f"{row.least_recomputed:.1%} / {row.recomputed:.1%}")
        buffer = io.StringIO()
        console = Console(file=buffer, width=118, color_system=None, highlight=False, emoji=False, markup=False)
        console.print("\n".join(self.summary))
        console.print("Step time that mHC adds, if every kernel moved the least, as a copy does / with these kernels:")
        console.print(table)
        return buffer.getvalue().rstrip()


def predict(
    chains: Sequence[ChainSize], work: BranchWork, n_streams: int, workload: Workload, manifold: str = "sinkhorn"
) -> Prediction:
    """Predict a training step.

    Args:
        chains: at least one, as traced.
        work: the plain model's, as traced.
        n_streams: n.
        workload: tokens and GPU.
        manifold: a name of `MANIFOLDS`.

    Raises:
        MHCOptionError: there is no chain, or the streams are float64, for which no rate is known.
    """
    if not chains:
        raise MHCOptionError("there is nothing to predict: no residual chain was found. Leave tokens and gpu out.")
    if any(chain.dtype.itemsize > 4 for chain in chains):
        raise MHCOptionError("the model is float64, for which no rates are known: predict for bfloat16 or float32.")
    gpu = find_gpu(workload.gpu)
    first = chains[0]
    scale = (workload.tokens or first.tokens) / first.tokens
    plain_seconds = 3 * work.flops * scale / gpu.matmul_rate(first.dtype.itemsize)
    intervals = tuple(traffic.recompute_interval(chain.sites, n_streams) for chain in chains)

    def added(fusion: str, amount: str, recomputed: bool) -> float:
        moved = sum(
            _added_bytes(chain, scale, n_streams, manifold, fusion, amount, interval if recomputed else None)
            for chain, interval in zip(chains, intervals, strict=True)
        )
        rate = gpu.kernel_rate if amount == "ours" else gpu.copy_rate
        return moved / rate / plain_seconds

    def kept(recomputed: bool) -> int:
        return sum(
            round(chain.tokens * scale)
            * traffic.saved_bytes_per_token(
                chain.sites, n_streams, chain.width, chain.dtype.itemsize, interval if recomputed else None, manifold
            )
            for chain, interval in zip(chains, intervals, strict=True)
        )

    plain_bytes = round(work.saved_bytes * scale)
    tokens = round(first.tokens * scale)
    return Prediction(
        gpu=gpu.name,
        tokens=tokens,
        dtype=str(first.dtype).removeprefix("torch."),
        plain_seconds=plain_seconds,
        plain_bytes=plain_bytes,
        stored_bytes=plain_bytes + kept(recomputed=False),
        recomputed_bytes=plain_bytes + kept(recomputed=True),
        intervals=intervals,
        fusions=tuple(
            FusionOverhead(
                fusion,
                *(added(fusion, amount, recomputed) for recomputed in (False, True) for amount in ("least", "ours")),
            )
            for fusion in traffic.PER_SITE
        ),
        auto=choose_on(gpu, tokens, first.width, n_streams, first.dtype, manifold=manifold),
        sites=sum(chain.sites for chain in chains),
        normed=sum(chain.normed for chain in chains),
    )


def _added_bytes(
    chain: ChainSize, scale: float, n_streams: int, manifold: str, fusion: str, amount: str, interval: int | None
) -> float:
    """Return the bytes that a chain moves in a step beyond what its plain residual adds, and folded norms, move."""
    sizes = {
        "tokens": max(1, round(chain.tokens * scale)),
        "sites": chain.sites,
        "width": chain.width,
        "n_streams": n_streams,
        "element_size": chain.dtype.itemsize,
    }

    def of(one: traffic.Cost) -> float:
        moved: traffic.Traffic = getattr(one, amount)
        return traffic.evaluate(moved.bytes, manifold, **sizes)

    passes, again = traffic.chain(fusion, chain.normed), traffic.REPLAYED[FUSIONS[fusion].cost]
    plain = chain.sites * (of(traffic.PLAIN.forward) + of(traffic.PLAIN.backward))
    replayed = chain.sites - -(-chain.sites // interval) if interval is not None else 0
    return of(passes.forward) + of(passes.backward) + replayed * of(again) - plain
