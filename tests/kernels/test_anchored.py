"""Anchored streams are another way to hold the same streams: the algebra in float64, and what it keeps exact."""

import pytest
import torch
from mhc_compile.kernels import anchored, boundary, reference
from mhc_compile.kernels.dispatch import reference_of

from tests.kernels.problems import Problem, differentiable, double, inputs, many, output_grads, run_backward

MANIFOLD_EPS = [("sinkhorn", 0.0), ("sinkhorn", 1e-3), ("identity", 0.0), ("none", 0.0)]


def _differentiate(function, tensors, grads=None):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = many(function(*leaves))
    grads = [torch.randn_like(out) for out in outputs] if grads is None else grads
    # The identity's matrix is a constant.
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True, materialize_grads=True
    )
    return outputs, grads, found


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_the_layout_and_back(n):
    torch.manual_seed(0)
    streams, res = torch.randn(3, n, 7).double(), torch.randn(3, n, n).double().softmax(-1)
    torch.testing.assert_close(anchored.release(anchored.anchor(streams)), streams)
    torch.testing.assert_close(anchored.mixing(res, True), anchored.mixing(res, False))
    assert torch.equal(anchored.mixing(res, True)[..., 0], torch.eye(n).double()[0].expand(3, n))
    torch.testing.assert_close(anchored.released_mixing(anchored.mixing(res, True)), res)


@pytest.mark.parametrize(("manifold", "eps"), MANIFOLD_EPS)
@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_site_is_the_same_site(n, manifold, eps):
    """`pre` then `post`, on the streams or anchored: new streams, layer input and all gradients agree."""
    (streams, *mapping), constants = inputs("pre", Problem(6, n, 5, manifold=manifold, eps=eps))
    streams, *mapping = double((streams, *mapping))
    branch = torch.randn(6, 5, dtype=torch.float64)

    def plain(streams, branch, *mapping):
        layer_input, post, res, _ = reference.pre(streams, *mapping, *constants)
        return layer_input, reference.post(streams, branch * layer_input, post, res)

    def held_anchored(streams, branch, *mapping):
        held = anchored.anchor(streams)
        layer_input, write, mix, _ = reference.pre(held, *mapping, *constants, True)
        return layer_input, anchored.release(reference.post(held, branch * layer_input, write, mix))

    tensors = (streams, branch, *mapping)
    outputs, grads, wanted = _differentiate(plain, tensors)
    again, _, found = _differentiate(held_anchored, tensors, grads)
    torch.testing.assert_close(again, outputs)
    torch.testing.assert_close(found, wanted)


def test_a_head_is_the_same_head():
    tensors, constants = inputs("head", Problem(6, 4, 5))
    tensors = double(tensors)
    outputs, grads, wanted = _differentiate(lambda *t: reference.head(*t, *constants)[0], tensors)
    again, _, found = _differentiate(
        lambda streams, *mapping: reference.head(anchored.anchor(streams), *mapping, *constants, True)[0],
        tensors,
        grads,
    )
    torch.testing.assert_close(again, outputs)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("operator", ["pre", "post_pre", "head"])
@pytest.mark.parametrize(("manifold", "eps"), MANIFOLD_EPS)
def test_the_written_backward_is_the_derivative(operator, manifold, eps):
    problem = Problem(4, 3, 5, manifold=manifold, eps=eps)
    tensors, constants = inputs(operator, problem)
    tensors, constants = double(tensors), (*constants, True)
    grads = output_grads(differentiable(operator, many(reference_of(operator)(*tensors, *constants))), problem)
    _, _, wanted = _differentiate(
        lambda *t: differentiable(operator, many(reference_of(operator)(*t, *constants))), tensors, grads
    )
    found = run_backward(operator, (*grads, *tensors), constants, reference_of)
    torch.testing.assert_close(found, wanted)


def test_the_boundary_is_its_two_halves():
    tensors, constants = inputs("post_pre", Problem(4, 4, 5))
    fresh, *site = boundary.post_pre(*tensors, *constants, True)
    assert torch.equal(fresh, reference.post(*tensors[:4]))
    for found, wanted in zip(site, reference.pre(fresh, *tensors[4:], *constants, True), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_streams_do_not_round(dtype):
    """With post = 1 and pre that sums to 1, a site adds the branch to the anchor and hands its gradient on, exactly."""
    n, width = 4, 6
    torch.manual_seed(0)
    hidden, branch, grad = (torch.randn(9, width).to(dtype) for _ in range(3))
    held = torch.nn.functional.pad(hidden.unsqueeze(-2), (0, 0, 0, n - 1))
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125])
    bias = torch.cat([weights.logit(), torch.zeros(n), torch.randn(n * n)])
    assert torch.sigmoid(bias[:n]).sum() == 1.0
    mapping = (torch.zeros(n * n + 2 * n, n * width), torch.ones(3), bias)
    layer_input, write, mix, projection = reference.pre(held, *mapping, anchored=True)
    assert torch.equal(layer_input, hidden)
    mixed = reference.post(held, branch, write, mix)
    assert torch.equal(mixed[:, 0], hidden + branch)
    assert not mixed[:, 1:].any()

    spread = grad.unsqueeze(-2) * torch.tensor([1.0, 0.3, 0.2, 0.1]).to(dtype).unsqueeze(-1)
    grad_held, grad_branch, _, _ = reference.post_backward(spread, held, branch, write, mix)
    assert torch.equal(grad_held[:, 0], grad)
    assert torch.equal(grad_branch, grad)
    through, *_ = reference.pre_backward(
        grad,
        torch.zeros_like(write),
        torch.zeros_like(mix),
        held,
        *mapping,
        projection,
        20,
        1e-6,
        0.0,
        "sinkhorn",
        True,
    )
    assert torch.equal(through[:, 0], grad)
