"""The compiled operators against float64: no worse than plain PyTorch in the same dtype, and against oracles."""

from __future__ import annotations

import math

import pytest
import torch
from mhc_compile.kernels import anchored, reference
from mhc_compile.kernels.dispatch import compiled_of

from tests.kernels.problems import (
    OPERATORS,
    Problem,
    check,
    check_halves,
    inputs,
    many,
    output_grads,
    rounded_truth,
    run_backward,
)

pytestmark = pytest.mark.usefixtures("compiled")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TAKES_LAYOUT = ("pre", "post_pre", "head")


def check_compiled(operator, problem):
    check(operator, problem, function_of=compiled_of)


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_number_of_streams(operator, n):
    # Whole chunks and a part of one; a width that fills vectors and one that does not.
    for tokens, width in ((3, 80), (37, 17)):
        check_compiled(operator, Problem(tokens, n, width))


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("operator", TAKES_LAYOUT)
def test_any_number_of_anchored_streams(operator, n):
    for tokens, width in ((3, 17), (37, 80)):
        check_compiled(operator, Problem(tokens, n, width, anchored=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_dtype(operator, dtype):
    for layout in (False, True) if operator in TAKES_LAYOUT else (False,):
        check_compiled(operator, Problem(70, 4, 48, dtype, anchored=layout))


# A tile holds 1024 channels of 4 streams: these take several, the last one ragged.
@pytest.mark.parametrize(("width", "dtype"), [(2048, torch.float32), (1100, torch.float32), (2100, torch.bfloat16)])
@pytest.mark.parametrize("operator", ["pre", "post", "post_pre", "head"])
def test_widths_of_several_tiles(operator, width, dtype):
    check_compiled(operator, Problem(19, 4, width, dtype, anchored=operator != "post"))


@pytest.mark.parametrize("layout", [False, True])
@pytest.mark.parametrize("manifold", ["sinkhorn", "none", "identity", "row"])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("operator", ["pre", "post_pre"])
def test_manifolds_and_epsilon(operator, eps, manifold, layout):
    check_compiled(operator, Problem(21, 4, 24, manifold=manifold, eps=eps, anchored=layout))


@pytest.mark.parametrize("layout", [False, True])
@pytest.mark.parametrize(
    ("manifold", "n"), [*(("permutation", n) for n in (2, 3, 4)), *(("kronecker", n) for n in (2, 4, 8))]
)
def test_manifolds_of_fewer_or_more_logits(manifold, n, layout):
    check_compiled("post_pre", Problem(21, n, 24, manifold=manifold, anchored=layout))


@pytest.mark.parametrize("iters", [1, 2, 5, 40])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_sinkhorn_differentiates_every_iteration(iters, eps):
    check_compiled("sinkhorn", Problem(20, 4, 1, iters=iters, eps=eps, logit_std=2.0))
    check_compiled("pre", Problem(20, 4, 8, iters=iters, eps=eps, logit_std=2.0))


@pytest.mark.parametrize("operator", ["sinkhorn", "pre", "post_pre"])
def test_large_gradients_and_logits_stay_finite(operator):
    check_compiled(operator, Problem(20, 4, 40, logit_std=8.0, grad_scale=1e4))


def test_finite_differences():
    # Central differences of the compiled forward; float32 leaves three digits.
    tensors, constants = inputs("post_pre", Problem(5, 4, 8, iters=5, anchored=True))
    outputs = compiled_of("post_pre")(*tensors, *constants)[:4]
    grads = output_grads(outputs, Problem(5, 4, 8))
    found = run_backward("post_pre", (*grads, *tensors), constants, compiled_of)

    def loss(changed):
        results = compiled_of("post_pre")(*changed, *constants)[:4]
        return sum(float((result.double() * grad.double()).sum()) for result, grad in zip(results, grads, strict=True))

    generator = torch.Generator().manual_seed(3)
    for index, tensor in enumerate(tensors):
        step = torch.randn(tensor.shape, generator=generator)
        ends = [[*tensors[:index], tensor + sign * 4e-3 * step, *tensors[index + 1 :]] for sign in (1, -1)]
        slope = (loss(ends[0]) - loss(ends[1])) / 8e-3
        expected = float((found[index].double() * step.double()).sum())
        assert abs(slope - expected) <= 2e-3 * float(found[index].norm() * step.norm()), index


def test_orientation_by_hand():
    # Stream 0 takes stream 1; stream 1 takes a quarter of stream 0 and three of its own; the branch enters by post.
    streams = torch.tensor([[[1.0], [8.0]]])
    res = torch.tensor([[[0.0, 1.0], [0.25, 0.75]]])
    branch, post = torch.tensor([[10.0]]), torch.tensor([[1.0, 2.0]])
    assert compiled_of("post")(streams, branch, post, res).flatten().tolist() == [18.0, 26.25]
    # d/dX_1 of X'_0 + X'_1 is 1 + 0.75, d/dres[0, 1] of X'_0 is X_1.
    grads = compiled_of("post_backward")(torch.ones_like(streams), streams, branch, post, res)
    assert grads[0].flatten().tolist() == [0.25, 1.75]
    assert grads[3][0].tolist() == [[1.0, 8.0], [1.0, 8.0]]
    # exp = [[1, 2], [3, 4]]; columns: [[1/4, 1/3], [3/4, 2/3]]; then rows, summing to 7/12 and 17/12.
    logits = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]).log()
    expected = torch.tensor([[[3 / 7, 4 / 7], [9 / 17, 8 / 17]]])
    assert torch.allclose(compiled_of("sinkhorn")(logits, 1, 0.0), expected, rtol=0, atol=1e-6)


