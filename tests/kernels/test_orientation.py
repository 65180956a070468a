"""Sites whose mixing matrix is stored [in, out]: the flag `transposed` in every implementation."""

from __future__ import annotations

import pytest
import torch
from mhc_compile.kernels import boundary, dispatch, ops, reference
from mhc_compile.kernels.cpu import build
from mhc_compile.kernels.orientation import in_kernel_order

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


def test_a_kernel_without_the_flag_is_given_its_rows_and_gives_gradients_back():
    tensors = (STREAMS, *PARAMETERS)
    wanted = reference.pre(*tensors, *CONSTANTS, True)
    torch.testing.assert_close(in_kernel_order(reference.pre, tensors, N, (*CONSTANTS, True), 1, 5), wanted)
    site = (STREAMS, BRANCH, wanted.post, wanted.res, *PARAMETERS)
    *outputs, projection = boundary.post_pre(*site, *CONSTANTS, True)
    given = (*(_draw(*output.shape) for output in outputs), *site, projection)
    torch.testing.assert_close(
        in_kernel_order(boundary.post_pre_backward, given, N, (*CONSTANTS, True), 8, 5, gradients=True),
        boundary.post_pre_backward(*given, *CONSTANTS, True),
    )


@pytest.mark.parametrize("manifold", ["sinkhorn", "none", "identity"])
def test_the_compiled_operators_agree(manifold):
    why = build.why_not(N, torch.float32)
    if why is not None:
        pytest.skip(f"no C++ here: {why}")
    rows = 8 if manifold == "identity" else 24
    phi, scale, bias = (tensor.float() for tensor in PARAMETERS)
    scale = scale[:2] if manifold == "identity" else scale
    constants = (5, 1e-6, 1e-6, manifold, False, True)
    found = []
    for choice in ("cpu", "reference"):
        inputs = [tensor.clone().requires_grad_() for tensor in (STREAMS.float(), phi[:rows], scale, bias[:rows])]
        with dispatch.choosing(choice):
            outputs = ops.pre(*inputs, *constants)
            sum((output * _draw(*output.shape).float()).sum() for output in outputs[:3]).backward()
        found.append([*outputs, *(tensor.grad for tensor in inputs)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_opcheck():
    inputs = [tensor.float().requires_grad_() for tensor in (STREAMS, *PARAMETERS)]
    torch.library.opcheck(torch.ops.mhc.pre.default, (*inputs, *CONSTANTS, True))
