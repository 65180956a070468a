"""Native sites in spellings that no published model shares: run by the operators and exact, or left alone and told."""

import copy

import pytest
import torch
from mhc_compile.kernels.cpu import build
from mhc_compile.kernels.dispatch import choosing
from torch import nn
from torch.nn import functional as F

import mhc_compile
from mhc_compile import MHCConfig

from .native_models import HandWritten, perturb
from .perturbed import gaps, outputs_and_gradients

N, WIDTH, ITERS = 4, 12, 5
X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
STRICT_OFF = {"inner": "eager", "strict": False}


class Site(nn.Module):
    """The tensors of a site; a spelling says how it is computed from them."""

    def __init__(self):
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(24, N * WIDTH) * 0.1), nn.Parameter(torch.ones(3))
        self.bias, self.gain = nn.Parameter(torch.zeros(24)), nn.Parameter(torch.zeros(N * WIDTH))
        self.shift = nn.Parameter(torch.zeros(24))
        self.down, self.up = nn.Parameter(torch.randn(2, N * WIDTH) * 0.1), nn.Parameter(torch.zeros(24, 2))

    def logits(self, flat, weight=None, scale=None):
        z = F.linear(flat, self.w if weight is None else weight)
        scale = self.scale if scale is None else scale
        return [
            part * s + b for part, s, b in zip(z.split([4, 4, 16], -1), scale, self.bias.split([4, 4, 16]), strict=True)
        ]

    def coefficients(self, x):
        flat = x.flatten(-2)
        pre, post, res = self.logits(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6))
        return pre.sigmoid(), 2 * post.sigmoid(), sinkhorn(res.unflatten(-1, (N, N)))


class Model(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.spelling = spelling
        self.sites = nn.ModuleList(Site() for _ in range(2))
        self.branches = nn.ModuleList(HandWritten.branch(WIDTH) for _ in range(2))

    def forward(self, x):
        streams = x.unsqueeze(-2).repeat(1, 1, N, 1)
        for site, branch in zip(self.sites, self.branches, strict=True):
            streams = self.spelling(site, streams, branch)
        return streams.square().mean(-2)


def sinkhorn(logits):
    matrix = logits.exp()
    for _ in range(ITERS):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


def written(x, read, post, res, branch):
    return res @ x + post.unsqueeze(-1) * branch(read).unsqueeze(-2)


def flattened_tokens(site, x, branch):
    batch, tokens = x.shape[:2]
    flat = x.reshape(batch * tokens, -1)
    pre, post, res = site.logits(flat / flat.square().mean(-1, keepdim=True).add(1e-6).sqrt())
    few = x.reshape(-1, N, WIDTH)
    res = sinkhorn((res - res.amax(-1, keepdim=True)).view(-1, N, N))
    read = torch.bmm(pre.sigmoid().view(-1, 1, N), few).view(batch, tokens, WIDTH)
    spread = torch.bmm((2 * post.sigmoid()).view(-1, N, 1), branch(read).view(-1, 1, WIDTH))
    return (torch.bmm(res, few) + spread).view_as(x)


def loops_and_potentials(site, x, branch):
    flat = x.reshape(*x.shape[:2], -1)
    pre, post, res = site.logits(F.rms_norm(flat, flat.shape[-1:]))
    res, pre = res.view(*x.shape[:2], N, N) / 0.3, 1 / (1 + (-pre).exp())
    rows = torch.zeros_like(res[..., :1])
    for _ in range(ITERS):
        columns = -torch.logsumexp(res + rows, -2, keepdim=True)
        rows = -torch.logsumexp(res + columns, -1, keepdim=True)
    res = (res + rows + columns).exp()
    read = sum(pre[..., i, None] * x[..., i, :] for i in range(N))
    mixed = torch.stack([sum(res[..., o, i, None] * x[..., i, :] for i in range(N)) for o in range(N)], -2)
    return torch.addcmul(mixed, (1 + torch.tanh(post / 2)).unsqueeze(-1), branch(read).unsqueeze(-2))


def one_product(site, x, branch):
    flat = F.normalize(x.flatten(-2), dim=-1) * (N * WIDTH) ** 0.5 * (site.gain + 1)
    pre, post, res = site.logits(flat, scale=F.softplus(site.scale))
    both = torch.cat([pre.sigmoid().unsqueeze(-2), sinkhorn(res.unflatten(-1, (N, N)))], -2)
    read, mixed = torch.einsum("btoi,btic->btoc", both, x).split([1, N], -2)
    return mixed + torch.einsum("btn,btc->btnc", 2 * post.sigmoid(), branch(read.squeeze(-2)))


def projection_with_a_bias(site, x, branch):
    flat = x.flatten(-2)
    z = F.linear(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6), site.w, site.shift)
    pre, post, res = (part * scale for part, scale in zip(z.split([4, 4, 16], -1), site.scale, strict=True))
    read = ((pre + site.bias[:4]).sigmoid().unsqueeze(-1) * x).sum(-2)
    return written(x, read, 2 * post.sigmoid(), sinkhorn((res + site.bias[8:]).unflatten(-1, (N, N))), branch)