def test_sinkhorn_against_log_domain():
    logits = 4.0 * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log = logits.clone()
    for _ in range(20):
        log = log - log.logsumexp(-2, keepdim=True)
        log = log - log.logsumexp(-1, keepdim=True)
    assert (compiled_of("sinkhorn")(logits.float(), 20, 0.0).double() - log.exp()).abs().max() < 5e-6


def test_extreme_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 2, (40, 4, 4), generator=generator) * 2e4 - 1e4
    logits += torch.randn(logits.shape, generator=generator)
    res = compiled_of("sinkhorn")(logits, 20, 0.0)
    assert (res.sum(-1) - 1).abs().max() <= 1e-6
    assert torch.isfinite(compiled_of("sinkhorn_backward")(torch.ones_like(res), logits, 20, 0.0)).all()
    tensors, constants = inputs("pre", Problem(3, 4, 24))
    bias = torch.linspace(-1e4, 1e4, 24)
    outputs = compiled_of("pre")(*tensors[:3], bias, *constants)
    grads = run_backward(
        "pre", (*(torch.ones_like(out) for out in outputs), *tensors[:3], bias), constants, compiled_of
    )
    assert all(torch.isfinite(tensor).all() for tensor in (*outputs, *grads))


def test_not_a_number_is_never_hidden():
    logits = torch.zeros(17, 4, 4)
    logits[16, 2, 1] = float("nan")
    res = compiled_of("sinkhorn")(logits, 20, 0.0)
    assert torch.isfinite(res[:16]).all()
    assert res[16].isnan().all()
    for dtype in DTYPES:
        tensors, constants = inputs("pre", Problem(17, 4, 24, dtype))
        for value in (float("nan"), float("inf")):
            tensors[0][3, 1, 5] = value
            outputs = compiled_of("pre")(*tensors, *constants)
            assert all(not torch.isfinite(out[3]).any() or out is outputs[0] for out in outputs)
            assert not torch.isfinite(outputs[0][3, 5])
            assert all(torch.isfinite(out[4:]).all() and torch.isfinite(out[:3]).all() for out in outputs)


@pytest.mark.parametrize("operator", ["pre", "post_pre", "head"])
def test_all_zero_tokens(operator):
    tensors, constants = inputs(operator, Problem(19, 4, 24))
    zero = tuple(torch.zeros_like(tensor) for tensor in tensors[:-3])
    outputs = many(compiled_of(operator)(*zero, *tensors[-3:], *constants))
    ones = (torch.ones_like(out) for out in outputs)
    grads = run_backward(operator, (*ones, *zero, *tensors[-3:]), constants, compiled_of)
    assert all(torch.isfinite(tensor).all() for tensor in (*outputs, *grads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_post_pre_reads_the_streams_as_they_are_stored(dtype):
    # Projecting the unrounded streams would be off by 1e-3 in bfloat16.
    problem = Problem(37, 4, 48, dtype)
    tensors, constants = inputs("post_pre", problem)
    outputs = compiled_of("post_pre")(*tensors, *constants)
    alone = compiled_of("pre")(outputs[0], *tensors[4:], *constants)
    assert all(torch.equal(fused, separate) for fused, separate in zip(outputs[1:], alone, strict=True))
    _, true_grads = rounded_truth(problem)
    grads = run_backward("post_pre", (*output_grads(outputs, problem), *tensors), constants, compiled_of)
    for ours, true in zip(grads[4:], true_grads[4:], strict=True):
        assert (ours - true).abs().max() <= 5e-3 * true.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_are_rounded_to_nearest_ties_to_even(dtype):
    # Streams that cancel leave post · branch: float32 values of every size, ties, zeros, infinities, NaN.
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-6, 4, (4096,), generator=generator)
    ties = 1.0 + torch.arange(64) * torch.finfo(dtype).eps / 2
    special = torch.tensor([0.0, -0.0, torch.finfo(dtype).max, 3.4e38, -3.4e38, float("inf"), float("nan"), 1e-7, 6e-8])
    post = torch.cat([values, ties, special])
    tokens = post.numel()
    streams = torch.zeros(tokens, 1, 1, dtype=dtype)
    branch = torch.ones(tokens, 1, dtype=dtype)
    written = compiled_of("post")(streams, branch, post[:, None].contiguous(), torch.ones(tokens, 1, 1)).flatten()
    expected = post.to(dtype)
    assert torch.equal(written.isnan(), expected.isnan())
    assert torch.equal(written.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0), expected.nan_to_num(0.0, 1.0, -1.0))


