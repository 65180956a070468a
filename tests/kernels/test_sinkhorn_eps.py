"""Sinkhorn with an eps in each of its places, in every implementation, against a module in float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from mhc_compile.kernels import ops, reference
from mhc_compile.kernels.dispatch import choosing
from mhc_compile.kernels.fusions import HALVES

from mhc_compile import functional

ITERS, NORM_EPS, PRE_EPS = 5, 1e-6, 1e-3
# In the first sums, in the matrix behind them, in later sums: every sum; as in DeepSeek-V4, but not pre's; behind a
# softmax; all three apart.
PLACES = [(1e-2, 0.0, 1e-2), (0.0, 2e-2, 2e-2), (0.0, 0.0, 1e-2), (3e-2, 1e-2, 2e-2)]


@pytest.fixture
def chosen(choice):
    """Operators take each implementation."""
    with choosing(choice):
        yield choice


def problem(n, width=12, tokens=5):
    """Return streams, branch, post, res, phi, scale and bias in float64; some matrices are tiny beside an eps."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = n * n + 2 * n
    bias = normal(rows)
    bias[2 * n : 3 * n] -= 6.0
    mixing = (normal(tokens, n).sigmoid() * 2, normal(tokens, n, n).softmax(-1))
    return (normal(tokens, n, width), normal(tokens, width), *mixing, normal(rows, n * width) * 0.3, normal(3), bias)


def by_hand(streams, phi, scale, bias, places):
    """A site as a model spells it: no function of ours, no logarithms."""
    n, (first, matrix, sums) = streams.shape[-2], places
    flat = streams.flatten(-2)
    logits = flat / (flat.pow(2).mean(-1, keepdim=True) + NORM_EPS).sqrt() @ phi.T
    pre, post, res = (part * s for part, s in zip(logits.split([n, n, n * n], -1), scale, strict=True))
    pre, post = 1 / (1 + (-pre - bias[:n]).exp()) + PRE_EPS, 2 / (1 + (-post - bias[n : 2 * n]).exp())
    mixing = (res + bias[2 * n :]).unflatten(-1, (n, n)).exp()
    mixing = mixing / (mixing.sum(-2, keepdim=True) + first) + matrix
    for index in range(ITERS):
        if index:
            mixing = mixing / (mixing.sum(-2, keepdim=True) + sums)
        mixing = mixing / (mixing.sum(-1, keepdim=True) + sums)
    return (pre.unsqueeze(-1) * streams).sum(-2), post, mixing


def boundary_by_hand(streams, branch, post, res, phi, scale, bias, places, dtype):
    """The new streams are rounded as they are stored; their gradient is not that of the rounding."""
    fresh = torch.einsum("toi,tic->toc", res, streams) + post.unsqueeze(-1) * branch.unsqueeze(-2)
    stored = fresh + (fresh.to(dtype).double() - fresh).detach()
    return (fresh, *by_hand(stored, phi, scale, bias, places))


def with_gradients(outputs, inputs):
    """Return outputs and gradients; what comes in from behind is bfloat16, which any dtype holds."""
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def assert_near(got, wanted, roundings):
    """Compare within float32's sums, and so many roundings to bfloat16 of each result."""
    sizes = [theirs.abs().max() for theirs in wanted]
    # The gradient of scale sums the terms of bias's, which cancel: it errs by as much as they do.
    sizes[-2] = max(sizes[-2:])
    for index, (ours, theirs, size) in enumerate(zip(got, wanted, sizes, strict=True)):
        gap = (ours.double() - theirs).abs().max() / size
        assert gap <= 2e-5 + roundings[index] * torch.finfo(torch.bfloat16).eps / 2, (index, gap)


