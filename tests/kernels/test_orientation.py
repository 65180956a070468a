"""phi as it lies: rows of res in either order, rows or columns first, in every implementation and without a copy."""

from __future__ import annotations

import pytest
import torch
from mhc_compile.kernels import boundary, dispatch, ops, reference
from mhc_compile.kernels.cpu import build
from mhc_compile.kernels.orientation import PhiLayout, in_layout
from torch.utils._python_dispatch import TorchDispatchMode

N, WIDTH = 4, 12
CONSTANTS = (5, 1e-6, 1e-6, "sinkhorn", False)


def _draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


STREAMS, BRANCH = _draw(3, 5, N, WIDTH), _draw(3, 5, WIDTH)
PARAMETERS = (_draw(24, N * WIDTH) * 0.3, _draw(3), _draw(24))
ORDER = torch.cat([torch.arange(8), 8 + torch.arange(16).view(4, 4).T.flatten()])


def test_the_flag_is_another_order_of_rows():
    phi, scale, bias = PARAMETERS
    flagged = reference.pre(STREAMS, phi, scale, bias, *CONSTANTS, True)
    ordered = reference.pre(STREAMS, phi[ORDER], scale, bias[ORDER], *CONSTANTS, False)
    torch.testing.assert_close(flagged, ordered)
    assert not torch.allclose(flagged.res, reference.pre(STREAMS, phi, scale, bias, *CONSTANTS).res)


def test_gradients_are_those_of_autograd():
    inputs = [tensor.clone().requires_grad_() for tensor in (STREAMS, *PARAMETERS)]
    outputs = reference.pre(*inputs, *CONSTANTS, True)
    grads = [_draw(*output.shape) for output in outputs[:3]]
    wanted = torch.autograd.grad(outputs[:3], inputs, grads)
    got = reference.pre_backward(*grads, STREAMS, *PARAMETERS, outputs.projection.detach(), *CONSTANTS, True)
    torch.testing.assert_close(got, wanted)


def _operators(phi, parameters, dtype, constants):
    """Run a site, its halves and a boundary with gradients; return all results."""
    streams, branch = STREAMS.to(dtype).requires_grad_(), BRANCH.to(dtype)
    first = ops.pre(streams, phi, *parameters, *constants)
    measured = ops.OPERATORS["measure"].forward(streams, phi, *parameters, *constants)
    half = ops.OPERATORS["collapse"].forward(streams, phi, *parameters, *measured, *constants)
    second = ops.post_pre(streams, branch, first[1], first[2], phi, *parameters, *constants)
    results = [*first[:3], half[0], *second[:4]]
    weights = [_draw(*result.shape).to(result.dtype) for result in results]
    loss = sum((result * weight).sum() for result, weight in zip(results, weights, strict=True))
    grads = torch.autograd.grad(loss, [streams, phi, *parameters])
    return [*results, first[3], second[4], *grads]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(
    ("manifold", "anchored", "dtype"),
    [
        ("sinkhorn", False, torch.float32),
        ("none", True, torch.float32),
        ("identity", False, torch.float32),
        ("sinkhorn", True, torch.bfloat16),
    ],
)
def test_the_kernels_agree_with_rows_put_in_their_order(choice, manifold, anchored, dtype, columns):
    count = 8 if manifold == "identity" else 24
    order = ORDER[:count]
    phi, scale, bias = (tensor.float() for tensor in PARAMETERS)
    scale = scale[:2] if manifold == "identity" else scale
    constants = (5, 1e-6, 1e-6, manifold, anchored)
    phi, bias = phi[:count], bias[:count]
    plain = [tensor.clone().requires_grad_() for tensor in (phi[order], scale, bias[order])]
    with dispatch.choosing("reference"):
        wanted = _operators(plain[0], plain[1:], dtype, constants)
    *rest, grad_phi, grad_scale, grad_bias = wanted
    back = order.argsort()
    lying = (phi.T.contiguous().T if columns else phi.clone()).requires_grad_()
    given = [tensor.clone().requires_grad_() for tensor in (scale, bias)]
    with dispatch.choosing(choice):
        got = _operators(lying, given, dtype, (*constants, True))
    assert got[-3].stride() == lying.stride()
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(got, [*rest, grad_phi[back], grad_scale, grad_bias[back]], **near)