def _preserving(operator, problem):
    """Inputs whose streams are equal and whose coefficients preserve: phi = 0, and pre sums to 1."""
    tensors, constants = inputs(operator, problem)
    streams, *rest, phi, scale, bias = tensors
    stored = torch.cat([streams[:, :1], torch.zeros_like(streams[:, 1:])], dim=1)
    bias = bias.clone()
    bias[: problem.n] = -math.log(problem.n - 1) if problem.n > 1 else 100.0
    if rest:
        post, res = torch.ones_like(rest[1]), rest[2]
        rest = [rest[0], anchored.write_weights(post), anchored.mixing(res, exact_rows=True)]
    return (stored, *rest, torch.zeros_like(phi), scale, bias), constants


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("operator", "n"), [("pre", 1), ("pre", 2), ("pre", 4), ("head", 4), ("post_pre", 4)])
def test_equal_streams_pass_unchanged_bit_for_bit(operator, n, dtype):
    # What the layout is for: neither the forward nor the gradient of the identity path rounds.
    problem = Problem(37, n, 24, dtype, anchored=True)
    tensors, constants = _preserving(operator, problem)
    outputs = many(compiled_of(operator)(*tensors, *constants))
    identity = tensors[0][:, 0]
    collapsed = outputs[0]
    if operator == "post_pre":
        identity, collapsed = (identity.float() + tensors[1].float()).to(dtype), outputs[1]
        assert not outputs[0][:, 1:].any()
        assert torch.equal(outputs[0][:, 0], identity)
    assert torch.equal(collapsed, identity)
    grad = output_grads((collapsed,), problem)[0]
    grads = [grad if out is collapsed else torch.zeros_like(out) for out in outputs]
    ours = run_backward(operator, (*grads, *tensors), constants, compiled_of)
    assert torch.equal(ours[0][:, 0], grad)


@pytest.mark.parametrize("n", range(2, 9))
def test_the_start_reads_weights_that_sum_to_one(n):
    from mhc_compile import MHCConfig
    from mhc_compile.attachment.site_parameters import SiteParameters, SiteShape, Start

    for index in range(n):
        mapping = SiteParameters("site", Start(SiteShape(8, index, torch.device("cpu")), MHCConfig(n_streams=n)))
        streams = torch.randn(3, n, 8, generator=torch.Generator().manual_seed(0))
        streams[:, 1:] = 0.0
        parameters = (mapping.phi.detach(), mapping.scale.detach(), mapping.bias.detach())
        found = compiled_of("pre")(streams, *parameters, 20, reference.NORM_EPS, 0.0, "sinkhorn", True)
        assert torch.equal(found[0], streams[:, 0])
        assert torch.equal(found[1], torch.eye(n)[0].expand(3, n))


def test_the_anchor_is_carried_on_exactly():
    for manifold in ("sinkhorn", "identity"):
        tensors, constants = inputs("pre", Problem(37, 4, 24, manifold=manifold, anchored=True))
        mixing = compiled_of("pre")(*tensors, *constants)[2]
        assert torch.equal(mixing[:, :, 0], torch.eye(4)[0].expand(37, 4))


def test_sums_over_many_tokens_keep_their_precision():
    check_compiled("pre", Problem(8200, 2, 8, iters=3))


@pytest.mark.parametrize("layout", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", ["pre", "post_pre"])
def test_halves_are_the_whole(operator, dtype, layout):
    for manifold in ("sinkhorn", "identity", "none"):
        check_halves(operator, Problem(37, 4, 48, dtype, manifold, anchored=layout), function_of=compiled_of)
