"""What came out of the runs: numbers, table, verdict and figure."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..gain import ChainGain

if TYPE_CHECKING:
    from rich.table import Table

# Fraction of the old value that the smoothed loss curve keeps at every step.
_SMOOTHING = 0.8


@dataclass(frozen=True)
class RunResult:
    """The numbers of one run.

    Attributes:
        name: "plain", "mHC" or "hyper-connections".
        losses: training loss of every step, nats per character.
        train_loss: mean of the last steps.
        held_out_losses: loss of every held-out batch after training.
        step_seconds: median time of a step, compilation left out.
        compile_seconds: what the first step took beyond that; little where Inductor's cache was warm.
        parameters: number of parameters, in elements.
    """

    name: str
    losses: list[float]
    train_loss: float
    held_out_losses: list[float]
    step_seconds: float
    compile_seconds: float
    parameters: int

    @property
    def held_out_loss(self) -> float:
        """Mean over the held-out batches."""
        return statistics.fmean(self.held_out_losses)


@dataclass(frozen=True)
class DemoResult:
    """The runs, and how far their mixing matrices amplify.

    Attributes:
        plain: the model as it is.
        mhc: the same model with mHC.
        unconstrained: the same model with plain hyper-connections, whose mixing matrices lie on no manifold.
        step_ratio: median over steps of mHC's time divided by plain's for the same batch.
        arithmetic_ratio: multiply-adds of the model with mHC divided by the plain model's.
        gain_before: mHC's composite gain over depth before training.
        gain: the same after training, on held-out text.
        gain_unconstrained: the same of plain hyper-connections.
    """

    plain: RunResult
    mhc: RunResult
    unconstrained: RunResult
    step_ratio: float
    arithmetic_ratio: float
    gain_before: ChainGain
    gain: ChainGain
    gain_unconstrained: ChainGain

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "runs": [{**asdict(run), "held_out_loss": run.held_out_loss} for run in self.runs],
            "step_ratio": self.step_ratio,
            "arithmetic_ratio": self.arithmetic_ratio,
            "gain_before": asdict(self.gain_before),
            "gain": asdict(self.gain),
            "gain_unconstrained": asdict(self.gain_unconstrained),
            "verdict": self.verdict(),
        }

    @property
    def runs(self) -> tuple[RunResult, RunResult, RunResult]:
        """All runs, plain first."""
        return self.plain, self.mhc, self.unconstrained

    def difference(self) -> tuple[float, float]:
        """Return the held-out loss of mHC minus that of plain, and the standard error of that difference.

        The batches are the same, so the error is that of the paired differences.
        """
        pairs = zip(self.mhc.held_out_losses, self.plain.held_out_losses, strict=True)
        differences = [ours - theirs for ours, theirs in pairs]
        spread = statistics.stdev(differences) if len(differences) > 1 else math.inf
        return statistics.fmean(differences), spread / math.sqrt(len(differences))

    def verdict(self) -> str:
        """Say in a sentence or two which run is better, and how far that can be trusted."""
        mean, error = self.difference()
        by = f"{abs(mean):.4f} ± {error:.4f} nats per character ({abs(mean) / self.plain.held_out_loss:.1%})"
        if abs(mean) <= 2.0 * error:
            first = f"On held-out text the two are level: they differ by {by}."
        elif mean < 0:
            first = f"On held-out text mHC is better than the plain model, by {by}."
        else:
            first = f"On held-out text the plain model is better than mHC, by {by}."
        return (
            f"{first} A step with mHC took {self.step_ratio:.2f} times as long, at {self.arithmetic_ratio:.2f} times "
            "the arithmetic; both fall with the model's width. This is one seed of one small model, and the error is "
            "that of the held-out text alone: another --seed may rank them otherwise."
        )

    def table(self) -> Table:
        """Return the comparison as a table for the terminal."""
        from rich.table import Table

        title = "plain, mHC, and hyper-connections without a manifold"
        table = Table(title=title, title_justify="left", caption_justify="left")
        for column in ("", *(run.name for run in self.runs)):
            table.add_column(column, justify="right" if column else "left")
        gains = [f"{max(gain.forward):.4g} / {max(gain.backward):.4g}" for gain in (self.gain, self.gain_unconstrained)]
        unconstrained = self.unconstrained.step_seconds / self.plain.step_seconds
        rows = (
            (
                "training loss, last steps (nats per character)",
                [f"{run.train_loss:.4f}" for run in self.runs],
            ),
            ("held-out loss (nats per character)", [f"{run.held_out_loss:.4f}" for run in self.runs]),
            ("time per step (ms, median)", [f"{1e3 * run.step_seconds:.1f}" for run in self.runs]),
            ("  relative to plain", ["1.00", f"{self.step_ratio:.2f}", f"{unconstrained:.2f}"]),
            ("compilation (s)", [f"{run.compile_seconds:.1f}" for run in self.runs]),
            ("parameters", [f"{run.parameters:,}" for run in self.runs]),
            ("composite gain, forward / backward", ["1 / 1", *gains]),
        )
        for name, values in rows:
            table.add_row(name, *values)
        table.caption = "composite gain: the largest over depth; a plain residual stream has 1"
        return table

    def draw(self, path: Path) -> Path:
        """Draw the loss curves and the composite gains over depth into one PNG and return its path."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.0, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for run, color in zip(self.runs, ("tab:gray", "tab:blue", "tab:red"), strict=True):
            steps = range(1, len(run.losses) + 1)
            left.plot(steps, run.losses, color=color, alpha=0.25, linewidth=0.8)
            left.plot(steps, smoothed(run.losses), color=color, label=f"{run.name}, training")
            left.axhline(
                run.held_out_loss,
                color=color,
                linestyle=":",
                label=f"{run.name}, held out: {run.held_out_loss:.3f}",
            )
        left.set(xlabel="step", ylabel="loss (nats per character)", title="Llama on Python's standard library")
        left.legend(frameon=False)

        depth = range(1, len(self.gain.sites) + 1)
        for gain, name, color in (
            (self.gain_unconstrained, "hyper-connections", "tab:red"),
            (self.gain, "mHC", "tab:blue"),
        ):
            right.plot(depth, gain.forward, marker="o", markersize=4, color=color, label=f"{name}, forward")
            right.plot(
                depth, gain.backward, marker="s", markersize=4, color=color, linestyle="--", label=f"{name}, backward"
            )
        right.axhline(1.0, color="tab:gray", linewidth=0.8, label="plain residual stream")
        right.set(xlabel="sites in the product", ylabel="composite gain", title="Composite gain after training")
        right.set_yscale("log")
        # Gains of mHC lie within thousandths of 1: without a floor the axis would show rounding as drama.
        low, high = right.get_ylim()
        right.set_ylim(min(low, 0.5), max(high, 2.0))
        right.legend(frameon=False)
        figure.savefig(path, dpi=140)
        return path


def smoothed(values: list[float]) -> list[float]:
    """Return the exponential moving average of a curve, without the bias towards its start."""
    curve: list[float] = []
    total = weight = 0.0
    for value in values:
        total = _SMOOTHING * total + (1.0 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1.0 - _SMOOTHING)
        curve.append(total / weight)
    return curve