def features_first(site, x, branch):
    flat = x.mT.flatten(-2)
    inverse = torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + 1e-5)
    pre, post, res = site.logits(flat * inverse, site.w + site.up @ site.down)
    res = sinkhorn(res.unflatten(-1, (N, N)))
    mixed = (res.unsqueeze(-1) * x.unsqueeze(-2)).sum(-3)
    return mixed + post.sigmoid().unsqueeze(-1) @ branch((pre.sigmoid().unsqueeze(-2) @ x).squeeze(-2)).unsqueeze(-2)


def eps_in_every_sum(site, x, branch):
    """As most write it: exp, rows first, columns last, one eps in all sums and none in pre."""
    pre, post, res = site.logits(F.rms_norm(x.flatten(-2), (N * WIDTH,), None, 1e-5))
    matrix = res.unflatten(-1, (N, N)).exp()
    for _ in range(ITERS):
        matrix = matrix / (matrix.sum(dim=-1, keepdim=True) + 1e-8)
        matrix = matrix / (matrix.sum(dim=-2, keepdim=True) + 1e-8)
    return written(x, (pre.sigmoid().unsqueeze(-1) * x).sum(-2), 2 * post.sigmoid(), matrix, branch)


def eps_of_its_own(site, x, branch):
    """Pre's eps is another than that of res, which is where DeepSeek-V4 has it."""
    pre, post, res = site.logits(F.rms_norm(x.flatten(-2), (N * WIDTH,), None, 1e-5))
    matrix = res.unflatten(-1, (N, N)).softmax(-2) + 1e-3
    matrix = matrix / (matrix.sum(-1, keepdim=True) + 1e-3)
    for _ in range(ITERS - 1):
        matrix = matrix / (matrix.sum(-2, keepdim=True) + 1e-3)
        matrix = matrix / (matrix.sum(-1, keepdim=True) + 1e-3)
    return written(x, ((pre.sigmoid() + 1e-6).unsqueeze(-1) * x).sum(-2), 2 * post.sigmoid(), matrix, branch)


def eps_behind_a_softmax(site, x, branch):
    pre, post, res = site.logits(F.rms_norm(x.flatten(-2), (N * WIDTH,), None, 1e-5))
    matrix = res.unflatten(-1, (N, N)).softmax(-1)
    for last in range(2 * ITERS - 1):
        matrix = matrix / (matrix.sum(last % 2 - 2, keepdim=True) + 1e-4)
    return written(x, (pre.sigmoid().unsqueeze(-1) * x).sum(-2), 2 * post.sigmoid(), matrix, branch)


def eps_of_pre_alone(site, x, branch):
    pre, post, res = site.coefficients(x)
    return written(x, ((pre + 1e-4).unsqueeze(-1) * x).sum(-2), post, res, branch)


