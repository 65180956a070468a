"""Long runs that the suite has no time for: `python -m tests.soak [memory] [interrupts] [models]`, by default all.

memory: 2000 training steps of one model, and 200 models compiled one after the other, each thrown away: resident memory
    stays flat within 2 % from a tenth of the run on.
interrupts: Ctrl-C at 300 places of `attach`, of a first call and of a compilation leaves the model as it was.
models: a hundred models compiled in one process, all alive, each still computing what it did alone.

Prints what was measured; exit status 1 if something grew or went wrong.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import mhc_compile

from .interrupting import attach, check, first_call, places
from .models import Stack, features

FLAT = 0.02
INNER = {"inner": "aot_eager"}


def resident() -> float:
    """Return the process's resident memory in MB; where the system does not tell, its highest so far."""
    gc.collect()
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _is_flat(name: str, count: int, step: Callable[[int], None]) -> bool:
    """Run steps; compare memory after the first tenth, in which caches fill, with that at the end."""
    started = time.time()
    for index in range(count):
        if index == count // 10:
            before = resident()
        step(index)
    after = resident()
    growth = after / before - 1
    print(
        f"{name}: {count} in {time.time() - started:.0f} s, {before:.1f} MB to {after:.1f} MB ({growth:+.2%})",
        flush=True,
    )
    return growth <= FLAT


def steps(count: int) -> bool:
    """Train one model."""
    model = Stack()
    mhc_compile.attach(model, features())
    compiled = torch.compile(model, backend="mhc", options=INNER)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(index: int) -> None:
        compiled(features(5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _is_flat("training steps", count, step)


def compilations(count: int) -> bool:
    """Compile models and throw them away."""

    def step(index: int) -> None:
        torch._dynamo.reset()
        model = Stack()
        mhc_compile.attach(model, features())
        torch.compile(model, backend="mhc", options=INNER)(features()).sum().backward()

    return _is_flat("compilations", count, step)


def interrupts(count: int) -> bool:
    """Interrupt everywhere."""
    wrong = 0
    for name, call, attached in (
        ("attach", attach, False),
        ("first", first_call, False),
        ("compile", first_call, True),
    ):
        hit = 0
        for at in places(call, attached, count // 3, seed=1):
            try:
                hit += bool(check(call, at, attached)[1])
            except AssertionError as error:
                wrong += 1
                print(f"{name}, call {at}: {str(error).splitlines()[0]}", flush=True)
        print(f"interrupts of {name}: {hit} of {count // 3} came through", flush=True)
    return not wrong


def models(count: int) -> bool:
    """Compile many models of one class; all stay."""
    made: list[tuple[nn.Module, Callable[..., torch.Tensor], torch.Tensor]] = []
    for _ in range(count):
        model = Stack()
        plain = model(features()).detach()
        mhc_compile.attach(model, features())
        made.append((model, torch.compile(model, backend="mhc", options=INNER), plain))
        made[-1][1](features())
    wrong = sum(not torch.equal(compiled(features()), plain) for _, compiled, plain in made)
    print(f"models in one process: {count}, {wrong} of them compute something else", flush=True)
    return not wrong


RUNS: dict[str, Callable[[float], bool]] = {
    "memory": lambda scale: steps(int(2000 * scale)) & compilations(int(200 * scale)),
    "interrupts": lambda scale: interrupts(int(300 * scale)),
    "models": lambda scale: models(int(100 * scale)),
}


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", choices=[[], *RUNS], help="what to run; everything by default")
    parser.add_argument("--scale", type=float, default=1.0, help="of the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return int(not all([RUNS[name](arguments.scale) for name in arguments.runs or RUNS]))


if __name__ == "__main__":
    sys.exit(main())
