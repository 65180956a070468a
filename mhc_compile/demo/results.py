"""What came out of the two runs: numbers, table, verdict and figure."""

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
        name: "plain" or "mHC".
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
    """Both runs and the composite gain of the mHC run.

    Attributes:
        plain: the model as it is.
        mhc: the same model with mHC.
        step_ratio: median over steps of mHC's time divided by plain's for the same batch.
        gain_before: composite gain over depth before training.
        gain: composite gain over depth after training, on held-out text.
    """

    plain: RunResult
    mhc: RunResult
    step_ratio: float
    gain_before: ChainGain
    gain: ChainGain

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "runs": [{**asdict(run), "held_out_loss": run.held_out_loss} for run in self.runs],
            "step_ratio": self.step_ratio,
            "gain_before": asdict(self.gain_before),
            "gain": asdict(self.gain),
            "verdict": self.verdict(),
        }

    @property
    def runs(self) -> tuple[RunResult, RunResult]:
        """Both runs, plain first."""
        return self.plain, self.mhc

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
            f"{first} A step with mHC took {self.step_ratio:.2f} times as long. This is one seed of one "
            "small model, and the error is that of the held-out text alone: another --seed may rank them "
            "otherwise."
        )

    def table(self) -> Table:
        """Return the comparison as a table for the terminal."""
        from rich.table import Table

        table = Table(title="plain against mHC", title_justify="left", caption_justify="left")
        for column in ("", self.plain.name, self.mhc.name):
            table.add_column(column, justify="right" if column else "left")
        gain = f"{max(self.gain.forward):.3f} / {max(self.gain.backward):.3f}"
        rows = (
            (
                "training loss, last steps (nats per character)",
                [f"{run.train_loss:.4f}" for run in self.runs],
            ),
            ("held-out loss (nats per character)", [f"{run.held_out_loss:.4f}" for run in self.runs]),
            ("time per step (ms, median)", [f"{1e3 * run.step_seconds:.1f}" for run in self.runs]),
            ("  relative to plain, same batch", ["1.00", f"{self.step_ratio:.2f}"]),
            ("compilation (s)", [f"{run.compile_seconds:.1f}" for run in self.runs]),
            ("parameters", [f"{run.parameters:,}" for run in self.runs]),
            ("composite gain, forward / backward", ["1 / 1", gain]),
        )
        for name, values in rows:
            table.add_row(name, *values)
        table.caption = "composite gain: the largest over depth; a plain residual stream has 1"
        return table

    def draw(self, path: Path) -> Path:
        """Draw both loss curves and the composite gain over depth into one PNG and return its path."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.0, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for run, color in ((self.plain, "tab:gray"), (self.mhc, "tab:blue")):
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
        for values, marker, color, label in (
            (self.gain.forward, "o", "tab:blue", "forward (largest row sum)"),
            (self.gain.backward, "s", "tab:orange", "backward (largest column sum)"),
        ):
            right.plot(depth, values, marker=marker, markersize=4, color=color, label=label)
        right.axhline(1.0, color="tab:gray", linewidth=0.8, label="plain residual stream")
        right.set(xlabel="sites in the product", ylabel="composite gain", title="Composite gain after training")
        # Gains of mHC lie within thousandths of 1: without a floor the axis would show rounding as drama.
        low, high = right.get_ylim()
        right.set_ylim(min(low, 0.9), max(high, 1.1))
        right.ticklabel_format(useOffset=False)
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