@pytest.mark.parametrize(
    "spelling",
    [
        flattened_tokens,
        loops_and_potentials,
        one_product,
        projection_with_a_bias,
        features_first,
        eps_in_every_sum,
        eps_of_its_own,
        eps_behind_a_softmax,
        eps_of_pre_alone,
    ],
)
def test_another_spelling_is_run_by_the_operators_and_exact(spelling):
    model = perturb(Model(spelling), 0.3).double()
    parameters = dict(model.named_parameters())
    wanted = outputs_and_gradients(model, parameters, (X,), {})
    compiled = torch.compile(model, backend="mhc", options={**STRICT_OFF, "fusion": "boundary"})
    got = outputs_and_gradients(compiled, parameters, (X,), {})
    assert [row.kind for row in mhc_compile.report(model).native] == ["site", "site"]
    out, gradient, where = gaps(wanted, got, 1e-4)
    assert out <= 1e-12
    assert gradient <= 1e-9, where


@pytest.mark.parametrize("choice", ["cpu", "triton"])
@pytest.mark.parametrize("spelling", [eps_in_every_sum, eps_of_its_own])
def test_an_eps_of_its_own_is_run_by_the_kernels(spelling, choice):
    """With the streams stored and replayed, in float32."""
    if choice == "cpu" and build.why_not(N, torch.float32) is not None:
        pytest.skip("no C++ here")
    model = perturb(Model(spelling), 0.3)
    exact = copy.deepcopy(model).double()
    wanted = outputs_and_gradients(exact, dict(exact.named_parameters()), (X,), {})
    options = {"inner": "aot_eager", "strict": False, "fusion": "boundary", "recompute": 1}
    with choosing(choice):
        compiled = torch.compile(model, backend="mhc", options=options)
        got = outputs_and_gradients(compiled, dict(model.named_parameters()), (X.float(),), {})
    assert len(mhc_compile.report(model).native) == 2
    out, gradient, where = gaps(wanted, got, 1e-4)
    assert out <= 1e-5
    assert gradient <= 1e-4, where


@pytest.mark.parametrize(
    ("spelling", "told"),
    [
        (eps_in_every_sum, "columns last, stored [out, in], eps 0, norm eps 1e-05, Sinkhorn's eps 1e-08 in every sum"),
        (eps_of_its_own, "eps 1e-06, norm eps 1e-05, Sinkhorn's eps 0.001 in the matrix and later sums"),
        (eps_behind_a_softmax, "eps 0, norm eps 1e-05, Sinkhorn's eps 0.0001 in later sums"),
        (eps_of_pre_alone, "eps 0.0001, norm eps 1e-06, no eps in Sinkhorn"),
    ],
)
def test_where_an_eps_is_is_told(spelling, told):
    native = mhc_compile.explain(Model(spelling).double(), X, config=MHCConfig(strict=False)).native
    assert len(native) == 2
    assert all(row.mathematics.endswith(told) for row in native), native


def detached_streams(site, x, branch):
    pre, post, res = site.coefficients(x.detach())
    return written(x, (pre.unsqueeze(-1) * x).sum(-2), post, res, branch)


def detached_coefficient(site, x, branch):
    pre, post, res = site.coefficients(x)
    return written(x, (pre.unsqueeze(-1) * x).sum(-2), post.detach(), res, branch)


def no_gradients(site, x, branch):
    with torch.no_grad():
        pre, post, res = site.coefficients(x)
    return written(x, (pre.unsqueeze(-1) * x).sum(-2), post, res, branch)


def eps_in_some_sums(site, x, branch):
    pre, post, _ = site.coefficients(x)
    res = site.logits(F.rms_norm(x.flatten(-2), (N * WIDTH,), None, 1e-6))[2].unflatten(-1, (N, N)).exp()
    for _ in range(ITERS):
        res = res / (res.sum(-2, keepdim=True) + 1e-6)
        res = res / res.sum(-1, keepdim=True)
    return written(x, (pre.unsqueeze(-1) * x).sum(-2), post, res, branch)


