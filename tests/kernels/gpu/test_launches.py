"""What is launched: configurations chosen by shape, scratch memory, and how often a kernel is compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mhc_compile.kernels.dispatch import kernel_of, reference_of
from mhc_compile.kernels.gpu.launch import recording

from tests.kernels.problems import OPERATORS, Problem, inputs, many

ROOT = Path(__file__).parents[3]


def _launches(operator, problem):
    """(kernel name, grid, tensors, options) of an operator's forward and backward."""
    found = []

    def record(kernel, grid, args, options):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        found.append((kernel.__name__, grid, tensors, options))

    tensors, constants = inputs(operator, problem)
    grads = many(reference_of(operator)(*tensors, *constants))
    meta = [tensor.to("meta") for tensor in tensors]
    with recording(record):
        kernel_of(operator)(*meta, *constants)
        forward = len(found)
        kernel_of(f"{operator}_backward")(*(grad.to("meta") for grad in grads), *meta, *constants)
    return found[:forward], found[forward:]


@pytest.mark.parametrize("operator", ["pre", "post_pre", "head"])
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_few_tokens_are_split_over_channels(operator, tokens):
    forward, _ = _launches(operator, Problem(tokens, 4, 4096, torch.bfloat16))
    assert [name for name, *_ in forward] == ["partial_projections_kernel", "pre_finish_kernel"]
    for _, grid, _, _ in forward:
        assert grid[0] * grid[1] >= 16


@pytest.mark.parametrize("operator", ["pre", "post_pre", "head"])
def test_many_tokens_take_one_launch(operator):
    forward, _ = _launches(operator, Problem(65, 4, 64, torch.bfloat16))
    assert len(forward) == 1


@pytest.mark.parametrize("operator", ["sinkhorn", "pre", "post_pre"])
def test_scratch_memory_does_not_grow_with_iterations(operator):
    sizes = []
    for iters in (2, 40):
        forward, backward = _launches(operator, Problem(70, 4, 64, iters=iters))
        sizes.append([[tensor.shape for tensor in tensors] for _, _, tensors, _ in forward + backward])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("n", [4, 5])
def test_backward_of_post_pre_never_reads_the_new_streams(n, anchored):
    # They are no input of the backward, and nothing of their size is written before its last product of n
    # streams.
    tensors, constants = inputs("post_pre", Problem(70, n, 64, anchored=anchored))
    found = []
    grads = [grad.to("meta") for grad in many(reference_of("post_pre")(*tensors, *constants))]
    meta = [tensor.to("meta") for tensor in tensors]
    with recording(lambda kernel, grid, args, options: found.append((kernel.__name__, args, options))):
        kernel_of("post_pre_backward")(*grads, *meta, *constants)
    assert found[0][0] == "partial_projections_kernel"
    assert found[0][2]["MIX"]
    assert not found[0][2]["STORE"]
    assert all(options["MIX"] for name, _, options in found if name == "stream_gradients_kernel")


def test_phi_gradient_is_split_over_tokens_at_small_width():
    _, backward = _launches("pre", Problem(8192, 2, 16))
    grids = {name: grid for name, grid, _, _ in backward}
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
    names = [
        "post_forward_kernel",
        "post_backward_kernel",
        "pre_forward_kernel",
        "post_pre_backward_kernel",
        "mixing_gradients_kernel",
        "coefficient_gradients_kernel",
        "stream_gradients_kernel",
        "parameter_gradients_kernel",
        "partial_projections_kernel",
    ]
    compiled, atomic = _compile(PROGRAM, counts, names)
    # `head` and `pre` share kernels, and so do a backward that mixes and one that does not: once for each
    # use.
    uses = {
        "pre_forward_kernel": 2,
        "coefficient_gradients_kernel": 2,
        "stream_gradients_kernel": 3,
        "parameter_gradients_kernel": 2,
        "partial_projections_kernel": 4,
    }
    assert compiled == {name: uses.get(name, 1) for name in names}
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
            forward, backward = _launches(operator, Problem(tokens, 4, 16))
            for _, grid, _, _ in forward + backward:
                assert all(count >= 1 for count in grid)
                assert all(count <= 65535 for count in grid[1:])
