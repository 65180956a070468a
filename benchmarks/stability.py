"""Measure how far hyper-connections amplify, and at which learning rate each manifold diverges.

    python -m benchmarks.stability [--quick] [--out DIR]

`gain` multiplies perturbed mixing matrices over depth. `training` runs a deep network on handwritten digits with a
plain residual stream, with plain hyper-connections (`none`) and with mHC (`sinkhorn`), through the backend, at rising
learning rates. Whatever comes out is reported. CPU by default: the result does not depend on speed.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from mhc_compile.kernels import ops
from mhc_compile.kernels.manifolds import MANIFOLDS
from torch import Tensor, nn
from torch.nn import functional as nnf

import mhc_compile
from mhc_compile.gain import composite_gain

from . import stability_report
from .digits import DigitsNet, batches, digits
from .record import Benchmark, Options, Record, in_time, run_as_script
from .terminal import say, track

PLAIN = "plain residual"
KINDS = (PLAIN, "none", "sinkhorn")
GAINS = ("none", "row", "identity", "sinkhorn", "permutation", "kronecker")
_STREAMS = 4
_TOKENS = 64
# A network that says nothing has a loss of ln 10. One that stays far above it for some steps has lost its way.
_DIVERGED_LOSS = 3.0 * math.log(10.0)
_PATIENCE = 5


@dataclass(frozen=True)
class Sweep:
    """The sizes of a run.

    Attributes:
        depths: sites over which perturbed matrices are multiplied.
        spreads: standard deviations of the perturbation of the mixing logits.
        blocks: of the trained network.
        width: its features.
        batch: images in a step.
        steps: of each training run.
        rates: learning rates, rising.
        seeds: of weights and batches.
    """

    depths: tuple[int, ...]
    spreads: tuple[float, ...]
    blocks: int
    width: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


FULL = Sweep((20, 60, 120, 240), (0.05, 0.2, 1.0), 100, 32, 64, 60, (1e-3, 4e-3, 8e-3, 1.6e-2), (0, 1, 2))
QUICK = Sweep((20, 60), (0.2,), 6, 16, 32, 8, (4e-3, 6.4e-2), (0,))


def perturbed_gain(manifold: str, depth: int, spread: float, seed: int) -> tuple[list[float], list[float]]:
    """Return the forward and backward gain after each site, for mixing logits perturbed around where they start.

    Every site and token draws its own matrix, as after training with an input-dependent projection.
    """
    family = MANIFOLDS[manifold]
    generator = torch.Generator().manual_seed(seed)
    rest = family.rest_bias(_STREAMS).double()
    matrices = []
    for _ in range(depth):
        noise = torch.randn(_TOKENS, *rest.shape, generator=generator, dtype=torch.float64)
        # A manifold that does not mix has no logits: its matrix stays where it is.
        logits = rest + spread * noise if family.mixes else rest.expand_as(noise)
        matrices.append(family.project(logits, 20, 0.0))
    return composite_gain(matrices)


def measure_gains(sweep: Sweep, options: Options, record: Record) -> None:
    """Add a row for each manifold, spread and seed, with the gain at every depth."""
    cases = [(manifold, spread) for spread in sweep.spreads for manifold in GAINS]
    for manifold, spread in track(cases, "gain over depth"):
        for seed in sweep.seeds:
            forward, backward = perturbed_gain(manifold, max(sweep.depths), spread, seed)
            record.add(
                part="gain", manifold=manifold, spread=spread, seed=seed, depths=list(sweep.depths),
                forward=[forward[depth - 1] for depth in sweep.depths],
                backward=[backward[depth - 1] for depth in sweep.depths],
            )  # fmt: skip


class Trainer:
    """One compiled network, trained again and again from fresh weights: compiling 100 blocks takes longer."""

    def __init__(self, kind: str, sweep: Sweep, options: Options) -> None:
        """Build, attach and compile.

        Args:
            kind: one of `KINDS`.
            sweep: the sizes.
            options: the device.
        """
        self.kind, self.sweep, self.device = kind, sweep, options.device
        torch.manual_seed(0)
        self.model: nn.Module = DigitsNet(sweep.blocks, sweep.width).to(options.device)
        self.compiled: Callable[..., Any]
        if kind == PLAIN:
            self.compiled = torch.compile(self.model, backend="eager", dynamic=False)
        else:
            example = torch.zeros(sweep.batch, 64, device=options.device)
            config = mhc_compile.MHCConfig(n_streams=_STREAMS, manifold=kind)
            mhc_compile.attach(self.model, example, config=config)
            # Eager inside: the rewritten graph runs as it is, with no compile time for each of some 100 sites.
            self.compiled = torch.compile(self.model, backend="mhc", options={"inner": "eager"}, dynamic=False)
        ours = mhc_compile.parameters(self.model)
        self.start = {name: value.detach().clone() for name, value in ours.items()}

    def restart(self, seed: int) -> None:
        """Give the model the weights of a seed, the same for every kind, and the mappings their first values."""
        torch.manual_seed(seed)
        fresh = DigitsNet(self.sweep.blocks, self.sweep.width).state_dict()
        self.model.load_state_dict({**self.model.state_dict(), **fresh, **self.start})
        # A run that diverged leaves gradients that are not finite.
        self.model.zero_grad(set_to_none=True)

    def train(self, rate: float, seed: int, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Train from fresh weights and return one row: curves, and the step of divergence if any.

        AdamW without clipping and without warm-up: what is tested is what the stream itself survives.
        """
        self.restart(seed)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        losses: list[float] = []
        norms: list[float] = []
        gains: list[tuple[float, float]] = []
        diverged: int | None = None
        begin = time.perf_counter()
        drawn = batches(*data, size=self.sweep.batch, steps=self.sweep.steps, seed=seed)
        for pixels, classes in drawn:
            with recorded_mixing() as matrices:
                loss = nnf.cross_entropy(self.compiled(pixels.to(self.device)), classes.to(self.device))
            loss.backward()
            norms.append(float(nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)))
            losses.append(loss.item())
            gains.append(_largest_gain(matrices))
            diverged = diverged_at(losses)
            if diverged is not None:
                break
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tail = losses[-10:]
        return {
            "part": "training", "kind": self.kind, "rate": rate, "seed": seed, "steps": len(losses),
            "diverged_at": diverged, "final_loss": _short([sum(tail) / len(tail)])[0],
            "seconds": time.perf_counter() - begin,
            "losses": _short(losses), "gradient_norms": _short(norms),
            "forward_gains": _short([gain[0] for gain in gains]),
            "backward_gains": _short([gain[1] for gain in gains]),
        }  # fmt: skip


