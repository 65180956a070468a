"""Predict how a model trains in a pipeline: where to cut it, what is sent, and how long the sends hold it up.

Nothing is measured here. What a stage computes is counted as for a step on one GPU (`prediction`): matrix products,
and the traffic of the operators. The schedule is torch's, played through with those times. Stages are compiled: torch
cannot divide the backward of one, so what a schedule calls input and weight gradients each take a whole backward.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from ..errors import MHCOptionError
from ..kernels.costs import traffic
from ..kernels.costs.fusion_choice import choose_on
from ..kernels.costs.gpus import GPU, find_gpu
from ..kernels.manifolds import MANIFOLDS
from ..planning.chain_sizes import ChainSize
from ..planning.pieces import Piece
from .pipeline_cuts import SLACK, propose_cuts
from .schedules import FORWARD, Schedule, play, schedule_of

_GIB = 2**30
# Weight and gradient in 16 bits, a float32 copy and Adam's two moments; or all four in float32.
_BYTES_A_PARAMETER = 16
# Enough that the pipeline is full most of the time.
_MICROBATCHES_A_RANK = 4


@dataclass(frozen=True)
class Pipeline:
    """The pipeline to predict for.

    Args:
        ranks: GPUs, one a rank.
        schedule: a name of `torch.distributed.pipelining`: 1F1B, Interleaved1F1B, ZBVZeroBubble, DualPipeV, …
        microbatches: of a step; None is four a rank.
        network: bytes a second that a rank sends to the next; None is what the GPU usually gets.

    Raises:
        MHCOptionError: torch has no such schedule, or not for so many microbatches; fewer than two ranks.
    """

    ranks: int
    schedule: str = "DualPipeV"
    microbatches: int | None = None
    network: float | None = None

    def __post_init__(self) -> None:
        """Check all."""
        if self.ranks < 2:
            raise MHCOptionError(f"pipeline={self.ranks}: a pipeline has at least 2 ranks.")
        if self.network is not None and self.network <= 0:
            raise MHCOptionError(f"network={self.network}: must be more than 0 bytes a second.")
        self.table()

    def table(self) -> Schedule:
        """Return torch's schedule."""
        return schedule_of(self.schedule, self.ranks, self.microbatches or _MICROBATCHES_A_RANK * self.ranks)


@dataclass(frozen=True)
class Stage:
    """A proposed stage.

    Attributes:
        rank: that holds it.
        first: name of its first block.
        last: name of its last block.
        blocks: their number.
        forward_seconds: of a microbatch.
        backward_seconds: of a microbatch.
        parameters: elements, with mHC's.
        held_bytes: parameters with their optimizer's state, and the activations of as many microbatches as are alive.
    """

    rank: int
    first: str
    last: str
    blocks: int
    forward_seconds: float
    backward_seconds: float
    parameters: int
    held_bytes: int


@dataclass(frozen=True)
class Step:
    """A step of the pipeline.

    Attributes:
        sent_bytes: by the rank that sends most.
        transfer_seconds: of one send.
        seconds: of the step.
        exposed_seconds: what it would be shorter by if sends took no time.
        idle: share of the ranks' time in which they do not compute.
    """

    sent_bytes: int
    transfer_seconds: float
    seconds: float
    exposed_seconds: float
    idle: float


