"""The demo from beginning to end."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import mhc_compile

from ..errors import MHCError
from ..gain import chain_gains
from .results import DemoResult, RunResult
from .text import even_batches, random_batch, standard_library
from .training import DemoOptions, Run, arithmetic_ratio, learning_rate, mhc_run, plain_run, why_no_inductor

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_HELD_OUT_BATCHES = 24
_LINES = 5


@dataclass(frozen=True)
class DemoFiles:
    """What the demo wrote, and the result behind it."""

    result: DemoResult
    report: mhc_compile.api.Report
    figure: Path
    report_html: Path
    results_json: Path


def run_demo(options: DemoOptions, out: str | Path, console: Console | None = None) -> DemoFiles:
    """Train the model plain, with mHC and with plain hyper-connections, compare them, and save what came out.

    All see the same batches and take turns, batch by batch, so that whatever else the machine does slows all alike.

    Args:
        options: the sizes.
        out: folder for `loss.png`, `report.html` and `results.json`; made if missing.
        console: where to print; left out, the terminal.

    Raises:
        MHCError: a package that the demo needs is missing, or a size does not fit.
    """
    from rich.console import Console

    _check(options)
    with _threads(options.threads):
        return _run(options, Path(out), console or Console())


def _run(options: DemoOptions, folder: Path, console: Console) -> DemoFiles:
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    options = _with_working_backend(options, console)

    text = standard_library()
    console.print(
        f"text: {text.files} files of Python's standard library, {text.train.numel():,} characters "
        f"to train on, {text.held_out.numel():,} held out"
    )
    batches = torch.Generator().manual_seed(options.seed)
    example = random_batch(text.train, options.batch, options.length, batches).to(options.device)
    held_out = [
        batch.to(options.device)
        for batch in even_batches(text.held_out, options.batch, options.length, _HELD_OUT_BATCHES)
    ]
    plain, mhc = plain_run(options), mhc_run(options, example)
    unconstrained = mhc_run(options, example, constrained=False)
    gain_before = chain_gains(mhc.model, input_ids=held_out[0], labels=held_out[0])[0]

    with _progress(console) as progress:
        task = progress.add_task("training", total=options.steps, status="")
        for step in range(options.steps):
            batch = random_batch(text.train, options.batch, options.length, batches).to(options.device)
            for run in (plain, mhc, unconstrained):
                if step == 0:
                    progress.update(task, status=f"compiling {run.name} with {options.backend} …")
                run.step(batch, learning_rate(step, options))
                if step == 0:
                    progress.console.print(f"{run.name}: first step, with compilation: {run.seconds[0]:.1f} s")
            status = "  ".join(f"{run.name} {run.losses[-1]:.3f}" for run in (plain, mhc, unconstrained))
            progress.update(task, advance=1, status=status)
            if (step + 1) % max(options.steps // _LINES, 1) == 0:
                progress.console.print(f"step {step + 1:4d}: {status}")

    gain, gain_unconstrained = (
        chain_gains(run.model, input_ids=held_out[0], labels=held_out[0])[0] for run in (mhc, unconstrained)
    )
    ratios = [ours / theirs for ours, theirs in zip(mhc.seconds, plain.seconds, strict=True)]
    result = DemoResult(
        plain=_result(plain, plain.held_out(held_out)),
        mhc=_result(mhc, mhc.held_out(held_out)),
        unconstrained=_result(unconstrained, unconstrained.held_out(held_out)),
        step_ratio=statistics.median(ratios[2:] or ratios),
        arithmetic_ratio=arithmetic_ratio(plain, options, len(gain.sites)),
        gain_before=gain_before,
        gain=gain,
        gain_unconstrained=gain_unconstrained,
    )
    report = mhc_compile.report(mhc.model)
    files = DemoFiles(
        result=result,
        report=report,
        figure=result.draw(folder / "loss.png"),
        report_html=report.to_html(folder / "report.html"),
        results_json=folder / "results.json",
    )
    seconds = time.perf_counter() - started
    record = {
        "options": options.to_dict(),
        "environment": _environment(options.device),
        "text": {"files": text.files, "train": text.train.numel(), "held_out": text.held_out.numel()},
        "seconds": seconds,
        **result.to_dict(),
    }
    files.results_json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _show(files, console, seconds)
    return files


def _check(options: DemoOptions) -> None:
    missing = [name for name in ("transformers", "matplotlib") if find_spec(name) is None]
    if missing:
        raise MHCError(f"the demo needs {' and '.join(missing)}: pip install 'mhc-compile[demo]'.")
    if options.width < 8 or options.width % 8:
        raise MHCError(f"width={options.width}: must be a multiple of 8 (four attention heads of an even size).")
    for name in ("steps", "batch", "layers", "threads"):
        if getattr(options, name) < 1:
            raise MHCError(f"{name}={getattr(options, name)}: must be at least 1.")
    if options.length < 2:
        raise MHCError(f"length={options.length}: must be at least 2, since each character predicts the next.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise MHCError("device='cuda': PyTorch sees no CUDA device here. Leave --device out, or use --device cpu.")


def _with_working_backend(options: DemoOptions, console: Console) -> DemoOptions:
    """Fall back to aot_eager for both runs where Inductor cannot compile."""
    if options.backend != "inductor":
        return options
    reason = why_no_inductor(options.device)
    if reason is None:
        return options
    console.print(
        f"Inductor does not work here ({reason}). Both runs use aot_eager instead: the losses mean the "
        "same, the times per step are not those of compiled code. A C++ compiler (g++) with Python's "
        "headers brings Inductor back.",
        style="yellow",
    )
    return replace(options, backend="aot_eager")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def _result(run: Run, held_out: list[float]) -> RunResult:
    return RunResult(
        name=run.name,
        losses=run.losses,
        train_loss=run.train_loss,
        held_out_losses=held_out,
        step_seconds=run.step_seconds,
        compile_seconds=run.compile_seconds,
        parameters=run.parameters,
    )


def _environment(device: str) -> dict[str, str | int]:
    """Return what a reader of the timings has to know."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _show(files: DemoFiles, console: Console, seconds: float) -> None:
    console.print()
    # Neither wrapped nor styled: the report brings its own tables.
    print(files.report, file=console.file)
    console.print()
    console.print(files.result.table())
    console.print(files.result.verdict())
    console.print(
        f"\n{seconds:.0f} s in all. Saved {files.figure}, {files.report_html} and {files.results_json}",
        soft_wrap=True,
    )
