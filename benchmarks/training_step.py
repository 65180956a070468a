"""Measure what a training step costs beyond plain Inductor, for each fusion and recomputation.

    python -m benchmarks.training_step [--device cuda] [--quick] [--minutes 8] [--out DIR]

`step` trains a Llama in bf16 with AdamW: time, peak memory and tokens a second, as ratios to `backend="inductor"` of
the same model in the same run. Every case starts from the same function, so its first loss must be that of the plain
model: where it is not, the case is reported as failed. `depth` counts the bytes saved for the backward against the
number of layers. On a CPU the models are narrow, in float32 and on one thread.
`--only boundary/auto`, `--only depth`: cases by fusion and recomputation, or the count.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from mhc_compile.kernels import fusions
from torch import Tensor, nn

from mhc_compile import MHCConfig
from mhc_compile.errors import MHCOptionError

from . import training_report
from .llama import PLAIN, Setting, build, compiled, layers_that_fit, missing, tokens_of
from .record import Benchmark, Options, Record, in_time, run_as_script
from .terminal import say, track
from .timing import compilations, synchronize

# In order of importance: a run that is stopped early has compared what decides the choice.
FUSIONS = tuple(reversed(fusions.FUSIONS))
RECOMPUTES: tuple[str | int, ...] = ("auto", "none", 4)


@dataclass(frozen=True)
class Case:
    """A way to run the model; no options for the plain one."""

    fusion: str
    recompute: str | int = "none"

    @property
    def name(self) -> str:
        """Its name in results and on the command line: "boundary/auto"."""
        return self.fusion if self.fusion == PLAIN else f"{self.fusion}/{self.recompute}"

    @property
    def options(self) -> dict[str, Any] | None:
        """Options of the backend, None for the plain model."""
        return None if self.fusion == PLAIN else {"fusion": self.fusion, "recompute": self.recompute}


BASELINE = Case(PLAIN)


@dataclass(frozen=True)
class Plan:
    """What to run on a device.

    Attributes:
        settings: of the measured steps, the most important first.
        inner: what compiles.
        steps: measured steps of each case, after two that warm up.
        depth: the model of the count of saved bytes; its layers are replaced by `layers`.
        layers: at which saved bytes are counted.
        leading: how many cases the settings behind the first are measured with, the most important; None is all.
    """

    settings: tuple[Setting, ...]
    inner: str
    steps: int
    depth: Setting
    layers: tuple[int, ...]
    leading: int | None = None


def plan_for(options: Options) -> Plan:
    """Return what fits the device and the time."""
    tiny = Setting(64, 4, 2, 64, vocabulary=256, dtype="float32")
    if options.device == "cpu":
        if options.quick:
            return Plan((replace(tiny, layers=1),), "aot_eager", 2, tiny, ())
        # The demo's width first, then widths at which matrix products outweigh the streams.
        settings = tuple(Setting(width, 4, 8, 128, vocabulary=256, dtype="float32") for width in (64, 512, 1024))
        return Plan(settings, "inductor", 6, tiny, (2, 4, 8, 16), leading=3)
    wide = Setting(4096, 4, 2, 4096)
    if options.quick:
        return Plan((replace(wide, layers=2),), "inductor", 5, tiny, ())
    settings = (
        wide,
        Setting(2048, 8, 2, 4096),
        replace(wide, batch=1, length=2048),
        replace(wide, batch=4),
        replace(wide, layers=layers_that_fit(wide, torch.cuda.mem_get_info()[0])),
    )
    return Plan(settings, "inductor", 10, replace(tiny, dtype="bfloat16"), (2, 4, 8, 16))


def cases(options: Options) -> list[Case]:
    """Return every fusion and recomputation that is wanted, the most important first."""
    if options.quick:
        found = [Case("boundary", "auto"), Case("site", "none")]
    else:
        # The best of both lists first, then what is one step from it: a run that is stopped has compared in both.
        ranked = [(rank, Case(fusion, way)) for rank, fusion in enumerate(FUSIONS) for way in RECOMPUTES]
        found = [case for rank, case in sorted(ranked, key=lambda one: one[0] + RECOMPUTES.index(one[1].recompute))]
    return [case for case in found if options.wants(case.name)]


def unsupported(case: Case) -> str | None:
    """Return why this version of the package refuses a case, None if it takes it."""
    try:
        MHCConfig(**(case.options or {}))
    except MHCOptionError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Measured:
    """What one case did.

    Attributes:
        losses: of each step.
        seconds: of each measured step.
        first_seconds: of the first step, which compiles.
        compiled: graphs that were compiled in the measured steps; none should be.
        peak_bytes: most device memory in use beyond what was in use before the model; None on a CPU.
        saved_bytes: kept from forward to backward, parameters left out.
    """

    losses: list[float]
    seconds: list[float]
    first_seconds: float
    peak_bytes: int | None
    saved_bytes: int
    compiled: int = 0


def saved_bytes(model: nn.Module, call: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return the bytes that a forward keeps for its backward, each storage once, and the call's result."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    return sum(kept.values()), result


def measure(case: Case, setting: Setting, plan: Plan, device: str) -> Measured:
    """Train a fresh model for some steps: the first compiles, the second is counted, the rest are timed."""
    before = _start_of_memory(device)
    model = build(setting, device)
    # A batch for each step: none finds its own numbers in a cache, or learned.
    batches = [tokens_of(setting, device, seed) for seed in range(plan.steps + 2)]
    step_model = compiled(model, batches[0], case.options, plan.inner)
    # Fused: one launch for all parameters, so that the mappings' small tensors cost what they cost in practice.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

    def forward(batch: Tensor) -> Tensor:
        loss: Tensor = step_model(input_ids=batch, labels=batch).loss
        return loss

    def finish(loss: Tensor) -> float:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    begin = time.perf_counter()
    losses = [finish(forward(batches[0]))]
    first_seconds = time.perf_counter() - begin
    amount, loss = saved_bytes(model, lambda: forward(batches[1]))
    losses.append(finish(loss))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    before_steps = compilations()
    for batch in batches[2:]:
        synchronize(device)
        begin = time.perf_counter()
        losses.append(finish(forward(batch)))
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    return Measured(losses, seconds, first_seconds, peak, amount, compilations() - before_steps)


def _start_of_memory(device: str) -> int:
    """Free what earlier cases left and return the bytes still in use."""
    torch._dynamo.reset()
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def allowed_loss_error(dtype: str) -> float:
    """Return how far a first loss may lie from the plain model's, as a share.

    Roundings average out over the tokens. No wider: an untrained model that computes something else is off by a few
    thousandths, since its loss is near the logarithm of the vocabulary either way.
    """
    return 1e-5 if dtype == "float32" else 1e-3


def measure_setting(setting: Setting, plan: Plan, options: Options, record: Record, most: int | None = None) -> None:
    """Add a row for each case, `most` at most; the plain model is measured first and again at the end."""
    reference: float | None = None
    wanted = [BASELINE, *cases(options)[:most], BASELINE]
    slowest = 0.0
    for case in track(wanted, f"training step, C={setting.width}, {setting.tokens} tokens"):
        where = f"{case.name}, C={setting.width}, {setting.tokens} tokens, {setting.layers} layers"
        refused = unsupported(case)
        if refused is not None:
            record.skip(where, refused)
            continue
        # The second measurement of the plain model compiles from Inductor's cache.
        if not in_time(options, record, where, needs=0.0 if case == BASELINE else 0.7 * slowest):
            continue
        begin = time.monotonic()
        try:
            measured = measure(case, setting, plan, options.device)
        except torch.OutOfMemoryError:
            record.skip(where, "out of device memory")
            continue
        except Exception as error:
            # One case that breaks must not take the others with it.
            record.fail(where, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
            continue
        slowest = max(slowest, time.monotonic() - begin)
        reference = measured.losses[0] if reference is None else reference
        problems = problems_of(measured, reference, setting.dtype)
        _add(record, case, setting, plan, measured, reference, problems)
        for problem in problems:
            record.fail(where, problem)


def problems_of(measured: Measured, reference: float, dtype: str) -> list[str]:
    """Return why a case's time is not that of a step of the same function."""
    found = []
    first = measured.losses[0]
    if not abs(first - reference) / abs(reference) <= allowed_loss_error(dtype):
        found.append(f"its first loss is {first:.6g}, the plain model's {reference:.6g}")
    if measured.compiled:
        found.append("something was compiled in the steps that were timed")
    return found