@dataclass(frozen=True)
class PipelinePrediction:
    """A predicted pipeline.

    Attributes:
        gpu: name.
        ranks: GPUs.
        schedule: torch's name.
        microbatches: of a step.
        tokens: of a microbatch.
        network: bytes a second from rank to rank.
        stages: in the order of the model.
        mhc: the step with mHC.
        plain: the plain model's, cut alike.
        divisible: the step with mHC, if input and weight gradients took half of a backward each; None where the
            schedule does not divide it.
    """

    gpu: str
    ranks: int
    schedule: str
    microbatches: int
    tokens: int
    network: float
    stages: tuple[Stage, ...]
    mhc: Step
    plain: Step
    divisible: Step | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {"measured": False, **asdict(self)}

    @property
    def rank_bytes(self) -> list[int]:
        """Bytes that each rank holds."""
        return [sum(stage.held_bytes for stage in self.stages if stage.rank == rank) for rank in range(self.ranks)]

    @property
    def summary(self) -> list[str]:
        """Sentences that say what the table of stages does not."""
        sentences = [
            f"Predicted, not measured: {self.ranks} {self.gpu} in a pipeline, {self.schedule}, {self.microbatches} "
            f"microbatches of {self.tokens:,} tokens, {self.network / 1e9:.0f} GB/s from one to the next.",
            f"Step: {_told(self.mhc)} with mHC, {_told(self.plain)} plain with the same cuts.",
            f"The cuts make the slowest stage as fast as can be, and of those within {SLACK:.0%} of that the fullest "
            f"as empty. The fullest GPU holds {max(self.rank_bytes) / _GIB:.1f} GiB: {_BYTES_A_PARAMETER} bytes a "
            "parameter, and the activations of the microbatches that are alive at once.",
        ]
        if self.divisible is not None:
            sentences.append(
                f"{self.schedule} divides the backward into input and weight gradients. torch cannot divide that of a "
                f"compiled stage and runs it twice; if it could, the step with mHC would take {_told(self.divisible)}."
            )
        return sentences

    def __str__(self) -> str:
        """Return sentences and a table that a person can read."""
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for heading in ("stage", "rank", "from", "to", "blocks", "forward", "backward", "parameters", "held"):
            table.add_column(heading, overflow="fold", justify="left" if heading in ("from", "to") else "right")
        for number, stage in enumerate(self.stages):
            table.add_row(
                str(number), str(stage.rank), stage.first, stage.last, str(stage.blocks),
                f"{stage.forward_seconds * 1e3:.2f} ms", f"{stage.backward_seconds * 1e3:.2f} ms",
                f"{stage.parameters:,}", f"{stage.held_bytes / _GIB:.1f} GiB",
            )  # fmt: skip
        buffer = io.StringIO()
        console = Console(file=buffer, width=118, color_system=None, highlight=False, emoji=False, markup=False)
        console.print("\n".join(self.summary))
        console.print(table)
        return buffer.getvalue().rstrip()


def predict_pipeline(
    pieces: Sequence[Piece], chain: ChainSize, tokens: int, n_streams: int, manifold: str, pipeline: Pipeline, gpu: str
) -> PipelinePrediction:
    """Propose cuts and predict a step.

    Args:
        pieces: of the model, at least as many as the schedule has stages.
        chain: the model's stream as traced.
        tokens: of a microbatch.
        n_streams: n.
        manifold: a name of `MANIFOLDS`.
        pipeline: ranks, schedule, microbatches and network.
        gpu: a name of `kernels.costs.gpus.GPUS`.

    Raises:
        MHCOptionError: there are fewer blocks than stages.
    """
    schedule, card = pipeline.table(), find_gpu(gpu)
    if len(pieces) < schedule.stages:
        raise MHCOptionError(
            f"{schedule.name} on {pipeline.ranks} ranks has {schedule.stages} stages, more than the {len(pieces)} "
            "blocks of the model: take fewer ranks, or a schedule with one stage a rank such as 1F1B."
        )
    costs = _Costs(tuple(pieces), chain, tokens, n_streams, manifold, card)
    alive = [schedule.most_alive(stage) for stage in range(schedule.stages)]
    ends = propose_cuts(
        len(pieces),
        schedule.stages,
        lambda start, end: costs.forward(start, end) + costs.backward(start, end),
        lambda stage, start, end: costs.held(start, end, alive[stage]),
    )
    cuts = tuple(zip((0, *ends), ends, strict=False))
    stages = tuple(
        Stage(
            rank=schedule.rank_of[number],
            first=pieces[start].name,
            last=pieces[end - 1].name,
            blocks=end - start,
            forward_seconds=costs.forward(start, end),
            backward_seconds=costs.backward(start, end),
            parameters=costs.parameters(start, end),
            held_bytes=costs.held(start, end, alive[number]),
        )
        for number, (start, end) in enumerate(cuts)
    )
    network = pipeline.network or card.network
    step = partial(_step, schedule, cuts, network)
    plain = replace(costs, n_streams=0)
    divides = any(action.kind == "W" for actions in schedule.actions for action in actions)
    return PipelinePrediction(
        gpu=card.name,
        ranks=pipeline.ranks,
        schedule=schedule.name,
        microbatches=schedule.microbatches,
        tokens=tokens,
        network=network,
        stages=stages,
        mhc=step(costs, 1.0),
        plain=step(plain, 1.0),
        divisible=step(costs, 0.5) if divides else None,
    )