def leaves(tensors, dtype, wide):
    return [
        tensor.to(dtype if index < wide else torch.float32).double().requires_grad_()
        for index, tensor in enumerate(tensors)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_boundary_is_what_a_model_spells(chosen, n, places, dtype):
    given = leaves(problem(n), dtype, wide=2)
    wanted = with_gradients(boundary_by_hand(*given, places, dtype), given)
    held = [
        tensor.detach().to(dtype if index < 2 else torch.float32).requires_grad_() for index, tensor in enumerate(given)
    ]
    constants = (ITERS, NORM_EPS, PRE_EPS, "sinkhorn", False, False, list(places))
    got = with_gradients(ops.post_pre(*held, *constants)[:4], held)
    # Streams, layer input; the gradients of streams and branch, which like those of post and res are made from that of
    # the new streams, held in their dtype.
    narrow = [1, 1, 0, 0, 2, 2, 1, 1, 0, 0, 0] if dtype == torch.bfloat16 else [0] * 11
    assert_near(got, wanted, narrow)


def test_plain_pytorch_is_exact():
    for n in (2, 4, 8):
        for places in PLACES:
            given = leaves(problem(n)[:1] + problem(n)[4:], torch.float64, wide=4)
            wanted = with_gradients(by_hand(*given, places), given)
            constants = (ITERS, NORM_EPS, PRE_EPS, "sinkhorn", False, False, list(places))
            got = with_gradients(ops.pre(*given, *constants)[:3], given)
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("places", [PLACES[0], PLACES[3]])
def test_all_operators_and_layouts_take_it(chosen, places):
    """Anchored streams, rows of res [in, out], halves, the paper's kernels, a norm: as plain PyTorch has them."""
    tensors = [tensor.float() for tensor in problem(3)]
    weight, shift = torch.rand(12), torch.rand(12)
    site = (ITERS, NORM_EPS, PRE_EPS, "sinkhorn", True, True, list(places))
    normed = (*site[:4], 1e-5, True, *site[4:])
    cases = {
        "pre": ([tensors[0], *tensors[4:]], site),
        "paper_pre": ([tensors[0], *tensors[4:]], site),
        "post_pre": (tensors, site),
        "pre_norm": ([tensors[0], weight, shift, *tensors[4:]], normed),
        "post_pre_norm": ([*tensors[:4], weight, shift, *tensors[4:]], normed),
    }
    for name, (given, constants) in cases.items():
        operator = ops.OPERATORS[name]
        held = [tensor.clone().requires_grad_() for tensor in given]
        count = len(operator.signature.outputs)
        got = operator.forward(*held, *constants)
        with choosing("reference"):
            wide = [tensor.double().requires_grad_() for tensor in given]
            wanted = operator.forward(*wide, *constants)
            exact = with_gradients(wanted[:count], wide)
        assert_near(with_gradients(got[:count], held), exact, [0] * len(exact))
        if name in HALVES:
            measure, collapse = (ops.OPERATORS[half] for half in HALVES[name])
            known = operator.signature.shared_with(measure.signature, (*given, *constants))
            again = collapse.forward(*given, *measure.forward(*known), *constants)
            for ours, theirs in zip(again[:count], got[:count], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)


def test_exponentials_far_below_an_eps_and_far_above_stay_finite(chosen):
    """exp(-300) is no float32; beside an eps it is nothing, and exp(300) is all."""
    tensors = problem(4)
    given = [tensors[0].float(), *(tensor.float() for tensor in tensors[4:])]
    # Columns: res[out, in] lies row by row behind the gates.
    given[3][8::4], given[3][9::4] = -300.0, 300.0
    held = [tensor.requires_grad_() for tensor in given]
    constants = (ITERS, NORM_EPS, PRE_EPS, "sinkhorn", False, False, [1e-6, 0.0, 1e-6])
    results = with_gradients(ops.pre(*held, *constants)[:3], held)
    assert all(torch.isfinite(result).all() for result in results)
    wide = leaves(given, torch.float64, wide=4)
    assert_near(results, with_gradients(by_hand(*wide, (1e-6, 0.0, 1e-6)), wide), [0] * len(results))


@pytest.mark.parametrize(
    ("places", "manifold", "told"),
    [([1e-6], "sinkhorn", "give three numbers"), ([0.0, 0.0, 1e-6], "row", "needs manifold='sinkhorn', not 'row'")],
)
def test_what_it_cannot_be_is_said(places, manifold, told):
    streams, *_, phi, scale, bias = problem(4)
    for call in (ops.pre, reference.pre):
        with pytest.raises(ValueError, match=told):
            call(streams, phi, scale, bias, ITERS, NORM_EPS, 0.0, manifold, False, False, places)


@pytest.mark.parametrize("places", PLACES)
def test_the_functional_interface_takes_the_places(places):
    streams, branch, post, res, phi, scale, bias = problem(4)
    more = {"iters": ITERS, "norm_eps": NORM_EPS, "eps": PRE_EPS, "sinkhorn_eps": places}
    for got, wanted in zip(
        functional.pre(streams, phi, scale, bias, **more), by_hand(streams, phi, scale, bias, places), strict=True
    ):
        torch.testing.assert_close(got, wanted)
    wanted = boundary_by_hand(streams, branch, post, res, phi, scale, bias, places, torch.float64)
    got = functional.post_pre(streams, branch, post, res, phi, scale, bias, **more)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="three numbers"):
        functional.pre(streams, phi, scale, bias, sinkhorn_eps=places[:2])
