"""The paper's split gives the same results in separate kernels; the table of fusion choices names them."""

from __future__ import annotations

import pytest
import torch
from mhc_compile.kernels import fusion, paper
from mhc_compile.kernels.launch import recording

from mhc_compile import functional

from .kernel_problems import Problem, inputs, output_grads


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("tokens", "n", "dtype"), [(3, 4, torch.float32), (66, 3, torch.bfloat16), (5, 6, torch.float32)]
)
def test_same_results_as_the_fused_operator(tokens, n, dtype, device):
    tensors, _ = inputs("pre", Problem(tokens, n, 24, dtype), device)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    split, fused = paper.pre(*leaves), functional.pre(*leaves)
    grads = output_grads(fused, Problem(tokens, n, 24))
    for ours, theirs in zip(split, fused, strict=True):
        assert torch.allclose(ours, theirs, rtol=torch.finfo(dtype).eps, atol=2e-6)
    ours, theirs = (torch.autograd.grad(outputs, leaves, grads) for outputs in (split, fused))
    assert all(torch.equal(mine, yours) for mine, yours in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("kernels")
def test_table_names_its_kernels():
    tensors, _ = inputs("pre", Problem(65, 4, 64))
    found = []
    with recording(lambda kernel, grid, args, options: found.append(kernel.__name__)):
        paper.pre(*tensors)
    assert found == [
        "partials_kernel",
        "paper_affine_kernel",
        "paper_collapse_kernel",
        "sinkhorn_forward_kernel",
    ]
    assert set(found) <= set(fusion.KERNELS["paper_pre"])
    assert {name for names in fusion.FUSIONS.values() for name in names} <= set(fusion.KERNELS)


def test_plain_without_the_kernels():
    tensors, _ = inputs("pre", Problem(3, 4, 8))
    double = tuple(tensor.double() for tensor in tensors)
    assert paper.pre(*double)[2].dtype == torch.float64
