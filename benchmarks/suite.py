"""Run every benchmark within a given time, the most important first.

Each runs in a process of its own: a kernel that faults or never ends takes nothing else with it, and what was
written before stays.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .record import Options
from .terminal import say

_ROOT = Path(__file__).parents[1]
# Starting Python and PyTorch, and ending after the deadline: a case that runs is not cut off.
_START_SECONDS = 10.0
_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Part:
    """A benchmark, or some of its cases.

    Attributes:
        name: of its module.
        share: of the time that is left when it starts; the last part takes all.
        only: cases; empty is all.
    """

    name: str
    share: float
    only: tuple[str, ...] = ()


# On a GPU: first whether the kernels are right and how fast, then what they cost in a model.
_GPU_PARTS = (
    Part("checks", 0.15),
    Part("kernels", 0.3),
    Part("training_step", 0.6),
    Part("peers", 0.4),
    Part("compile_time", 0.6),
    Part("native", 0.6),
    Part("stability", 1.0),
)
# On a CPU: what means something without a GPU comes first.
_CPU_PARTS = (
    Part("checks", 0.2),
    Part("kernels", 0.3),
    Part("stability", 0.5),
    Part("training_step", 0.5),
    Part("compile_time", 0.5),
    Part("native", 0.5),
    Part("overlap", 0.8),
    Part("peer_steps", 0.8),
    Part("peers", 1.0),
)
# A machine that is lent for ten minutes at a time: each of these is one call, and writes as it goes.
CALLS: dict[str, tuple[Part, ...]] = {
    "checks": (Part("checks", 1.0),),
    "speed": (Part("kernels", 0.7), Part("peers", 1.0)),
    "training": (Part("training_step", 1.0),),
}
CALL_MINUTES = 9.0


def parts_of(call: str | None, device: str) -> tuple[Part, ...]:
    """Return the parts of one of `CALLS`, or all of a device."""
    return CALLS[call] if call else _GPU_PARTS if device == "cuda" else _CPU_PARTS


def run_all(options: Options, call: str | None = None) -> int:
    """Run the parts of a call, or all, and return 1 if one failed; results are in `options.out`."""
    failed = []
    for part in parts_of(call, options.device):
        left = options.seconds_left
        if left < 2 * _START_SECONDS:
            say(f"{part.name}: no time left")
            continue
        begin = time.monotonic()
        # Without a limit there is nothing to share out.
        seconds = left * part.share - _START_SECONDS if left != float("inf") else None
        status = _run(part, options, seconds)
        say(f"{part.name}: {'done' if status == 0 else f'status {status}'}, {time.monotonic() - begin:.0f} s")
        if status:
            failed.append(part.name)
    if failed:
        say(f"failed: {', '.join(failed)}; the JSON files name the cases")
    return 1 if failed else 0


def command(part: Part, options: Options, seconds: float | None) -> list[str]:
    """Return the command line that runs a part."""
    line = [sys.executable, "-m", f"benchmarks.{part.name}", "--device", options.device]
    line += ["--out", str(options.out.resolve())]
    line += ["--quick"] if options.quick else []
    line += ["--note", options.note] if options.note else []
    line += ["--minutes", f"{max(seconds, 1.0) / 60.0:.3f}"] if seconds is not None else []
    for case in part.only:
        line += ["--only", case]
    return line


def _run(part: Part, options: Options, seconds: float | None) -> int:
    limit = None
    if seconds is not None:
        limit = max(1.0, min(seconds + _START_SECONDS + _GRACE_SECONDS, options.seconds_left))
    process = subprocess.Popen(command(part, options, seconds), cwd=_ROOT)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        say(f"{part.name}: stopped after {limit:.0f} s; its JSON holds what was done")
        return 124
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
