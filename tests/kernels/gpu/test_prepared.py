"""Prepared calls do what the operators do, launch as Triton would, and ask PyTorch for memory alone."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mhc_compile.kernels import ops
from mhc_compile.kernels.dispatch import kernel_of, prepared_kernel_of
from mhc_compile.kernels.gpu import prepared
from mhc_compile.kernels.ops import OPERATORS

from tests.kernels.problems import Problem, inputs, many, output_grads, run_backward

ROOT = Path(__file__).parents[3]
# Its halves, `paper_pre` and `head` launch kernels that these do.
WHOLE = ("sinkhorn", "pre", "post", "post_pre", "head")


@pytest.mark.parametrize("operator", WHOLE)
def test_a_call_of_a_kind_that_was_prepared_computes_its_own_numbers(operator, device):
    problem = Problem(3, 4, 24, torch.bfloat16, anchored=True)
    for seed in (0, 1):
        tensors, constants = inputs(operator, dataclasses.replace(problem, seed=seed), device)
        expected = many(kernel_of(operator)(*tensors, *constants))
        ours = many(prepared_kernel_of(operator)(*tensors, *constants))
        grads = output_grads(expected[: len(OPERATORS[operator].signature.outputs)], problem)
        expected += run_backward(operator, (*grads, *tensors), constants, kernel_of)
        ours += run_backward(operator, (*grads, *tensors), constants, prepared_kernel_of)
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(ours, expected, strict=True))
        assert len({tensor.data_ptr() for tensor in ours}) == len(ours)


def test_kinds_differ_in_sizes_dtypes_constants_and_alignment(device, monkeypatch):
    found = []
    prepare = prepared.prepare
    monkeypatch.setattr(prepared, "prepare", lambda *given: found.append(given) or prepare(*given))
    post = prepared.PreparedOperator(kernel_of("post"))
    tensors, _ = inputs("post", Problem(3, 4, 24), device)
    shifted = torch.empty(tensors[1].numel() + 1, device=device)[1:].view_as(tensors[1]).copy_(tensors[1])
    other = (tensors[0].mT.contiguous().mT, *tensors[1:])
    few = tuple(tensor[:2] for tensor in tensors)
    for given, kinds in (
        (tensors, 1), (other, 1), (few, 2), ((tensors[0].bfloat16(), *tensors[1:]), 3),
        ((tensors[0], shifted, *tensors[2:]), 4), (few, 4),
    ):  # fmt: skip
        assert torch.equal(post(*given), kernel_of("post")(*given))
        assert len(found) == kinds
    sinkhorn = prepared.PreparedOperator(kernel_of("sinkhorn"))
    for iters in (2, 3):
        assert torch.equal(sinkhorn(tensors[3], iters, 0.0), kernel_of("sinkhorn")(tensors[3], iters, 0.0))


def test_no_more_kinds_are_kept_than_fit(device, monkeypatch):
    monkeypatch.setattr(prepared, "_MOST_KEPT", 2)
    post = prepared.PreparedOperator(kernel_of("post"))
    for tokens in (1, 2, 3, 1):
        tensors, _ = inputs("post", Problem(tokens, 2, 8), device)
        assert torch.equal(post(*tensors), kernel_of("post")(*tensors))
        assert len(post._kinds) <= 2


@pytest.mark.usefixtures("kernels")
def test_no_tokens_launch_nothing(device):
    tensors, constants = inputs("pre", Problem(0, 4, 8), device)
    outputs = ops.pre(*tensors, *constants)
    assert outputs[0].shape == (0, 8)
    grads = run_backward("pre", (*outputs, *tensors), constants, prepared_kernel_of)
    assert [grad.abs().sum().item() for grad in grads] == [0.0] * 4


def test_an_operator_that_computes_between_launches_is_refused(device):
    def doubled(streams, branch, post, res):
        return kernel_of("post")(streams, 2 * branch, post, res)

    tensors, _ = inputs("post", Problem(3, 4, 24), device)
    with pytest.raises(AssertionError, match=r"aten\.mul\.Tensor beside its launches"):
        prepared.PreparedOperator(doubled)(*tensors)


PROGRAM = """
import json
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from benchmarks import launch_cost
from benchmarks.by_name import Case, arguments_of
from mhc_compile.kernels.dispatch import kernel_of
from mhc_compile.kernels.gpu.prepared import PreparedOperator

class Asked(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        asked.add(str(operator))
        return operator(*args, **(kwargs or {}))

def seen(launched):
    # Pointers by their first appearance: what a call allocates lies elsewhere each time.
    labels, found = {}, []
    for entry in launched:
        # The kernel's name, the grid, stream and function; then packed metadata, launch metadata, two hooks.
        one = list(entry[:6])
        found.append(one)
        for argument in entry[10:]:
            pointer = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
            big = isinstance(pointer, int) and not isinstance(pointer, bool) and pointer > 2**24
            one.append(f"memory {labels.setdefault(pointer, len(labels))}" if big else pointer)
    return found

result, launched, asked = [], [], set()
case = Case(4, torch.bfloat16, 256, 64, anchored=True)
with launch_cost.mocked(launched):
    for name in ("sinkhorn", "post", "pre", "post_pre", "post_pre_norm", "head"):
        for name in (name, name + "_backward"):
            arguments = arguments_of(name, case, "cpu")
            call = PreparedOperator(kernel_of(name))
            launched.clear()
            call(*arguments)
            first = len(launched)
            asked.clear()
            with Asked():
                call(*arguments)
            result.append([name, seen(launched[:first]), seen(launched[first:]), sorted(asked)])
print(json.dumps(result))
"""


def test_prepared_launches_are_those_of_triton_and_nothing_waits_for_the_device():
    # The driver that stands in knows the current device and stream and no more, so that a call of anything else fails.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    calls = json.loads(run.stdout.splitlines()[-1])
    assert len(calls) == 12
    for name, by_triton, direct, asked in calls:
        assert direct == by_triton, name
        assert 1 <= len(direct) <= 4, name
        # Allocations by PyTorch, which CUDA graphs capture; nothing is copied, read back or waited for.
        assert asked == ["aten.empty_strided.default"]
