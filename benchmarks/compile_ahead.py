"""Compile every kernel ahead of time, with no GPU present, and report what it would cost on each target.

    python -m benchmarks.compile_ahead [--all] [--kernel NAME] [--target sm_90] [--jobs N]

The launches are those the operators would make: they run on meta tensors, with the launcher recorded. Prints
registers, spilled bytes, shared memory and the widest global load; exits 1 on a spill or on a kernel that
does not fit.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
# Triton 3.9 warns when this is unset, once a process.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from mhc_compile.kernels.dispatch import kernel_of
from mhc_compile.kernels.epsilons import Epsilons
from mhc_compile.kernels.fusions import MOST_NORMED_STREAMS
from mhc_compile.kernels.gpu import launch
from mhc_compile.kernels.ops import OPERATORS
from mhc_compile.kernels.orientation import PhiLayout
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget

from .by_name import Case, arguments_of
from .precompile import Launch, identity


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the shared memory that one program may have on it."""

    name: str
    gpu: GPUTarget
    shared: int


TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 166912),
    Target("sm_90", GPUTarget("cuda", 90, 32), 232448),
    Target("sm_100", GPUTarget("cuda", 100, 32), 232448),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 65536),
)


MAIN_CASES = (Case(4, torch.bfloat16, 8192), Case(4, torch.bfloat16, 16))
MORE_CASES = (
    Case(8, torch.bfloat16, 8192),
    Case(8, torch.bfloat16, 16),
    Case(4, torch.float32, 8192),
    Case(4, torch.float32, 16),
)
# Matrices that are made of a row of logits.
ROW_CASES = (
    Case(4, torch.bfloat16, 8192, manifold="permutation", anchored=True),
    Case(8, torch.bfloat16, 8192, manifold="kronecker", anchored=True),
)
# The weights of a model that carries streams itself lie in its own way.
NATIVE_CASES = tuple(replace(case, layout=PhiLayout(transposed=True, columns=True)) for case in MAIN_CASES)
RARE_CASES = (*NATIVE_CASES, *ROW_CASES)
# By target: kernels of other cases that fill the registers, and would be the first to spill.
CROWDED_CASES: dict[str, tuple[tuple[Case, frozenset[str]], ...]] = {
    "sm_90": (
        (NATIVE_CASES[0], frozenset({"parameter_gradients_kernel", "last_gradients_kernel"})),
        *((case, frozenset({"projection_kernel"})) for case in ROW_CASES),
    ),
    "gfx942": (
        (
            replace(MORE_CASES[0], anchored=True),
            frozenset({"collapse_kernel", "post_backward_kernel", "last_gradients_kernel"}),
        ),
    ),
}
# Sinkhorn as models write it: DeepSeek-V4, and with an eps in every sum.
EPS_CASES = tuple(Case(4, torch.bfloat16, 8192, eps=eps) for eps in (1e-6, Epsilons(0.0, 1e-6, 0.0, 1e-6)))
OTHER_CASES = tuple(
    Case(n, dtype, tokens)
    for n in (1, 2, 3, 5, 6, 7, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for tokens in (8192, 16)
)


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    kernel: str
    case: str
    target: str
    tile: str
    registers: int
    spilled: int
    shared: int
    load_bits: int
    fits: bool


class _Driver:
    """Stands in for a device driver: names the target, launches nothing."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> int:
        return TARGETS.index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


def run_operators(case: Case) -> None:
    """Call every operator, forward and backward, with meta tensors of the case's shapes."""
    backwards = (operator.backward._name for operator in OPERATORS.values() if operator.backward is not None)
    for name in dict.fromkeys((*OPERATORS, *backwards)):
        if "norm" not in name:
            kernel_of(name)(*arguments_of(name, case))
        elif case.n <= MOST_NORMED_STREAMS:
            for centered in (True, False):
                kernel_of(name)(*arguments_of(name, replace(case, centered=centered)))


def launches(case: Case, target: Target) -> list[Launch]:
    """Return every launch that the operators make for a case."""
    found: list[Launch] = []
    with launch.recording(
        lambda kernel, grid, args, options: found.append((kernel, args, options)), target.gpu.backend
    ):
        run_operators(case)
    return found


def compile_all(target: Target, everything: bool = False, only: str = "", part: int = 0, parts: int = 1) -> list[Row]:
    """Compile this part's share of the distinct kernels for a target."""
    triton.runtime.driver.set_active(_Driver(target))
    rows: list[Row] = []
    seen: set[str] = set()
    made = [
        (case, one)
        for case, kernels in cases_for(target, everything)
        for one in launches(case, target)
        if only in one[0].__name__ and (kernels is None or one[0].__name__ in kernels)
    ]
    different = {identity(one): (case, one) for case, one in reversed(made)}
    for case, (kernel, args, options) in list(reversed(different.values()))[part::parts]:
        compiled = kernel.warmup(*args, grid=(1,), **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            rows.append(_describe(compiled, kernel.__name__, case, target, options))
    return rows


def _describe(compiled: Any, name: str, case: Case, target: Target, options: dict[str, Any]) -> Row:
    registers, spilled = _resources(compiled)
    shared = compiled.metadata.shared
    tile = "×".join(str(options[key]) for key in ("BLOCK_TOKENS", "BLOCK_WIDTH", "BLOCK") if key in options)
    return Row(
        kernel=name.removesuffix("_kernel"),
        case=case.label,
        target=target.name,
        tile=f"{tile} w{options.get('num_warps', 4)}",
        registers=registers,
        spilled=spilled,
        shared=shared,
        load_bits=_widest_load(compiled.asm),
        fits=spilled == 0 and shared <= target.shared,
    )


def _resources(compiled: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spills = [int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)]
        return registers, 4 * sum(spills)
    tool = Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", text)[-1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _widest_load(assembly: dict[str, str]) -> int:
    """Bits of the widest load from global memory; 0 where the assembly shows none."""
    if "amdgcn" in assembly:
        widths = re.findall(
            r"(?:global|buffer)_load_(?:lds_)?(dwordx4|dwordx3|dwordx2|dword|ushort|short)",
            assembly["amdgcn"],
        )
        bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}
        return max((bits[width] for width in widths), default=0)
    text = assembly["ptx"]
    loads = re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", text)
    found = [int(count or 1) * int(bits) for count, bits in loads]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?,\s*0x([0-9a-f]+)", text)
    return max(found + [8 * int(size, 16) for size in copies], default=0)


def _print(rows: list[Row]) -> None:
    table = Table(title="kernels compiled ahead of time", title_justify="left")
    for heading in ("kernel", "case", "tile", "target"):
        table.add_column(heading, no_wrap=True)
    for heading in ("registers", "spilled B", "shared B", "load bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        style = None if row.fits else "bold red"
        cells = (row.registers, row.spilled, row.shared, row.load_bits)
        table.add_row(row.kernel, row.case, row.tile, row.target, *map(str, cells), style=style)
    Console(width=132 if not sys.stdout.isatty() else None).print(table)


def cases_for(target: Target, everything: bool) -> list[tuple[Case, frozenset[str] | None]]:
    """Return what to compile: what a rewritten model of the usual n and dtype runs, and on one target more.

    A rewritten model holds its streams anchored, the functional interface as they are. Beside a case stand the kernels
    to compile of it, None for all.
    """
    cases = MAIN_CASES + (MORE_CASES if everything or target.name == "sm_90" else ())
    plain = MAIN_CASES + EPS_CASES if target.name == "sm_90" else ()
    if everything:
        cases += OTHER_CASES
        plain = cases + EPS_CASES
    whole = [*(replace(case, anchored=True) for case in cases), *plain, *(RARE_CASES if everything else ())]
    return [*((case, None) for case in whole), *(() if everything else CROWDED_CASES.get(target.name, ()))]


def main() -> int:
    """Compile, print the table, and return 1 if a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every n, dtype and layout, on every target (many minutes)")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--target", default="", choices=["", *(target.name for target in TARGETS)])
    parser.add_argument("--bad", action="store_true", help="print only what spills or does not fit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    rows: list[Row] = []
    pool_of = ProcessPoolExecutor if arguments.jobs > 1 else ThreadPoolExecutor
    with pool_of(arguments.jobs) as pool:
        tasks = [
            pool.submit(compile_all, target, arguments.all, arguments.kernel, part, 4)
            for target in TARGETS
            if arguments.target in ("", target.name)
            for part in range(4)
        ]
        for task in tasks:
            rows += task.result()
    rows.sort(key=lambda row: (row.kernel, row.case, [target.name for target in TARGETS].index(row.target)))
    _print([row for row in rows if not (arguments.bad and row.fits)])
    bad = [row for row in rows if not row.fits]
    print(f"Triton {triton.__version__}: {len(rows)} kernels compiled, {len(bad)} spill or do not fit")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
