"""The kernels against float64.

No worse than plain PyTorch in the same dtype, and against independent oracles.
"""

from __future__ import annotations

import pytest
import torch
from mhc_compile.kernels.dispatch import kernel_of
from mhc_compile.kernels.gpu import measure
from mhc_compile.kernels.gpu.projection import project

from mhc_compile import functional
from tests.kernels.problems import (
    OPERATORS,
    Problem,
    backward_of,
    check,
    check_halves,
    inputs,
    many,
    output_grads,
    rounded_truth,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Tiles of 16 and 32 tokens, phi as it is and prepared, factors held and loaded again from 5 streams on.
SHAPES = (
    (3, 4, 80),
    (140, 4, 72),
    (66, 3, 17),
    (2, 7, 40),
    (65, 5, 24),
    (5, 1, 33),
    (9, 2, 130),
    (4, 6, 20),
    (3, 8, 24),
)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("tokens", "n", "width"), SHAPES)
def test_as_good_as_plain_pytorch(operator, tokens, n, width, device):
    dtype = DTYPES[(tokens + n) % 3]
    check(operator, Problem(tokens, n, width, dtype, anchored=True), device)


# 65 tokens are shared out over two programs.
@pytest.mark.parametrize("operator", ["pre", "paper_pre", "post_pre", "head"])
@pytest.mark.parametrize(("n", "tokens"), [(n, t) for n in (1, 2, 3, 4, 5, 8) for t in (1, 65)])
def test_streams_as_they_are(n, tokens, operator, device):
    # The tests above hold them anchored, as rewritten graphs do; the functional interface does not.
    check(operator, Problem(tokens, n, 40, DTYPES[(n // 4 + n + tokens) % 3]), device)


# test_anchored.py does the same for the operators that take a layout.
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_post_at_four_streams(dtype, device):
    check("post", Problem(70, 4, 48, dtype), device)


@pytest.mark.parametrize("manifold", ["none", "identity", "row"])
@pytest.mark.parametrize("tokens", [3, 66])
@pytest.mark.parametrize("operator", ["pre", "paper_pre", "post_pre"])
def test_other_manifolds(operator, tokens, manifold, device):
    problem = Problem(tokens, 4, 40, manifold=manifold)
    check(operator, problem, device)


# Matrices that are made of a row of logits; anchored ones, too.
@pytest.mark.parametrize(
    ("operator", "manifold", "n", "anchored"),
    [
        ("pre", "permutation", 4, True),
        ("paper_pre", "permutation", 3, False),
        ("post_pre", "permutation", 2, True),
        ("pre", "kronecker", 8, False),
        ("paper_pre", "kronecker", 4, True),
        ("post_pre", "kronecker", 2, False),
    ],
)
def test_manifolds_of_fewer_or_more_logits(operator, manifold, n, anchored, device):
    check(operator, Problem(37, n, 40, manifold=manifold, anchored=anchored), device)


@pytest.mark.parametrize("operator", ["pre", "post_pre"])
@pytest.mark.parametrize(("tokens", "dtype"), [(3, torch.float32), (37, torch.bfloat16), (150, torch.float16)])
def test_halves_are_the_whole(operator, tokens, dtype, device):
    for anchored, manifold in ((True, "sinkhorn"), (False, "none"), (True, "identity")):
        check_halves(operator, Problem(tokens, 4, 40, dtype, manifold, anchored=anchored), device)


def test_halves_of_many_streams_are_the_whole(device):
    # A tile holds more tokens than there are, whose coefficients are another's.
    check_halves("post_pre", Problem(5, 8, 24, torch.bfloat16, anchored=True), device)


def test_the_check_sees_phi_in_one_piece(device, monkeypatch):
    # The slack of bfloat16 streams would hide it: res would err by 1e-3.
    problem = Problem(40, 4, 64, torch.bfloat16, anchored=True)
    check("pre", problem, device, backward=False)

    def rounded(streams, phi, *rest, **how):
        return project(streams, phi.bfloat16().float(), *rest, **how)

    monkeypatch.setattr(measure, "project", rounded)
    with pytest.raises(AssertionError, match=r"output [12] errs"):
        check("pre", problem, device, backward=False)


@pytest.mark.parametrize("operator", ["sinkhorn", "pre", "head"])
def test_epsilon(operator, device):
    problem = Problem(7, 4, 40, eps=1e-2)
    check(operator, problem, device)


@pytest.mark.parametrize("iters", [1, 2, 4, 5, 6, 9, 40])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_sinkhorn_differentiates_every_iteration(iters, eps, device):
    problem = Problem(9, 4, 1, iters=iters, eps=eps, logit_std=2.0)
    check("sinkhorn", problem, device)


@pytest.mark.parametrize("tokens", [3, 66])
@pytest.mark.parametrize("n", [4, 5])
def test_post_pre_reads_the_streams_as_they_are_stored(tokens, n, device):
    # Projecting the unrounded streams would be off by 1e-3 here.
    problem = Problem(tokens, n, 48, torch.bfloat16)
    tensors, constants = inputs("post_pre", problem, device)
    outputs = kernel_of("post_pre")(*tensors, *constants)
    alone = kernel_of("pre")(outputs[0], *tensors[4:], *constants)
    for fused, separate in zip(outputs[2:4], alone[1:3], strict=True):
        assert torch.allclose(fused, separate, rtol=0, atol=2e-6)
    truth, true_grads = rounded_truth(problem, device)
    assert (outputs[0].double() != truth[0]).float().mean() < 0.01
    grads = backward_of("post_pre", output_grads(outputs, problem), outputs, tensors, constants)
    for ours, true in zip(grads[4:], true_grads[4:], strict=True):
        assert (ours - true).abs().max() <= 5e-3 * true.abs().max()


def test_rows_sum_to_one(device):
    for n in range(1, 9):
        logits = 3.0 * torch.randn(64, n, n, generator=torch.Generator().manual_seed(n)).to(device)
        assert (kernel_of("sinkhorn")(logits, 20, 0.0).sum(-1) - 1).abs().max() <= 1e-6
    for operator in ("pre", "paper_pre", "post_pre"):
        tensors, constants = inputs(operator, Problem(66, 4, 64, torch.bfloat16, logit_std=4.0), device)
        assert (kernel_of(operator)(*tensors, *constants)[-2].sum(-1) - 1).abs().max() <= 1e-6


def test_sinkhorn_by_hand(device):
    # exp = [[1, 2], [3, 4]]; columns: [[1/4, 1/3], [3/4, 2/3]]; then rows, summing to 7/12 and 17/12.
    logits = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], device=device).log()
    expected = torch.tensor([[[3 / 7, 4 / 7], [9 / 17, 8 / 17]]], device=device)
    assert torch.allclose(kernel_of("sinkhorn")(logits, 1, 0.0), expected, rtol=0, atol=1e-6)


def test_orientation_by_hand(device):
    # Stream 0 takes stream 1; stream 1 takes a quarter of stream 0 and three of its own; the branch enters by
    # post.
    streams = torch.tensor([[[1.0], [8.0]]], device=device)
    res = torch.tensor([[[0.0, 1.0], [0.25, 0.75]]], device=device)
    branch, post = torch.tensor([[10.0]], device=device), torch.tensor([[1.0, 2.0]], device=device)
    assert kernel_of("post")(streams, branch, post, res).flatten().tolist() == [18.0, 26.25]
    # d/dX_1 of X'_0 + X'_1 is 1 + 0.75, d/dres[0, 1] of X'_0 is X_1.
    grads = kernel_of("post_backward")(torch.ones_like(streams), streams, branch, post, res)
    assert grads[0].flatten().tolist() == [0.25, 1.75]
    assert grads[3][0].tolist() == [[1.0, 8.0], [1.0, 8.0]]
    phi = torch.zeros(8, 2, device=device)
    bias = torch.cat([torch.zeros(4, device=device), torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).log()])
    mapping = (phi, torch.ones(3, device=device), bias)
    expected = torch.tensor([[3 / 7, 4 / 7], [9 / 17, 8 / 17]], device=device)
    assert torch.allclose(kernel_of("pre")(streams, *mapping, 1, 1e-6, 0.0, "sinkhorn")[2][0], expected, atol=1e-6)


def test_sinkhorn_against_log_domain(device):
    logits = 4.0 * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log = logits.clone()
    for _ in range(20):
        log = log - log.logsumexp(-2, keepdim=True)
        log = log - log.logsumexp(-1, keepdim=True)
    ours = kernel_of("sinkhorn")(logits.float().to(device), 20, 0.0)
    assert (ours.cpu().double() - log.exp()).abs().max() < 5e-6


@pytest.mark.usefixtures("kernels")
def test_agrees_with_deepseek_v4(device):
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    n, width = 4, 32
    config = DeepseekV4Config(hidden_size=width, hc_mult=n, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6)
    theirs = modeling.DeepseekV4HyperConnection(config).to(device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (theirs.fn, theirs.base, theirs.scale):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    streams = torch.randn(2, 5, n, width, generator=generator).to(device)
    their_post, comb, collapsed = theirs(streams)

    # Their matrix is comb[in, out].
    transpose = torch.arange(n * n).view(n, n).T.flatten() + 2 * n
    order = torch.cat([torch.arange(2 * n), transpose]).to(device)
    ours = functional.pre(streams, theirs.fn[order], theirs.scale, theirs.base[order], eps=1e-6)
    assert torch.allclose(ours.layer_input, collapsed, atol=2e-6)
    assert torch.allclose(ours.post, their_post, atol=2e-6)
    assert torch.allclose(ours.res, comb.mT, atol=2e-6)


@pytest.mark.parametrize("operator", ["sinkhorn", "pre", "post_pre"])
def test_large_gradients_and_logits_stay_finite(operator, device):
    check(operator, Problem(20, 4, 40, logit_std=8.0, grad_scale=1e4), device)


def test_extreme_logits(device):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randint(0, 2, (40, 4, 4), generator=generator) * 2e4 - 1e4).to(device)
    logits += torch.randn(logits.shape, generator=generator).to(device)
    res = kernel_of("sinkhorn")(logits, 20, 0.0)
    assert (res.sum(-1) - 1).abs().max() <= 1e-6
    assert torch.isfinite(kernel_of("sinkhorn_backward")(torch.ones_like(res), logits, 20, 0.0)).all()
    tensors, constants = inputs("pre", Problem(3, 4, 24), device)
    bias = torch.linspace(-1e4, 1e4, 24, device=device)
    outputs = kernel_of("pre")(*tensors[:3], bias, *constants)
    ones = tuple(torch.ones_like(out) for out in outputs)
    grads = backward_of("pre", ones, outputs, (*tensors[:3], bias), constants)
    assert all(torch.isfinite(tensor).all() for tensor in (*outputs, *grads))


@pytest.mark.parametrize("operator", ["pre", "post_pre", "head"])
@pytest.mark.parametrize("tokens", [2, 65])
def test_all_zero_tokens(operator, tokens, device):
    tensors, constants = inputs(operator, Problem(tokens, 4, 24), device)
    zero = tuple(torch.zeros_like(tensor) for tensor in tensors[:-3])
    outputs = many(kernel_of(operator)(*zero, *tensors[-3:], *constants))
    ones = tuple(torch.ones_like(out) for out in outputs)
    grads = backward_of(operator, ones, outputs, (*zero, *tensors[-3:]), constants)
    assert all(torch.isfinite(tensor).all() for tensor in (*outputs, *grads))
