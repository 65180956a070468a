"""The table of manifolds: what is added to it from outside works, and the help texts say what is in it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mhc_compile.kernels.costs.gpus import GPUS
from mhc_compile.kernels.dispatch import covered
from mhc_compile.kernels.manifolds import MANIFOLDS, Manifold, is_built_in
from typer.testing import CliRunner

import mhc_compile
from mhc_compile.__main__ import app
from tests.models import QUICK, Stack, features

ROOT = Path(__file__).parents[2]


@pytest.fixture
def row_softmax(monkeypatch):
    """A manifold that another package might add: rows sum to 1, columns need not."""

    def project(logits, iters, eps):
        return torch.softmax(logits, -1)

    def project_backward(grad, logits, iters, eps):
        rows = torch.softmax(logits, -1)
        return rows * (grad - (grad * rows).sum(-1, keepdim=True))

    row = Manifold("softmax", project, project_backward, rest_bias=lambda n: 8 * torch.eye(n))
    monkeypatch.setitem(MANIFOLDS, "softmax", row)
    return row


@pytest.mark.parametrize("fusion", ["auto", "inductor"])
def test_a_manifold_from_outside_trains(row_softmax, fusion):
    model = Stack()
    plain = model(features())
    mhc_compile.attach(model, features(), config=mhc_compile.MHCConfig(manifold="softmax"))
    rewritten = torch.compile(model, backend="mhc", options={**QUICK, "fusion": fusion})(features())
    torch.testing.assert_close(rewritten, plain, rtol=1e-5, atol=1e-6)
    rewritten.sum().backward()
    bias = mhc_compile.parameters(model)["blocks.1.mhc.mlp.bias"]
    assert bias.grad[8:].abs().max() > 0


def test_kernels_cover_the_manifolds_of_the_table_alone(row_softmax, monkeypatch):
    streams = (torch.zeros(1, 4, 8),)
    assert not covered(streams, 4, "softmax")
    assert all(covered(streams, 4, name) for name in ("sinkhorn", "none", "identity"))
    monkeypatch.setitem(MANIFOLDS, "sinkhorn", replace(MANIFOLDS["sinkhorn"], project=row_softmax.project))
    assert not covered(streams, 4, "sinkhorn")


def test_a_name_registered_anew_is_not_built_in(row_softmax, monkeypatch):
    assert is_built_in("sinkhorn")
    assert not is_built_in("softmax")
    monkeypatch.setitem(MANIFOLDS, "sinkhorn", replace(MANIFOLDS["sinkhorn"], gated=False))
    assert not is_built_in("sinkhorn")


@pytest.mark.parametrize("name", ["sinkhorn", "none", "identity", "permutation", "kronecker", "row"])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_exact_rows_sum_to_one(name, eps):
    manifold = MANIFOLDS[name]
    rest = manifold.rest_bias(4).double()
    logits = torch.randn(50, *rest.shape, dtype=torch.float64) if manifold.mixes else rest
    off = (manifold.project(logits, 20, eps).sum(-1) - 1).abs().max()
    assert (off < 1e-14) == manifold.rows_are_exact(eps)


@pytest.mark.parametrize(
    ("name", "n"),
    [("permutation", 2), ("permutation", 3), ("permutation", 4), *(("kronecker", n) for n in (2, 4, 8)), ("row", 4)],
)
def test_the_derivative_is_that_of_autograd(name, n):
    manifold = MANIFOLDS[name]
    rest = manifold.rest_bias(n).double()
    logits = torch.randn(5, *rest.shape, dtype=torch.float64, requires_grad=True)
    res = manifold.project(logits, 1, 0.0)
    assert res.shape == (5, n, n)
    grad = torch.randn_like(res)
    (wanted,) = torch.autograd.grad(res, logits, grad)
    torch.testing.assert_close(manifold.project_backward(grad, logits.detach(), 1, 0.0), wanted)


@pytest.mark.parametrize(("name", "n"), [("permutation", 4), ("kronecker", 4), ("kronecker", 8)])
def test_both_marginals_are_exact(name, n):
    manifold = MANIFOLDS[name]
    res = manifold.project(3 * torch.randn(50, *manifold.rest_bias(n).shape, dtype=torch.float64), 1, 0.0)
    for dim in (-1, -2):
        torch.testing.assert_close(res.sum(dim), torch.ones(50, n, dtype=torch.float64), rtol=0, atol=1e-14)


def test_permutations_and_factors_by_hand():
    weights = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0, 0.0]).clamp_min(1e-30).log()
    res = MANIFOLDS["permutation"].project(weights, 1, 0.0)
    # In order: (0 1 2), (0 2 1), (1 0 2): output 1 takes .5 of stream 1, .3 of stream 2, .2 of stream 0.
    torch.testing.assert_close(res, torch.tensor([[0.8, 0.2, 0.0], [0.2, 0.5, 0.3], [0.0, 0.3, 0.7]]))
    slow, fast = torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    logits = torch.tensor([0.9, 0.6]).logit()
    torch.testing.assert_close(MANIFOLDS["kronecker"].project(logits, 1, 0.0), torch.kron(slow, fast))


@pytest.mark.parametrize(
    ("name", "n", "fusion"), [("permutation", 3, "inductor"), ("kronecker", 4, "auto"), ("row", 4, "auto")]
)
def test_a_model_starts_as_it_was_and_learns(name, n, fusion):
    model = Stack()
    plain = model(features())
    mhc_compile.attach(model, features(), config=mhc_compile.MHCConfig(manifold=name, n_streams=n))
    compiled = torch.compile(model, backend="mhc", options={**QUICK, "fusion": fusion})
    assert torch.equal(compiled(features()), plain)
    # At the start streams are equal, and no matrix whose rows sum to 1 has a gradient.
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    compiled(features()).square().sum().backward()
    bias = mhc_compile.parameters(model)["blocks.1.mhc.mlp.bias"]
    assert bias.grad[2 * n :].abs().max() > 0
    res = MANIFOLDS[name].project(MANIFOLDS[name].rest_bias(n), 20, 0.0)
    assert res.diagonal().min() > 0.998


@pytest.mark.parametrize(("name", "n"), [("permutation", 5), ("kronecker", 3)])
def test_a_number_of_streams_that_a_manifold_has_not_is_an_error(name, n):
    with pytest.raises(mhc_compile.MHCOptionError, match=f"n_streams={n}: the manifold '{name}' is defined for 2, "):
        mhc_compile.MHCConfig(manifold=name, n_streams=n)


def test_a_manifold_counts_what_it_projects():
    # 20 iterations over 16 entries: exp, and a sum and a division over columns and over rows.
    assert MANIFOLDS["sinkhorn"].flops(4, 20) == 16 * (4 * 20 + 1)
    assert MANIFOLDS["none"].flops(4, 20) == 0


def test_help_texts_say_what_the_tables_say():
    shown = CliRunner().invoke(app, ["explain", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    words = set(re.findall(r"\w+", shown))
    assert set(GPUS) <= words
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, manifold in MANIFOLDS.items():
        assert name in words
        assert f'"{name}" ({manifold.help}' in mhc_compile.MHCConfig.__doc__
        assert f'`"{name}"`: {manifold.help}' in readme


def test_tables_for_help_texts_load_without_torch():
    program = "import sys, mhc_compile.__main__; assert not {'torch', 'sympy', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
