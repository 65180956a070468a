"""Read the machine code of a boundary's kernels: registers, spills, barriers, and instructions for each byte moved.

    python -m benchmarks.machine_code [--target sm_90] [--tokens 8192] [--width 4096] [--label after]

Nothing runs, and no GPU is needed. Of a kernel that walks over channels or tokens its longest loop is counted, of one
that does not all of it: instructions of a thread over the bytes that it loads and stores by them, from whatever cache.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
# Triton 3.9 warns when this is unset.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from mhc_compile.kernels.dispatch import kernel_of
from mhc_compile.kernels.gpu import launch

from .by_name import Case, arguments_of
from .compile_ahead import TARGETS, Target, _Driver, _resources
from .counted import add_arguments, keep
from .terminal import Table

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# Both ways of a boundary, in the order of a training step.
_OPERATORS = ("post_pre", "post_pre_backward")


def instructions_of(cubin: bytes) -> list[tuple[int, str, str]]:
    """Return (address, instruction, operands) of a kernel for NVIDIA GPUs."""
    tool = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = [(int(place, 16), name, rest) for place, name, rest in _INSTRUCTION.findall(text)]
    return [one for one in found if one[1] != "NOP"]


def longest_loop(code: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Return the loop with the most instructions that moves bytes, all of the code where there is none."""
    best: list[tuple[int, str, str]] = []
    for place, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < place:
            body = [one for one in code if int(target[1], 16) <= one[0] <= place]
            if len(body) > len(best) and moved(body):
                best = body
    return best or code


def moved(code: list[tuple[int, str, str]]) -> int:
    """Return the bytes that a thread loads from and stores to global memory."""
    total = 0
    for _, name, _ in code:
        if name.startswith(("LDG", "STG")):
            widths = [_BYTES[part] for part in name.split(".")[1:] if part in _BYTES]
            total += widths[0] if widths else 4
    return total


def describe(compiled: Any) -> tuple[str, ...]:
    """Return the cells of one kernel."""
    registers, spilled = _resources(compiled)
    code = instructions_of(compiled.asm["cubin"])
    barriers = sum(name.startswith("BAR") for _, name, _ in code)
    loop = longest_loop(code)
    amount = moved(loop)
    share = f"{len(loop) / amount:.1f}" if amount else "–"
    return str(registers), str(spilled), str(barriers), str(len(code)), str(len(loop)), str(amount), share


def kernels_of(name: str, case: Case, target: Target) -> list[tuple[str, int, Any]]:
    """Return (name, programs, compiled kernel) of an operator's launches."""
    found: list[tuple[str, int, Any]] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        programs = 1
        for count in grid:
            programs *= count
        found.append((kernel.__name__.removesuffix("_kernel"), programs, kernel.warmup(*args, grid=(1,), **options)))

    with launch.recording(record, target.gpu.backend):
        kernel_of(name)(*arguments_of(name, case))
    return found


def main() -> int:
    """Compile, read, print, and keep the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", default="sm_90", choices=[one.name for one in TARGETS if one.gpu.backend == "cuda"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=4)
    add_arguments(parser)
    given = parser.parse_args()
    target = next(one for one in TARGETS if one.name == given.target)
    triton.runtime.driver.set_active(_Driver(target))
    case = Case(given.streams, torch.bfloat16, given.tokens, given.width, anchored=True)
    rows = [
        (name, kernel, str(programs), *describe(compiled))
        for name in _OPERATORS
        for kernel, programs, compiled in kernels_of(name, case, target)
    ]
    table = Table(
        f"Machine code of a boundary's kernels, {case.label}, {target.name}",
        ("pass", "kernel", "programs", "registers", "spilled B", "barriers", "instructions", "looped", "bytes", "each"),
        tuple(rows),
        note="Of a thread. Looped: the longest loop that moves bytes, or all of the kernel; bytes are those that its "
        "loads and stores of global memory ask for, from whatever cache. Each: looped for each of them.",
    )  # fmt: skip
    keep("machine_code", table, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
