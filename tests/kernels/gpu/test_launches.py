"""What is launched: configurations chosen by shape, scratch memory, and how often a kernel is compiled."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.problems import OPERATORS, Problem, launches

ROOT = Path(__file__).parents[3]
# Kernels that walk over streams.
WALKS = ("projection_kernel", "collapse_kernel", "gates_kernel", "stream_gradients_kernel", "last_gradients_kernel")


@pytest.mark.parametrize("operator", ["pre", "post_pre", "head"])
def test_every_token_count_fills_the_device(operator):
    # At 65 tokens as at 64: C is split until about a thousand programs run, as far as it has steps.
    before = {}
    for tokens in (1, 16, 64, 65, 100, 1024, 8192):
        forward, backward = launches(operator, Problem(tokens, 4, 4096, torch.bfloat16, anchored=True))
        programs = {launch.kernel: math.prod(launch.grid) for launch in forward + backward if launch.kernel in WALKS}
        assert all(count >= min(512, tokens) for count in programs.values()), programs
        assert all(count >= before.get(kernel, 0) for kernel, count in programs.items() if tokens <= 1024)
        assert programs["projection_kernel"] >= 64
        before = programs


@pytest.mark.parametrize("operator", ["sinkhorn", "pre", "post_pre"])
def test_scratch_memory_does_not_grow_with_iterations(operator):
    sizes = []
    for iters in (2, 40):
        forward, backward = launches(operator, Problem(70, 4, 64, iters=iters))
        sizes.append([[tensor.shape for tensor in launch.tensors] for launch in forward + backward])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("n", [4, 5])
def test_backward_of_post_pre_never_reads_the_new_streams_nor_projects(n, anchored):
    _, backward = launches("post_pre", Problem(70, n, 64, anchored=anchored))
    assert [launch.kernel for launch in backward] == [
        "gates_kernel", "coefficient_gradients_kernel", *["stream_gradients_kernel"] * math.ceil(n / 4),
        "last_gradients_kernel",
    ]  # fmt: skip
    assert all(launch.options["MIX"] for launch in backward if "MIX" in launch.options)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_scratch_does_not_grow_with_tokens_and_channels(n):
    # Beside the streams, branches and gradients that come in and go out.
    tokens, width = 2048, 1024
    forward, backward = launches("post_pre", Problem(tokens, n, width, torch.bfloat16, anchored=True))
    scratch = {
        tensor.data_ptr() or id(tensor): tensor.numel() * tensor.element_size()
        for launch in forward + backward
        for tensor in launch.tensors
        if tensor.shape[-1] != width
    }
    phi = (n * n + 2 * n) * n * width * 4
    assert sum(scratch.values()) <= 1.5 * tokens * width * 2 + 70 * phi


def test_phi_gradient_is_split_over_tokens_at_small_width():
    _, backward = launches("pre", Problem(8192, 2, 16))
    grids = {launch.kernel: launch.grid for launch in backward}
    assert grids["stream_gradients_kernel"][1] >= 32


PROGRAM = """
import json, sys
import torch
from benchmarks import compile_ahead as ahead
target = ahead.TARGETS[1]
ahead.triton.runtime.driver.set_active(ahead._Driver(target))
kernels, atomic = {}, set()
for tokens in json.loads(sys.argv[1]):
    case = ahead.Case(2, torch.float32, tokens, width=64, anchored=True)
    for kernel, args, options in ahead.launches(case, target):
        if kernel.__name__ in json.loads(sys.argv[2]):
            compiled = kernel.warmup(*args, grid=(1,), **options)
            kernels.setdefault(kernel.__name__, set()).add(compiled.hash)
            atomic |= {kernel.__name__} if "atomic" in compiled.asm["ttir"] else set()
print(json.dumps([{name: len(hashes) for name, hashes in kernels.items()}, sorted(atomic)]))
"""


def _compile(program, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program, *map(json.dumps, arguments)],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_twenty_token_counts_compile_once():
    counts = [
        65, 80, 96, 100, 127, 128, 129, 160, 192, 255, 256, 257, 300, 512,
        513, 1000, 1024, 2048, 4000, 8192,
    ]  # fmt: skip
    # `head` and `pre` share kernels, and so do those that mix and those that do not: once for each use. The
    # projection meets phi as it is and prepared.
    uses = {
        "post_forward_kernel": 1,
        "post_backward_kernel": 1,
        "prepare_phi_kernel": 2,
        "projection_kernel": 2 * 4,
        "coefficients_kernel": 2,
        "collapse_kernel": 4,
        "collapse_norm_kernel": 6,
        "gates_kernel": 2,
        "norm_gates_kernel": 4,
        # Without a norm and with each of the two.
        "coefficient_gradients_kernel": 4,
        "stream_gradients_kernel": 7,
        "parameter_gradients_kernel": 4,
        "last_gradients_kernel": 3,
    }
    compiled, atomic = _compile(PROGRAM, counts, list(uses))
    assert compiled == uses
    assert atomic == []


def test_compile_ahead_reports_and_fails_on_what_does_not_fit():
    arguments = "sys.argv[1:] = ['--kernel', 'post_forward', '--target', 'sm_80', '--jobs', '1']"
    program = (
        "import sys, json, dataclasses\n"
        "from benchmarks import compile_ahead as ahead\n"
        f"{arguments}\n"
        "codes = [ahead.main()]\n"
        "ahead._resources = lambda compiled: (255, 8)\n"
        "codes.append(ahead.main())\n"
        "print(json.dumps(codes))\n"
    )
    assert _compile(program) == [0, 1]


@pytest.mark.parametrize("operator", OPERATORS)
def test_grids_cover_every_token_count(operator):
    # A launch without programs is an error on a device, and one beyond 65535 in its second dimension.
    for tokens in (1, 64, 65, 100000):
        if operator == "sinkhorn" or tokens < 1000:
            forward, backward = launches(operator, Problem(tokens, 4, 16))
            for launch in forward + backward:
                assert all(count >= 1 for count in launch.grid)
                assert all(count <= 65535 for count in launch.grid[1:])
