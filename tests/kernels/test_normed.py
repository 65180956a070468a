"""The definition of the operators with a norm: PyTorch's own norms behind `pre`, and gradients by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mhc_compile.kernels import normed, reference
from mhc_compile.kernels.ops import OPERATORS

from tests.kernels.problems import NORMED, Problem, double, inputs

EPS = 1e-5


def _by_pytorch(streams, weight, bias, phi, scale, logits, *constants, centered):
    layer_input, post, res, _ = reference.pre(streams, phi, scale, logits, *constants)
    shape = layer_input.shape[-1:]
    if centered:
        return F.layer_norm(layer_input, shape, weight, bias, EPS), post, res
    return F.rms_norm(layer_input, shape, weight, EPS), post, res


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("operator", NORMED)
def test_it_is_pytorchs_norm_of_the_layer_input(operator, centered):
    """Outputs and every gradient, in float64: the backward is written by hand."""
    tensors, constants = inputs(operator, Problem(7, 3, 11, centered=centered, anchored=True))
    leaves = [tensor.requires_grad_() for tensor in double(tensors)]
    site = (*constants[:4], constants[-1])
    if operator == "pre_norm":
        wanted = _by_pytorch(*leaves, *site, centered=centered)
    else:
        fresh = reference.post(*leaves[:4])
        wanted = (fresh, *_by_pytorch(fresh, *leaves[4:], *site, centered=centered))
    ours = OPERATORS[operator].forward(*leaves, *constants)
    outputs = ours[: len(wanted)]
    torch.testing.assert_close(tuple(outputs), tuple(wanted), rtol=1e-12, atol=1e-12)
    grads = [torch.randn_like(out) for out in wanted]
    names = OPERATORS[operator].signature.tensors
    got = torch.autograd.grad(outputs, leaves, grads)
    expected = torch.autograd.grad(wanted, leaves, grads, allow_unused=True)
    for name, mine, theirs in zip(names, got, expected, strict=True):
        if theirs is None:
            assert (name, centered) == ("norm_bias", False)
            assert not mine.any()
        else:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10, msg=name)


def test_the_layer_input_is_not_rounded():
    layer_input = torch.randn(4, 64)
    value, _ = normed.norm(layer_input, torch.ones(64), torch.zeros(64), EPS, True)
    tensors, constants = inputs("pre_norm", Problem(4, 4, 64, torch.bfloat16))
    exact = normed.pre_norm(*double(tensors), *constants)[0]
    ours = normed.pre_norm(*tensors, *constants)[0]
    assert value.dtype == torch.float32
    # One rounding of the result, and none before.
    assert ((ours.double() - exact).abs() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-4).all()