def test_a_head_reads_its_columns(choice):
    phi, scale, bias = _draw(N, N * WIDTH).float(), _draw(1).float(), _draw(N).float()
    lying = phi.T.contiguous().T.requires_grad_()
    wanted_phi = phi.clone().requires_grad_()
    weight = _draw(3, 5, WIDTH).float()
    with dispatch.choosing("reference"):
        wanted = ops.head(STREAMS.float(), wanted_phi, scale, bias, 1e-6, 1e-6)[0]
    with dispatch.choosing(choice):
        got = ops.head(STREAMS.float(), lying, scale, bias, 1e-6, 1e-6)[0]
        (got * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lying.grad, wanted_phi.grad, rtol=1e-4, atol=1e-4)


def test_branches_wider_than_their_streams_keep_the_layout():
    why = build.why_not(N, torch.bfloat16)
    if why is not None:
        pytest.skip(f"no C++ here: {why}")
    phi, scale, bias = (tensor.float() for tensor in PARAMETERS)
    found = []
    for lying in (phi[ORDER], phi.T.contiguous().T):
        flagged = not lying.is_contiguous()
        given = [lying.clone().requires_grad_(), scale, bias if flagged else bias[ORDER]]
        res = _draw(3, 5, N, N).float()
        with dispatch.choosing("cpu"):
            results = ops.post_pre(
                STREAMS.bfloat16(), BRANCH.float(), res[..., 0], res, *given, *CONSTANTS, flagged
            )  # fmt: skip
            sum(result.float().square().sum() for result in results[:4]).backward()
        found.append([*results, given[0].grad if flagged else given[0].grad[ORDER.argsort()]])
    torch.testing.assert_close(found[1], found[0])


class _Counting(TorchDispatchMode):
    """Counts the operators that make a tensor of so many numbers, memory without values apart."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.made = numbers, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            size = tensor.numel() if isinstance(tensor, torch.Tensor) else 0
            if size == self.numbers and "empty" not in func.name() and tensor.untyped_storage().data_ptr() not in given:
                self.made.append(func.name())
        return result


@pytest.mark.parametrize("columns", [False, True])
def test_no_implementation_copies_phi_or_its_gradient(choice, columns):
    phi, scale, bias = (tensor.float() for tensor in PARAMETERS)
    tensors = (STREAMS.float(), phi.T.contiguous().T if columns else phi, scale, bias)
    grads = (_draw(3, 5, WIDTH).float(), _draw(3, 5, N).float(), _draw(3, 5, N, N).float())
    with dispatch.choosing(choice), _Counting(phi.numel()) as counting:
        projection = dispatch.run("pre", tensors, N, "sinkhorn", (*CONSTANTS, True), CONSTANTS, 1, transposed=True)[3]
        given = (*grads, *tensors, projection)
        dispatch.run("pre_backward", given, N, "sinkhorn", (*CONSTANTS, True), CONSTANTS, 4, transposed=True)
    assert counting.made == []


def test_a_call_without_phi_is_given_no_layout():
    assert in_layout(lambda *arguments: arguments, (STREAMS,), (1,), None) == (STREAMS, 1)
    called = in_layout(lambda *arguments: arguments, (STREAMS, *PARAMETERS), CONSTANTS, 1, transposed=True)
    assert called[-6:-1] == CONSTANTS
    assert called[-1] == PhiLayout(transposed=True, columns=False)


@pytest.mark.parametrize("columns", [False, True])
def test_opcheck(columns):
    phi, scale, bias = (tensor.float() for tensor in PARAMETERS)
    inputs = [STREAMS.float(), phi.T.contiguous().T if columns else phi, scale, bias]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    torch.library.opcheck(torch.ops.mhc.pre.default, (*inputs, *CONSTANTS, True))
    res = _draw(3, 5, N, N).float()
    site = (inputs[0], BRANCH.float(), res[..., 0], res, *inputs[1:])
    outputs = boundary.post_pre(*(tensor.detach() for tensor in site), *CONSTANTS, True)
    given = (*outputs[:4], *(tensor.detach() for tensor in site), outputs[4])
    torch.library.opcheck(torch.ops.mhc.post_pre_backward.default, (*given, *CONSTANTS, True))