def _add(
    record: Record, case: Case, setting: Setting, plan: Plan, measured: Measured, reference: float, problems: list[str]
) -> None:
    seconds = statistics.median(measured.seconds)
    error = abs(measured.losses[0] - reference) / abs(reference)
    record.add(
        part="step", **setting.to_dict(), fusion=case.fusion, recompute=case.recompute, inner=plan.inner,
        step_seconds=seconds, all_seconds=[round(value, 6) for value in measured.seconds],
        tokens_per_second=setting.tokens / seconds, peak_bytes=measured.peak_bytes,
        saved_bytes=measured.saved_bytes, first_step_seconds=measured.first_seconds,
        first_loss=measured.losses[0], last_loss=measured.losses[-1], first_loss_error=error,
        problems=problems,
    )  # fmt: skip


def measure_depth(plan: Plan, options: Options, record: Record) -> None:
    """Count saved bytes against depth, without generating code: what is saved is decided before that."""
    compared: list[Case] = [BASELINE, *(Case("site", recompute) for recompute in RECOMPUTES)]
    if not options.wants("depth"):
        return
    counted = [(layers, case) for layers in plan.layers for case in compared if unsupported(case) is None]
    for layers, case in track(counted, "saved bytes against depth"):
        setting = replace(plan.depth, layers=layers)
        where = f"saved bytes, {case.name}, {layers} layers"
        if not in_time(options, record, where):
            continue
        torch._dynamo.reset()
        model = build(setting, options.device)
        batch = tokens_of(setting, options.device)
        step_model = compiled(model, batch, case.options, "aot_eager")

        def forward(step_model: Callable[..., Any] = step_model, batch: Tensor = batch) -> Tensor:
            loss: Tensor = step_model(input_ids=batch, labels=batch).loss
            return loss

        amount, loss = saved_bytes(model, forward)
        loss.backward()
        record.add(part="depth", **setting.to_dict(), fusion=case.fusion, recompute=case.recompute, saved_bytes=amount)


def run(options: Options, record: Record) -> None:
    """Measure every setting, then depth."""
    why = missing()
    if why is not None:
        record.skip("everything", why)
        return
    plan = plan_for(options)
    if options.device == "cpu":
        say("No GPU: narrow models, one thread. Saved bytes are counted; times do not carry over.")
        measure_depth(plan, options, record)
    first, *others = plan.settings
    measure_setting(first, plan, options, record)
    if options.device != "cpu":
        measure_depth(plan, options, record)
    for setting in others:
        measure_setting(setting, plan, options, record, plan.leading)


BENCHMARK = Benchmark(
    "training_step",
    "Training step: time and memory against plain Inductor",
    run,
    training_report.tables,
    training_report.figures,
)

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
