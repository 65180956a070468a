"""The operators with the norm of the layer input: against float64, and in the ways that a row of C is cut."""

from __future__ import annotations

import pytest
import torch
from mhc_compile.kernels.dispatch import choosing, kernel_of, reference_of
from mhc_compile.kernels.gpu import collapse_norm
from mhc_compile.kernels.gpu.configurations import CollapseNormConfig
from mhc_compile.kernels.ops import OPERATORS

from tests.kernels.problems import NORMED, Problem, check, check_halves, inputs, run_backward

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Tiles of many tokens, more than one split of C.
SHAPES = ((3, 4, 80), (40, 4, 24), (9, 3, 17), (2, 7, 24), (5, 1, 33))


def _check(operator, problem, device):
    check(operator, problem, device)
    check_halves(operator, problem, device)


@pytest.mark.parametrize("operator", NORMED)
@pytest.mark.parametrize(("tokens", "n", "width"), SHAPES)
def test_as_good_as_plain_pytorch(operator, tokens, n, width, device):
    dtype = DTYPES[(tokens + n) % 3]
    for centered, anchored in ((True, True), (False, False), (False, True)):
        _check(operator, Problem(tokens, n, width, dtype, centered=centered, anchored=anchored), device)


def test_a_token_of_its_own(device):
    for centered in (True, False):
        problem = Problem(2, 2, 2100, torch.bfloat16, centered=centered, anchored=True)
        check("pre_norm", problem, device, backward=False)


@pytest.mark.parametrize("operator", NORMED)
@pytest.mark.parametrize("centered", [True, False])
def test_rows_too_wide_for_registers(operator, centered, device, monkeypatch):
    monkeypatch.setattr(collapse_norm, "collapse_norm_config", lambda geometry: CollapseNormConfig(2, 64, 4, False))
    for dtype in (torch.float32, torch.bfloat16):
        _check(operator, Problem(3, 4, 130, dtype, centered=centered, anchored=True), device)


@pytest.mark.parametrize("manifold", ["none", "identity", "row"])
def test_other_manifolds(manifold, device):
    for operator in NORMED:
        _check(operator, Problem(3, 4, 40, manifold=manifold, anchored=True), device)


@pytest.mark.parametrize("held", [True, False])
def test_a_mean_far_from_zero_cancels_nothing(held, device, monkeypatch):
    # The mean of the squares less the square of the mean would have two digits left.
    if not held:
        monkeypatch.setattr(collapse_norm, "collapse_norm_config", lambda geometry: CollapseNormConfig(2, 64, 4, False))
    tensors, constants = inputs("pre_norm", Problem(4, 4, 300), device)
    tensors = (tensors[0] + 2000.0, *tensors[1:])
    normed = kernel_of("pre_norm")(*tensors, *constants)[0]
    truth = reference_of("pre_norm")(*(tensor.double() for tensor in tensors), *constants)[0]
    assert (normed - truth).abs().max() <= 2e-3 * truth.abs().max()


@pytest.mark.parametrize("operator", NORMED)
def test_no_tokens(operator, device):
    tensors, constants = inputs(operator, Problem(0, 4, 24), device)
    outputs = kernel_of(operator)(*tensors, *constants)
    assert [out.shape for out in outputs] == [out.shape for out in reference_of(operator)(*tensors, *constants)]
    grads = run_backward(operator, (*outputs[:4], *tensors)[-len(tensors) - len(outputs) + 2 :], constants)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]


@pytest.mark.parametrize("operator", NORMED)
def test_strided_inputs(operator, device):
    tensors, constants = inputs(operator, Problem(6, 4, 24, anchored=True), device)
    strided = tuple(
        tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor[None].expand(2, -1)[1] for tensor in tensors
    )
    for ours, wanted in zip(
        kernel_of(operator)(*strided, *constants), kernel_of(operator)(*tensors, *constants), strict=True
    ):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("operator", NORMED)
def test_phi_as_it_lies(operator, columns, device):
    """Rows of res ordered [in, out], phi columns first: what the constants before `transposed` are, is known."""
    tensors, constants = inputs(operator, Problem(3, 4, 16, anchored=True), device)
    phi = tensors[-3]
    lying = phi.T.contiguous().T if columns else phi
    found = []
    for choice in ("triton", "reference"):
        leaves = [tensor.detach().requires_grad_() for tensor in (*tensors[:-3], lying, *tensors[-2:])]
        with choosing(choice):
            outputs = OPERATORS[operator].forward(*leaves, *constants, True)
            count = len(OPERATORS[operator].signature.outputs)
            sum(output.square().sum() for output in outputs[:count]).backward()
        found.append([*outputs, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
