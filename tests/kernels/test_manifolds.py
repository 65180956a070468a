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

    row = Manifold("row", project, project_backward, rest_bias=lambda n: 8 * torch.eye(n))
    monkeypatch.setitem(MANIFOLDS, "row", row)
    return row


@pytest.mark.parametrize("fusion", ["auto", "inductor"])
def test_a_manifold_from_outside_trains(row_softmax, fusion):
    model = Stack()
    plain = model(features())
    mhc_compile.attach(model, features(), config=mhc_compile.MHCConfig(manifold="row"))
    rewritten = torch.compile(model, backend="mhc", options={**QUICK, "fusion": fusion})(features())
    torch.testing.assert_close(rewritten, plain, rtol=1e-5, atol=1e-6)
    rewritten.sum().backward()
    bias = mhc_compile.parameters(model)["blocks.1.mhc.mlp.bias"]
    assert bias.grad[8:].abs().max() > 0


def test_kernels_cover_the_manifolds_of_the_table_alone(row_softmax, monkeypatch):
    streams = (torch.zeros(1, 4, 8),)
    assert not covered(streams, 4, "row")
    assert all(covered(streams, 4, name) for name in ("sinkhorn", "none", "identity"))
    monkeypatch.setitem(MANIFOLDS, "sinkhorn", replace(MANIFOLDS["sinkhorn"], project=row_softmax.project))
    assert not covered(streams, 4, "sinkhorn")


def test_a_name_registered_anew_is_not_built_in(row_softmax, monkeypatch):
    assert is_built_in("sinkhorn")
    assert not is_built_in("row")
    monkeypatch.setitem(MANIFOLDS, "sinkhorn", replace(MANIFOLDS["sinkhorn"], gated=False))
    assert not is_built_in("sinkhorn")


@pytest.mark.parametrize("name", ["sinkhorn", "none", "identity"])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_exact_rows_sum_to_one(name, eps):
    manifold = MANIFOLDS[name]
    logits = torch.randn(50, 4, 4, dtype=torch.float64) if manifold.mixes else torch.eye(4, dtype=torch.float64)
    off = (manifold.project(logits, 20, eps).sum(-1) - 1).abs().max()
    assert (off < 1e-14) == manifold.rows_are_exact(eps)


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
