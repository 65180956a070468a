"""The operators as plain ATen, which `fusion="inductor"` hands to Inductor: their gradients are autograd's own."""

from __future__ import annotations

import pytest
import torch
from mhc_compile.kernels import inlined
from mhc_compile.kernels.dispatch import reference_of

from tests.kernels.problems import (
    Problem,
    assert_as_good,
    differentiable,
    double,
    inputs,
    many,
    output_grads,
    run_backward,
)


@pytest.mark.parametrize("operator", ["pre", "post", "head"])
@pytest.mark.parametrize("tokens", [20, 77])
def test_gradients_of_large_logits_at_a_large_scale(operator, tokens):
    # What a loss scaler of mixed precision and a trained site bring: they may neither overflow nor lose their digits.
    problem = Problem(tokens, 4, 40, logit_std=8.0, grad_scale=1e4, anchored=operator == "pre")
    tensors, constants = inputs(operator, problem)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    compiled = torch.compile(getattr(inlined, operator), backend="aot_eager_decomp_partition", dynamic=False)
    outputs = differentiable(operator, many(compiled(*leaves, *constants)))
    grads = output_grads(outputs, problem)
    ours = torch.autograd.grad(outputs, leaves, grads)
    with torch.no_grad():
        plain = run_backward(operator, (*grads, *tensors), constants, reference_of)
        truth = run_backward(operator, double((*grads, *tensors)), constants, reference_of)
    assert_as_good(ours, plain, truth, problem.dtype, f"inlined {operator} {problem}")