def diverged_at(losses: list[float]) -> int | None:
    """Return the step at which a run diverged: not finite, or far above chance for several steps in a row."""
    if losses and not math.isfinite(losses[-1]):
        return len(losses) - 1
    tail = losses[-_PATIENCE:]
    if len(tail) == _PATIENCE and min(tail) > _DIVERGED_LOSS:
        return len(losses) - _PATIENCE
    return None


def _largest_gain(matrices: list[Tensor]) -> tuple[float, float]:
    if not matrices:
        return 1.0, 1.0
    forward, backward = composite_gain(matrices)
    return max(forward), max(backward)


def _short(values: list[float]) -> list[float | None]:
    """Four digits; what is not finite becomes None, for which JSON has no number."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]


@contextmanager
def recorded_mixing() -> Iterator[list[Tensor]]:
    """Collect the mixing matrices of every site that runs inside, in order.

    `mhc_compile.gain.mixing_matrices` compiles the model anew to do so: too slow for every step. This looks at the
    operator itself, which the eager inner backend calls.
    """
    matrices: list[Tensor] = []
    dispatch = ops.run

    def run(name: str, *arguments: Any, **keywords: Any) -> Any:
        results = dispatch(name, *arguments, **keywords)
        # What is replayed in a backward is another operator.
        if name in ("pre", "measure", "post_pre", "post_measure", "pre_norm", "post_pre_norm"):
            names = ops.OPERATORS[name].signature.results
            matrices.append(
                next(made for key, made in zip(names, results, strict=True) if key.endswith("res")).detach()
            )
        return results

    with mock.patch.object(ops, "run", run):
        yield matrices


def train_all(sweep: Sweep, options: Options, record: Record) -> None:
    """Add a row for each kind, learning rate and seed."""
    if importlib.util.find_spec("sklearn") is None:
        record.skip("training", "scikit-learn is not installed (pip install 'mhc-compile[bench]')")
        return
    data = digits()
    for kind in KINDS:
        if not options.wants(kind) or not in_time(options, record, f"training, {kind}", needs=30.0):
            continue
        say(f"compiling {sweep.blocks} blocks, {kind}")
        trainer = Trainer(kind, sweep, options)
        cases = [(rate, seed) for rate in sweep.rates for seed in sweep.seeds]
        for rate, seed in track(cases, f"training, {kind}"):
            if in_time(options, record, f"training, {kind}, rate {rate}, seed {seed}"):
                record.add(**trainer.train(rate, seed, data))
        torch._dynamo.reset()


def run(options: Options, record: Record) -> None:
    """Measure both parts."""
    sweep = QUICK if options.quick else FULL
    record.fact(streams=_STREAMS, blocks=sweep.blocks, width=sweep.width, steps=sweep.steps, batch=sweep.batch)
    if options.wants("gain"):
        measure_gains(sweep, options, record)
    train_all(sweep, options, record)


BENCHMARK = Benchmark(
    "stability",
    "Stability: composite gain over depth, and training at rising learning rates",
    run,
    stability_report.tables,
    stability_report.figures,
)

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
