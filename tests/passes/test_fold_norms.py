"""Norms folded into the operators in front of them: which are, and that the model computes what it did."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from mhc_compile.kernels import ops
from mhc_compile.kernels.dispatch import choosing
from torch import nn

import mhc_compile
from mhc_compile import MHCConfig
from mhc_compile.reports.prediction import Workload
from tests.models import CASES
from tests.perturbed import assert_exact, perturbed

WIDTH = 16
OPTIONS = {"fusion": "boundary", "inner": "aot_eager"}


class WrittenOut(nn.Module):
    """RMSNorm as transformers' models write it."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width) + 0.5), 1e-6

    def forward(self, hidden):
        dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + self.eps)
        return self.weight * hidden.to(dtype)


class WrittenOtherwise(WrittenOut):
    """Squares by a product, no cast, the weight before the last cast."""

    def forward(self, hidden):
        scale = (hidden * hidden).mean(dim=-1, keepdim=True).add(self.eps).rsqrt()
        return (hidden * scale * self.weight).to(hidden.dtype)


class AsGemma(WrittenOut):
    """The weight is an offset from 1, and all is float32 until one cast at the end."""

    def scaled(self, normed):
        return normed * (1.0 + self.weight.float())

    def forward(self, hidden):
        wide = hidden.float()
        return self.scaled(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(hidden)


class AsGemma4(AsGemma):
    """The root as a power, the weight as it is."""

    def forward(self, hidden):
        wide = hidden.float()
        normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + self.eps, -0.5)
        return (normed * self.weight.float()).type_as(hidden)


class Blocks(nn.Module):
    """Three pre-norm blocks; `branch(norm, linear, x)` is what each adds."""

    def __init__(self, norm, branch=None):
        super().__init__()
        self.norms = nn.ModuleList(norm() for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.branch = branch or (lambda norm, linear, x: linear(norm(x)))

    def forward(self, hidden):
        for norm, linear in zip(self.norms, self.linears, strict=True):
            hidden = hidden + self.branch(norm, linear, hidden)
        return hidden


@pytest.fixture
def called(monkeypatch):
    """Names of the operators that run, in order."""
    names, dispatch = [], ops.run

    def run(name, *arguments, **keywords):
        names.append(name)
        return dispatch(name, *arguments, **keywords)

    monkeypatch.setattr(ops, "run", run)
    return names


def _folded(model, called, hidden=None, choice="triton", **options):
    """Return how many sites run with a norm, and how many there are, in a forward without a backward."""
    hidden = torch.randn(2, 5, WIDTH) if hidden is None else hidden
    mhc_compile.attach(model, hidden, config=MHCConfig(min_sites=1, sinkhorn_iters=2))
    called.clear()
    with choosing(choice), torch.no_grad():
        torch.compile(model, backend="mhc", options={**OPTIONS, **options})(hidden)
    sites = [name for name in called if name.startswith(("pre", "post_pre"))]
    return sum(name.endswith("_norm") for name in sites), len(sites)


def _predicted(model, *inputs, config=None, **kwargs):
    """Return the same two numbers as `explain` foretells them, for a model that need not be attached."""
    config = MHCConfig(min_sites=1) if config is None else config
    found = mhc_compile.explain(model, *inputs, config=config, predict_for=Workload(), **kwargs).prediction
    return found.normed, found.sites


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "LayerNorm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "LayerNorm without either": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "written out": WrittenOut,
    "written otherwise": WrittenOtherwise,
    "as Gemma 4": AsGemma4,
}


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_every_spelling_is_folded_and_exact(kind, called):
    model = Blocks(NORMS[kind])
    assert _predicted(model, torch.randn(2, 5, WIDTH)) == (3, 3)
    for norm in model.norms:
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
    with choosing("triton"):
        assert_exact(
            model, (torch.randn(2, 5, WIDTH),), config=MHCConfig(min_sites=1, sinkhorn_iters=3), options=OPTIONS
        )
    assert called.count("post_pre_norm_backward") == 2
    assert not {"pre", "post_pre", "pre_backward", "post_pre_backward"} & {*called}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "gemma2"])
def test_models_compute_what_the_oracle_says(kind, called):
    case = CASES[kind]()
    model, inputs = case.build().eval(), case.inputs()
    for name, parameter in model.named_parameters():
        # Gemma's begin as zeros, Llama's as ones.
        if "norm" in name or "ln_" in name:
            nn.init.normal_(parameter)
    assert _predicted(model, **inputs) == (4, 4)
    with choosing("triton"):
        assert_exact(model, kwargs=inputs, config=MHCConfig(min_sites=1, sinkhorn_iters=3), options=OPTIONS)
    backward = [name for name in called if name.endswith("pre_norm_backward")]
    assert backward.count("post_pre_norm_backward") == 3
    assert backward.count("pre_norm_backward") == 1


def _other_reader(norm, linear, x):
    return linear(norm(x) * torch.sigmoid(x))


def _two_norms(norm, linear, x):
    return linear(norm(x) * F.rms_norm(x, (WIDTH,), eps=1e-5))


