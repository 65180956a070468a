"""The kernels on anchored streams: stream 0, and the others as their differences from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mhc_compile.kernels import anchored, boundary
from mhc_compile.kernels.dispatch import kernel_of, reference_of
from mhc_compile.kernels.ops import OPERATORS

from tests.kernels.problems import Problem, backward_of, check, double, inputs, many, output_grads

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TAKES_LAYOUT = ("pre", "paper_pre", "post_pre", "head")


def check_anchored(operator, problem, device):
    check(operator, replace(problem, anchored=True), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", TAKES_LAYOUT)
def test_every_dtype_at_four_streams(operator, dtype, device):
    check_anchored(operator, Problem(70, 4, 48, dtype), device)


# Sinkhorn without epsilon is what the tests above run.
@pytest.mark.parametrize(("manifold", "eps"), [
    ("sinkhorn", 1e-2), ("none", 0.0), ("none", 1e-2), ("identity", 0.0), ("identity", 1e-2), ("row", 0.0),
])  # fmt: skip
@pytest.mark.parametrize("operator", ["pre", "paper_pre", "post_pre"])
def test_manifolds_and_epsilon(operator, manifold, eps, device):
    for tokens, n in ((3, 4), (66, 3), (2, 6)):
        check_anchored(operator, Problem(tokens, n, 24, manifold=manifold, eps=eps), device)


@pytest.mark.parametrize("tokens", [2, 65])
def test_head_with_epsilon(tokens, device):
    check_anchored("head", Problem(tokens, 4, 24, eps=1e-2), device)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 12) | st.integers(63, 67),
    n=st.integers(1, 8),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    operator=st.sampled_from(TAKES_LAYOUT),
    manifold=st.sampled_from(["sinkhorn", "none", "identity"]),
)
def test_any_shape(tokens, n, width, dtype, operator, manifold):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_anchored(
        operator, Problem(tokens, n, width, dtype, "sinkhorn" if operator == "head" else manifold, 3), device
    )


@pytest.mark.parametrize("operator", TAKES_LAYOUT)
def test_no_tokens(operator, device):
    tensors, constants = inputs(operator, Problem(0, 4, 24, anchored=True), device)
    outputs = many(kernel_of(operator)(*tensors, *constants))
    assert [out.shape for out in outputs] == [out.shape for out in many(reference_of(operator)(*tensors, *constants))]
    grads = backward_of(operator, outputs, outputs, tensors, constants)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]
    assert not any(grad.any() for grad in grads)


def _of_the_streams(grad_anchored):
    """The gradient of streams whose anchored form has this one."""
    return anchored.write_weights_backward(grad_anchored.mT).mT


@pytest.mark.parametrize("manifold", ["sinkhorn", "none", "identity"])
@pytest.mark.parametrize(("tokens", "n"), [(3, 4), (66, 4), (66, 5)])
def test_agrees_with_the_streams_that_are_stood_for(tokens, n, manifold, device):
    # The truth is float64 on plain streams: it knows nothing of the layout.
    problem = Problem(tokens, n, 40, manifold=manifold)
    (stored, branch, post, res, *mapping), constants = inputs("post_pre", problem, device)
    plain = double((anchored.release(stored.double()), branch, post, res, *mapping))
    tensors = (stored, branch, anchored.write_weights(post), anchored.mixing(res, exact_rows=False), *mapping)
    outputs = kernel_of("post_pre")(*tensors, *constants, True)
    grads = output_grads(outputs[:4], problem)
    ours = double(backward_of("post_pre", grads, outputs, tensors, (*constants, True)))
    true = boundary.post_pre(*plain, *constants)
    fresh, layer_input, write, mixing = double(grads)
    plain_grads = (
        _of_the_streams(fresh),
        layer_input,
        anchored.write_weights_backward(write),
        anchored.mixing_backward(mixing, exact_rows=False),
    )
    true_grads = boundary.post_pre_backward(*plain_grads, *plain, true[-1], *constants)
    pairs = [
        (anchored.release(outputs[0].double()), true[0]),
        (outputs[1].double(), true[1]),
        (outputs[2].double(), anchored.write_weights(true[2])),
        (anchored.released_mixing(outputs[3].double()), true[3]),
        (_of_the_streams(ours[0]), true_grads[0]),
        (ours[1], true_grads[1]),
        (anchored.write_weights_backward(ours[2]), true_grads[2]),
        (anchored.mixing_backward(ours[3], exact_rows=False), true_grads[3]),
        *zip(ours[4:], true_grads[4:], strict=True),
    ]
    for index, (mine, expected) in enumerate(pairs):
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max(), index


def _preserving(operator, problem, device):
    """Inputs whose streams are equal and whose coefficients preserve: phi = 0, and pre sums to 1."""
    tensors, constants = inputs(operator, problem, device)
    streams, *rest, phi, scale, bias = tensors
    stored = torch.cat([streams[:, :1], torch.zeros_like(streams[:, 1:])], dim=1)
    bias = bias.clone()
    bias[: problem.n] = -math.log(problem.n - 1) if problem.n > 1 else 100.0
    if rest:
        post, res = torch.ones_like(rest[1]), rest[2]
        rest = [rest[0], anchored.write_weights(post), anchored.mixing(res, exact_rows=True)]
    return (stored, *rest, torch.zeros_like(phi), scale, bias), constants


# 1 and 2 streams take the launches of 4, which meet every dtype; those of 5 round in the same places.
@pytest.mark.parametrize("tokens", [3, 66])
@pytest.mark.parametrize(("operator", "n", "dtype"), [
    ("pre", 1, torch.bfloat16), ("pre", 2, torch.bfloat16), ("pre", 5, torch.bfloat16), ("post_pre", 5, torch.float16),
    *((operator, 4, dtype) for operator in ("pre", "paper_pre", "head", "post_pre") for dtype in DTYPES),
])  # fmt: skip
def test_equal_streams_pass_unchanged_bit_for_bit(operator, n, tokens, dtype, device):
    # What the layout is for: neither the forward nor the gradient of the identity path rounds.
    problem = Problem(tokens, n, 24, dtype, anchored=True)
    tensors, constants = _preserving(operator, problem, device)
    outputs = many(kernel_of(operator)(*tensors, *constants))
    identity = tensors[0][:, 0]
    collapsed = outputs[0]
    if operator == "post_pre":
        identity, collapsed = (identity.float() + tensors[1].float()).to(dtype), outputs[1]
        assert not outputs[0][:, 1:].any()
        assert torch.equal(outputs[0][:, 0], identity)
    assert torch.equal(collapsed, identity)
    grad = output_grads((collapsed,), problem)[0]
    grads = [grad if out is collapsed else torch.zeros_like(out) for out in outputs]
    ours = backward_of(operator, grads, outputs, tensors, constants)
    assert torch.equal(ours[0][:, 0], grad)


@pytest.mark.parametrize("tokens", [3, 66])
@pytest.mark.parametrize("operator", ["pre", "paper_pre", "post_pre"])
def test_the_anchor_is_carried_on_exactly(operator, tokens, device):
    for manifold in ("sinkhorn", "identity"):
        tensors, constants = inputs(operator, Problem(tokens, 4, 24, manifold=manifold, anchored=True), device)
        mixing = kernel_of(operator)(*tensors, *constants)[-2]
        assert torch.equal(mixing[:, :, 0], torch.eye(4, device=device)[0].expand(tokens, 4))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("operator", TAKES_LAYOUT)
def test_opcheck(operator, device):
    tensors, constants = inputs(operator, Problem(3, 3, 8, anchored=True), device)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    torch.library.opcheck(OPERATORS[operator].forward, (*leaves, *constants))


@pytest.mark.parametrize("tokens", [3, 66])
@pytest.mark.parametrize("n", [4, 5])
def test_post_pre_projects_the_streams_as_they_are_stored(n, tokens, device):
    tensors, constants = inputs("post_pre", Problem(tokens, n, 48, torch.bfloat16, anchored=True), device)
    outputs = kernel_of("post_pre")(*tensors, *constants)
    alone = kernel_of("pre")(outputs[0], *tensors[4:], *constants)
    for fused, separate in zip(outputs[2:4], alone[1:3], strict=True):
        assert torch.allclose(fused, separate, rtol=0, atol=4e-6)


def test_results_do_not_depend_on_the_run(device):
    problem = Problem(70, 5, 40, torch.bfloat16, anchored=True)
    tensors, constants = inputs("post_pre", problem, device)
    runs = []
    for _ in range(2):
        outputs = kernel_of("post_pre")(*tensors, *constants)
        grads = backward_of("post_pre", output_grads(outputs, problem), outputs, tensors, constants)
        runs.append((*outputs, *grads))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