def _step(schedule: Schedule, cuts: Sequence[tuple[int, int]], network: float, costs: _Costs, share: float) -> Step:
    """Play a step through; `share` of a backward is what its input or weight gradients take."""

    def seconds(kind: str, stage: int) -> float:
        if kind == FORWARD:
            return costs.forward(*cuts[stage])
        return costs.backward(*cuts[stage]) * (1.0 if kind == "B" else share)

    transfer = costs.sent / network
    ranks = range(len(schedule.actions))
    timeline, immediate = play(schedule, seconds, transfer), play(schedule, seconds, 0.0)
    return Step(
        sent_bytes=costs.sent * max(schedule.sends(rank) for rank in ranks),
        transfer_seconds=transfer,
        seconds=timeline.seconds,
        exposed_seconds=timeline.seconds - immediate.seconds,
        idle=1 - sum(timeline.busy(rank) for rank in ranks) / (len(ranks) * timeline.seconds),
    )


@dataclass(frozen=True)
class _Costs:
    """What a run of pieces costs for one microbatch; with no streams, in the plain model."""

    pieces: tuple[Piece, ...]
    chain: ChainSize
    tokens: int
    n_streams: int
    manifold: str
    gpu: GPU

    @property
    def sent(self) -> int:
        """Bytes of a hidden state, or of its streams."""
        return max(self.n_streams, 1) * self.tokens * self.chain.width * self.chain.dtype.itemsize

    def forward(self, start: int, end: int) -> float:
        return self._products(start, end) + self._sites(start, end) * self._moved("forward")

    def backward(self, start: int, end: int) -> float:
        """Twice the products of the forward; the operators' backward, and the streams that are computed again."""
        return 2 * self._products(start, end) + self._sites(start, end) * self._moved("backward", "forward")

    def parameters(self, start: int, end: int) -> int:
        named = {name: count for piece in self.pieces[start:end] for name, count in piece.parameters.items()}
        own = 0
        if self.n_streams:
            manifold = MANIFOLDS[self.manifold]
            rows = manifold.rows(self.n_streams)
            own = rows * self.n_streams * self.chain.width + rows + manifold.scales
        return sum(named.values()) + self._sites(start, end) * own

    def held(self, start: int, end: int, alive: int) -> int:
        scale = self.tokens / self.chain.tokens
        saved = round(scale * sum(piece.work.saved_bytes for piece in self.pieces[start:end]))
        sites = self._sites(start, end)
        if self.n_streams and sites:
            interval = traffic.recompute_interval(sites, self.n_streams)
            saved += self.tokens * traffic.saved_bytes_per_token(
                sites, self.n_streams, self.chain.width, self.chain.dtype.itemsize, interval, self.manifold
            )
        return _BYTES_A_PARAMETER * self.parameters(start, end) + alive * saved

    def _products(self, start: int, end: int) -> float:
        flops = sum(piece.work.flops for piece in self.pieces[start:end])
        return flops * self.tokens / self.chain.tokens / self.gpu.matmul_rate(self.chain.dtype.itemsize)

    def _sites(self, start: int, end: int) -> int:
        return sum(piece.sites for piece in self.pieces[start:end])

    def _moved(self, *passes: str) -> float:
        """Return the seconds that the operators of a site take beyond a plain residual add."""
        if not self.n_streams:
            return 0.0
        sizes = (self.tokens, self.chain.width, self.n_streams, self.chain.dtype, self.manifold)
        share = self.chain.normed / self.chain.sites
        return sum(_site_seconds(self.gpu, name, *sizes, share) for name in passes)


# Putting numbers into a formula takes longer than all that is done with the result.
@functools.cache
def _site_seconds(
    gpu: GPU, name: str, tokens: int, width: int, n_streams: int, dtype: torch.dtype, manifold: str, normed: float
) -> float:
    """Return the seconds of a pass beyond a plain residual add, on average where a share of the sites is normed."""
    fusion = choose_on(gpu, tokens, width, n_streams, dtype, manifold=manifold).fusion
    evaluate: Callable[..., float] = partial(
        traffic.evaluate,
        manifold=manifold,
        tokens=tokens,
        width=width,
        n_streams=n_streams,
        element_size=dtype.itemsize,
        sites=2,
    )
    moved, folded, plain = (
        evaluate(getattr(one, name).ours.bytes)
        for one in (traffic.site(fusion), traffic.site(fusion, normed=True), traffic.PLAIN)
    )
    return (moved + normed * (folded - moved) - plain) / gpu.kernel_rate


def _told(step: Step) -> str:
    return (
        f"{step.seconds * 1e3:.1f} ms ({step.idle:.0%} idle, {step.exposed_seconds * 1e3:.1f} ms waiting for sends of "
        f"{step.sent_bytes / _GIB:.2f} GiB a rank)"
    )
