"""Any shape, any layout of the inputs, any number of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mhc_compile.kernels.dispatch import kernel_of, reference_of

from tests.kernels.problems import OPERATORS, Problem, backward_of, check, inputs, many, output_grads


@pytest.mark.parametrize(("width", "operator"), [
    (17, "post_pre"), (1280, "post_pre"), (2560, "pre"), (4096, "head"), (5129, "post"), (7168, "post"),
])  # fmt: skip
def test_widths(width, operator, device):
    problem = Problem(1, 2, width, torch.bfloat16)
    check(operator, problem, device)


@pytest.mark.parametrize("tokens", [1, 127])
@pytest.mark.parametrize("operator", OPERATORS)
def test_token_counts(operator, tokens, device):
    check(operator, Problem(tokens, 3, 20), device)


@pytest.mark.parametrize("operator", ["sinkhorn", "post", "post_pre"])
def test_many_tokens(operator, device):
    problem = Problem(1025 if operator == "post_pre" else 8192, 2, 8, iters=4)
    check(operator, problem, device)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tokens(operator, device):
    tensors, constants = inputs(operator, Problem(0, 4, 24), device)
    outputs = many(kernel_of(operator)(*tensors, *constants))
    expected = many(reference_of(operator)(*tensors, *constants))
    assert [out.shape for out in outputs] == [out.shape for out in expected]
    grads = backward_of(operator, outputs, outputs, tensors, constants)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]
    assert not any(grad.any() for grad in grads)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 12) | st.integers(63, 67),
    n=st.integers(1, 8),
    width=st.integers(1, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    operator=st.sampled_from(OPERATORS),
    manifold=st.sampled_from(["sinkhorn", "none", "identity", "row"]),
    iters=st.integers(1, 9),
)
def test_any_shape(tokens, n, width, dtype, operator, manifold, iters):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(tokens, n, width, dtype, "sinkhorn" if operator == "head" else manifold, iters)
    check(operator, problem, device)


def _scattered(tensor):
    """The same values, strided in every dimension and off the start of their storage."""
    big = torch.full([2 * size + 1 for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = big[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    assert view.numel() == 1 or not view.is_contiguous()
    return view


@pytest.mark.parametrize("operator", OPERATORS)
def test_strided_inputs(operator, device):
    tensors, constants = inputs(operator, Problem(5, 4, 24), device)
    expected = many(kernel_of(operator)(*tensors, *constants))
    strided = tuple(_scattered(tensor) for tensor in tensors)
    outputs = many(kernel_of(operator)(*strided, *constants))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))
    grads = output_grads(outputs, Problem(5, 4, 24))
    expected = backward_of(operator, grads, expected, tensors, constants)
    ours = backward_of(operator, tuple(_scattered(grad) for grad in grads), outputs, strided, constants)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))


@pytest.mark.parametrize("operator", ["pre", "post", "post_pre", "head"])
def test_expanded_inputs(operator, device):
    # What a chain begins with: n views of one hidden state; and gradients as sum() leaves them.
    tensors, constants = inputs(operator, Problem(5, 4, 24), device)
    streams = tensors[0][:, :1].expand(5, 4, 24)
    outputs = many(kernel_of(operator)(streams, *tensors[1:], *constants))
    expected = many(kernel_of(operator)(streams.contiguous(), *tensors[1:], *constants))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True))
    grads = tuple(torch.ones((), device=device, dtype=out.dtype).expand(out.shape) for out in outputs)
    dense = tuple(grad.contiguous() for grad in grads)
    ours = backward_of(operator, grads, outputs, (streams, *tensors[1:]), constants)
    theirs = backward_of(operator, dense, expected, (streams.contiguous(), *tensors[1:]), constants)
    assert all(torch.equal(mine, yours) for mine, yours in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("operator", ["pre", "post_pre"])
def test_leading_dimensions(operator, device):
    tensors, constants = inputs(operator, Problem(6, 4, 24), device)
    per_token = len(tensors) - 3
    folded = tuple(tensor.unflatten(0, (2, 3)) for tensor in tensors[:per_token])
    outputs = kernel_of(operator)(*folded, *tensors[per_token:], *constants)
    expected = kernel_of(operator)(*tensors, *constants)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.shape[:2] == (2, 3)
        assert torch.equal(ours.flatten(0, 1), theirs)


def test_half_precision_parameters(device):
    # model.half() converts phi, scale and bias too.
    tensors, constants = inputs("pre", Problem(5, 4, 24, torch.float16), device)
    halves = (tensors[0], *(tensor.half() for tensor in tensors[1:]))
    outputs = kernel_of("pre")(*halves, *constants)
    expected = reference_of("pre")(*halves, *constants)
    assert torch.allclose(outputs[2], expected[2], atol=1e-6)
    grads = backward_of("pre", output_grads(outputs, Problem(5, 4, 24)), outputs, halves, constants)
    assert [grad.dtype for grad in grads] == [torch.float16] * 4


def test_results_do_not_depend_on_the_run(device):
    problem = Problem(70, 4, 40, torch.bfloat16)
    tensors, constants = inputs("post_pre", problem, device)
    runs = []
    for _ in range(2):
        outputs = kernel_of("post_pre")(*tensors, *constants)
        grads = backward_of("post_pre", output_grads(outputs, problem), outputs, tensors, constants)
        runs.append((*outputs, *grads))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