def changed_in_place(site, x, branch):
    pre, post, res = site.coefficients(x)
    post[..., :2].mul_(0.5)
    return written(x, (pre.unsqueeze(-1) * x).sum(-2), post, res, branch)


def far_clamp(site, x, branch):
    flat = x.flatten(-2)
    logits = site.logits(flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6))
    pre, post, res = (part.clamp(-300, 300) for part in logits)
    read = (pre.sigmoid().unsqueeze(-1) * x).sum(-2)
    return written(x, read, 2 * post.sigmoid(), sinkhorn(res.unflatten(-1, (N, N))), branch)


@pytest.mark.parametrize(
    ("spelling", "told"),
    [
        (detached_streams, "the gradient of pre differs by"),
        (detached_coefficient, "the gradient of the write differs by"),
        (no_gradients, "a part of it is computed without gradients"),
        (eps_in_some_sums, f"from sinkhorn, {ITERS} iterations, rows last"),
        (changed_in_place, "is changed in place"),
        (far_clamp, "chooses or clamps, and no number that was tried is beyond"),
    ],
)
def test_what_is_not_the_same_function_with_the_same_gradients_stays_and_is_told(spelling, told):
    model = perturb(Model(spelling), 0.3).double()
    parameters = dict(model.named_parameters())
    wanted = outputs_and_gradients(model, parameters, (X,), {})
    got = outputs_and_gradients(torch.compile(model, backend="mhc", options=STRICT_OFF), parameters, (X,), {})
    report = mhc_compile.report(model)
    assert not report.native
    details = [entry.detail for entry in report.rejected if "that the model carries itself" in entry.reason.value]
    assert len(details) == 2
    assert all(told in detail for detail in details), details
    assert max(gaps(wanted, got, 1e-4)[:2]) <= 1e-12


def normed_one_by_one(site, x, branch):
    """The mathematics of the package hyper-connections: a norm and a projection of each stream alone."""
    z = (F.normalize(x, dim=-1) * WIDTH**0.5) @ site.w[:6, :WIDTH].mT * site.scale[0]
    both = torch.cat([z[..., :1].sigmoid(), sinkhorn(z[..., 2:])], -1)
    mixed = torch.einsum("...st,...sd->...td", both, x)
    spread = torch.einsum("bts,btd->btsd", 2 * z[..., 1].sigmoid(), branch(mixed[..., 0, :]))
    return spread, mixed[..., 1:, :]


def summed(site, x, branch):
    spread, mixed = normed_one_by_one(site, x, branch)
    return spread + mixed


def summed_in_the_batch(site, x, branch):
    """Its layout, too: [batch · n, tokens, features]."""
    spread, mixed = (part.transpose(1, 2).flatten(0, 1) for part in normed_one_by_one(site, x, branch))
    return (spread + mixed).unflatten(0, (-1, N)).transpose(1, 2)


@pytest.mark.parametrize("spelling", [summed, summed_in_the_batch])
def test_other_streams_are_named_and_never_rewritten(spelling):
    """A site's write looks like a residual add; with `min_sites=1` it would be rewritten into streams of streams."""
    report = mhc_compile.explain(Model(spelling).double(), X, config=MHCConfig(min_sites=1, strict=False))
    assert not report.native
    assert not report.sites
    assert sum("streams that the model carries itself" in entry.reason.value for entry in report.rejected) == 2


def test_compiling_in_inference_mode():
    """Gradients are what tells the rows of each weight, also where there are none."""
    model = perturb(Model(flattened_tokens), 0.3).double()
    with torch.inference_mode():
        got = torch.compile(model, backend="mhc", options={"inner": "eager"})(X)
        torch.testing.assert_close(got, model(X))
    assert len(mhc_compile.report(model).native) == 2
