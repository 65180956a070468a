"""The definition of the operators against oracles that nobody here wrote, finite differences and a worked example."""

import pytest
import torch
from mhc_compile.kernels import reference
from mhc_compile.kernels.manifolds import MANIFOLDS

from mhc_compile import functional


def _arguments(n=4, width=8, tokens=(2, 3), manifold="sinkhorn", dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    rows, scales = MANIFOLDS[manifold].rows(n), MANIFOLDS[manifold].scales

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(*tokens, n, width), draw(rows, n * width) * 0.3, draw(scales) * spread, draw(rows) * spread


def test_orientation_by_a_hand_worked_example():
    """One iteration on log[[1, 2], [3, 4]]: columns sum to 4 and 6, then rows to 7/12 and 17/12."""
    res = functional.sinkhorn(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).log(), iters=1)
    expected = torch.tensor([[3 / 7, 4 / 7], [9 / 17, 8 / 17]])
    torch.testing.assert_close(res, expected)
    torch.testing.assert_close(res.sum(-1), torch.ones(2))
    # res[out, in]: output stream 0 takes 3/7 of stream 0 and 4/7 of stream 1, and all of the branch.
    streams, branch = torch.tensor([[1.0], [8.0]]), torch.tensor([10.0])
    mixed = functional.post(streams, branch, torch.tensor([1.0, 0.0]), res)
    torch.testing.assert_close(mixed, torch.tensor([[3 / 7 + 32 / 7 + 10], [9 / 17 + 64 / 17]]))


def test_equals_transformers_deepseek_v4():
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
        DeepseekV4HyperConnection,
        DeepseekV4HyperHead,
    )

    config = DeepseekV4Config(hidden_size=24, hc_mult=4, hc_eps=1e-6, rms_norm_eps=1e-6)
    streams, phi, scale, bias = _arguments(4, 24)
    theirs = DeepseekV4HyperConnection(config)
    # They keep comb[in, out] = res[out, in]: the 16 rows of the mixing matrix are ordered the other way round.
    order = torch.cat([torch.arange(8), 8 + torch.arange(16).view(4, 4).T.flatten()])
    with torch.no_grad():
        theirs.fn.copy_(phi[order])
        theirs.base.copy_(bias[order])
        theirs.scale.copy_(scale)
        post, comb, collapsed = theirs(streams)
    ours = functional.pre(streams, phi, scale, bias, iters=config.hc_sinkhorn_iters, eps=1e-6)
    torch.testing.assert_close(ours.post, post)
    torch.testing.assert_close(ours.res, comb.mT)
    torch.testing.assert_close(ours.layer_input, collapsed)

    head = DeepseekV4HyperHead(config)
    with torch.no_grad():
        head.hc_fn.copy_(phi[:4])
        head.hc_base.copy_(bias[:4])
        head.hc_scale.copy_(scale[:1])
        read = head(streams)
    torch.testing.assert_close(functional.head(streams, phi[:4], scale[:1], bias[:4], eps=1e-6), read)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_sinkhorn_equals_log_domain_iterations(n):
    logits = 3 * torch.randn(7, n, n, dtype=torch.float64)
    log_res = logits
    for _ in range(20):
        log_res = log_res - torch.logsumexp(log_res, dim=-2, keepdim=True)
        log_res = log_res - torch.logsumexp(log_res, dim=-1, keepdim=True)
    torch.testing.assert_close(functional.sinkhorn(logits), log_res.exp())


@pytest.mark.parametrize("spread", [1.0, 8.0, 1e4])
def test_sinkhorn_is_bistochastic_and_finite_at_any_scale(spread):
    logits = (spread * torch.randn(50, 4, 4)).requires_grad_()
    res = functional.sinkhorn(logits, iters=200 if spread == 1.0 else 20)
    res.backward(1e4 * torch.randn_like(res))
    assert (res.sum(-1) - 1).abs().max() <= 1e-6
    assert (res >= 0).all()
    if spread == 1.0:
        assert (res.sum(-2) - 1).abs().max() <= 1e-5
    assert logits.grad.isfinite().all()


def test_all_zero_tokens_are_finite():
    streams, phi, scale, bias = _arguments()
    streams = torch.zeros_like(streams).requires_grad_()
    out = functional.pre(streams, phi, scale, bias)
    sum(part.sum() for part in out).backward()
    assert all(part.isfinite().all() for part in out)
    assert streams.grad.isfinite().all()


@pytest.mark.parametrize("manifold", sorted(MANIFOLDS))
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_gradients_equal_finite_differences(manifold, eps):
    arguments = [t.requires_grad_() for t in _arguments(3, 5, (2,), manifold, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *inputs: tuple(functional.pre(*inputs, iters=4, eps=eps, manifold=manifold)), arguments
    )


def test_gradients_of_the_other_operators_equal_finite_differences():
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    streams = draw(2, 3, 5)
    assert torch.autograd.gradcheck(functional.post, [streams, draw(2, 5), draw(2, 3), draw(2, 3, 3)])
    assert torch.autograd.gradcheck(functional.head, [streams, draw(3, 15), draw(1), draw(3)])
    assert torch.autograd.gradcheck(lambda x: functional.sinkhorn(3 * x, iters=20), [draw(2, 4, 4)])


@pytest.mark.parametrize("manifold", sorted(MANIFOLDS))
def test_backward_equals_autograd_of_the_reference(manifold):
    arguments = _arguments(4, 8, (6,), manifold, torch.float64)
    ours = [tensor.clone().requires_grad_() for tensor in arguments]
    plain = [tensor.clone().requires_grad_() for tensor in arguments]
    outputs = functional.pre(*ours, iters=20, manifold=manifold)
    wanted = reference.pre(*plain, iters=20, manifold=manifold)[:3]
    cotangents = [torch.randn_like(part) for part in wanted]
    torch.autograd.backward(outputs, cotangents)
    live = [(part, weight) for part, weight in zip(wanted, cotangents, strict=True) if part.requires_grad]
    torch.autograd.backward([part for part, _ in live], [weight for _, weight in live])
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_low_precision_streams_keep_float32_coefficients():
    streams, phi, scale, bias = _arguments()
    for dtype in (torch.bfloat16, torch.float16):
        out = functional.pre(streams.to(dtype), phi, scale, bias)
        assert (out.layer_input.dtype, out.post.dtype, out.res.dtype) == (dtype, torch.float32, torch.float32)
        assert (out.res.sum(-1) - 1).abs().max() <= 1e-6
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = functional.pre(streams.to(dtype), phi, scale, bias)
        assert torch.equal(cast.res, out.res)


@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 0, 3)])
def test_empty_and_single_tokens(tokens):
    streams, phi, scale, bias = _arguments(tokens=tokens)
    out = functional.pre(streams.requires_grad_(), phi.requires_grad_(), scale, bias)
    assert out.layer_input.shape == (*tokens, 8)
    out.layer_input.sum().backward()
    assert streams.grad.shape == streams.shape
    assert phi.grad.isfinite().all()