def _two_dimensions(norm, linear, x):
    return linear(F.layer_norm(x, (5, WIDTH)))


def _default_epsilon(norm, linear, x):
    return linear(F.rms_norm(x, (WIDTH,), norm.weight))


def _a_weight_of_the_data(norm, linear, x):
    return linear(F.rms_norm(x, (WIDTH,), torch.tanh(norm.weight + x.mean((0, 1))), 1e-5))


def _another_power(norm, linear, x):
    return linear(norm.weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)))


def _over_tokens(norm, linear, x):
    return linear(norm.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)))


def _a_statistic_that_is_read(norm, linear, x):
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return linear(norm.weight * (x * inverse) - inverse)


def _a_power_that_is_no_root(norm, linear, x):
    return linear(norm.weight * (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.25)))


def _integers(norm, linear, x):
    x = (3 * x).to(torch.int32)
    return linear(norm.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)))


def _rounded_between(norm, linear, x):
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return linear(norm.weight * (x * scale).to(torch.int32))


@pytest.mark.parametrize(
    "branch",
    [
        _other_reader, _two_norms, _two_dimensions, _default_epsilon, _a_weight_of_the_data, _another_power,
        _a_power_that_is_no_root, _over_tokens, _a_statistic_that_is_read, _integers, _rounded_between,
    ],
)  # fmt: skip
def test_what_is_no_norm_alone_stays(branch, called):
    model = Blocks(WrittenOut, branch)
    assert _predicted(model, torch.randn(2, 5, WIDTH)) == _folded(model, called) == (0, 3)


def test_what_is_left_out_is_not_foretold():
    model, hidden = Blocks(WrittenOut), torch.randn(2, 5, WIDTH)
    for changes in ({"disable_passes": "fold_norms"}, {"n_streams": 5}):
        assert _predicted(model, hidden, config=MHCConfig(min_sites=1, **changes)) == (0, 3)


def test_what_the_kernels_do_not_run_stays(called):
    assert _folded(Blocks(WrittenOut), called, choice="reference") == (0, 3)
    assert _folded(Blocks(WrittenOut), called, n_streams=4, disable_passes="fold_norms") == (0, 3)
    assert _folded(Blocks(WrittenOut).double(), called, torch.randn(2, 5, WIDTH).double()) == (0, 3)
    assert _folded(Blocks(WrittenOut), called, fusion="site") == (0, 3)


def test_a_norm_that_promotes_stays(called):
    # The product with a float32 weight is float32: not what the streams are.
    model = Blocks(WrittenOut, lambda norm, linear, x: linear(norm(x)).bfloat16())
    assert _folded(model, called, torch.randn(2, 5, WIDTH).bfloat16()) == (0, 3)


@pytest.mark.parametrize("norm", [WrittenOut, AsGemma])
def test_bfloat16_is_as_exact_as_the_unfolded_model(norm, called):
    """Errors against float64 of the outputs and of all gradients, with the pass and without."""
    torch.manual_seed(3)
    model, hidden = Blocks(norm), torch.randn(2, 6, WIDTH).bfloat16()
    mhc_compile.attach(model.bfloat16(), hidden, config=MHCConfig(min_sites=1, sinkhorn_iters=3))
    ours = mhc_compile.parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in ours.items()}
    with torch.no_grad():
        for name, value in perturbed(start, 0).items():
            ours[name].copy_(value)

    def run(model, hidden, **options):
        torch._dynamo.reset()
        model.zero_grad()
        out = torch.compile(model, backend="mhc", options={**OPTIONS, **options})(hidden)
        out.double().square().mean().backward()
        return [out.detach().double(), *(parameter.grad.double() for parameter in model.parameters())]

    with choosing("triton"):
        folded = run(model, hidden)
        assert "post_pre_norm" in called
        plain = run(model, hidden, disable_passes="fold_norms")
    assert "post_pre" in called
    truth = run(copy.deepcopy(model).double(), hidden.double())

    def error(found):
        gaps = [(got - true).abs().max() / true.abs().max() for got, true in zip(found, truth, strict=True)]
        return float(sum(gaps) / len(gaps))

    assert error(folded) <= 1.1 * error(plain)
    eps = torch.finfo(torch.bfloat16).eps
    assert (folded[0] - plain[0]).abs().max() <= 2 * eps * truth[0].abs().max()


def test_a_checkpointed_body_keeps_its_norm(called):
    def checkpointed(norm, linear, x):
        return torch.utils.checkpoint.checkpoint(lambda y: linear(norm(y)), x, use_reentrant=False)

    with torch.enable_grad():
        assert _folded(Blocks(WrittenOut, checkpointed), called) == (0, 3)


def test_the_normed_value_may_leave_the_graph(called):
    class Leaking(Blocks):
        def forward(self, hidden):
            first = self.norms[0](hidden)
            hidden = hidden + self.linears[0](first)
            return hidden + self.linears[1](self.norms[1](hidden)), operator.neg(first)

    assert _folded(Leaking(WrittenOut), called) == (2, 2)
