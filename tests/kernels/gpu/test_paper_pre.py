"""The paper's split gives the same results in separate kernels."""

from __future__ import annotations

import pytest
import torch
from mhc_compile.kernels.dispatch import kernel_of, reference_of
from mhc_compile.kernels.fusions import KERNELS
from mhc_compile.kernels.gpu.launch import recording
from mhc_compile.kernels.ops import OPERATORS

from mhc_compile import functional
from tests.kernels.problems import Problem, inputs, output_grads


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("tokens", "n", "dtype"), [(3, 4, torch.float32), (66, 3, torch.bfloat16), (5, 6, torch.float32)]
)
def test_same_results_as_the_fused_operator(tokens, n, dtype, device):
    tensors, constants = inputs("pre", Problem(tokens, n, 24, dtype), device)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    split, fused = OPERATORS["paper_pre"].forward(*leaves, *constants), functional.pre(*leaves)
    grads = output_grads(fused, Problem(tokens, n, 24))
    split = split[:3]
    for ours, theirs in zip(split, fused, strict=True):
        assert torch.allclose(ours, theirs, rtol=torch.finfo(dtype).eps, atol=2e-6)
    ours, theirs = (torch.autograd.grad(outputs, leaves, grads) for outputs in (split, fused))
    assert all(torch.equal(mine, yours) for mine, yours in zip(ours, theirs, strict=True))


def test_its_backward_is_that_of_pre():
    assert kernel_of("paper_pre_backward") is kernel_of("pre_backward")
    assert reference_of("paper_pre_backward") is reference_of("pre_backward")
    assert OPERATORS["paper_pre"].backward is OPERATORS["pre"].backward


@pytest.mark.parametrize("manifold", ["sinkhorn", "none", "identity", "row", "permutation"])
def test_table_names_its_kernels(manifold):
    tensors, constants = inputs("paper_pre", Problem(65, 4, 64, manifold=manifold))
    found = []
    with recording(lambda kernel, grid, args, options: found.append(kernel.__name__)):
        kernel_of("paper_pre")(*tensors, *constants)
    projection = ["sinkhorn_forward_kernel"] if manifold == "sinkhorn" else []
    assert found == ["projection_kernel", "paper_affine_kernel", "collapse_kernel", *projection]
    assert set(found) <= set(KERNELS["paper_pre"])
