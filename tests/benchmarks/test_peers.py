"""Other packages' layouts map onto ours, and an operator that is not the same one is noticed."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from mhc_compile.kernels import reference

from benchmarks import adapters, peers
from benchmarks.problems import Shape
from benchmarks.record import Options, Record

LIGER, TILE = adapters.ADAPTERS


def rows_then_columns(logits, repeat, eps):
    """The iteration as both packages run it: the last axis first."""
    matrix = logits.softmax(-1)
    matrix = matrix / matrix.sum(-2, keepdim=True)
    for _ in range(repeat - 1):
        matrix = matrix / matrix.sum(-1, keepdim=True)
        matrix = matrix / matrix.sum(-2, keepdim=True)
    return matrix


def gates(streams, phi, scales, bias, norm_eps):
    """pre [*, n], post [*, n] and the logits [*, n, n] that phi [rows, n·C] gives, row-major."""
    n = streams.shape[-2]
    flat = streams.flatten(-2).float()
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    first, second, third = (normed @ phi.float().mT).split((n, n, n * n), dim=-1)
    biases = bias.split((n, n, n * n))
    pre = torch.sigmoid(first * scales[0] + biases[0])
    post = 2.0 * torch.sigmoid(second * scales[1] + biases[1])
    return pre, post, (third * scales[2] + biases[2]).unflatten(-1, (n, n))


def collapse(streams, pre):
    return (pre.unsqueeze(-1) * streams.float()).sum(-2).to(streams.dtype)


@pytest.fixture
def liger(monkeypatch):
    """A stand-in with liger-kernel's layouts: phi [n·C, rows], scalar scales, res [out, in]."""

    def coeffs(streams, phi, bias, first, second, third, *, tmax, rms_eps, **rest):
        assert (rest["pre_eps"], rest["sinkhorn_eps"], rest["post_mult"]) == (0.0, 0.0, 2.0)
        pre, post, logits = gates(streams, phi.mT, (first, second, third), bias, rms_eps)
        return pre, post, rows_then_columns(logits, tmax, 0.0)

    module = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_mhc_coeffs = coeffs
    module.liger_mhc_pre = collapse
    module.liger_mhc_post_res = reference.post
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def tile(monkeypatch):
    """A stand-in with tile-kernels' layouts: [batch, tokens, n, C], post [*, n, 1], comb [in, out]."""

    def mhc_pre(streams, phi, scale, bias, *, norm_eps, sinkhorn_repeat, mhc_mult, **rest):
        assert streams.dim() == 4
        assert (rest["pre_eps"], rest["sinkhorn_eps"], rest["post_mult_value"]) == (0.0, 0.0, 2.0)
        pre, post, logits = gates(streams, phi, scale, bias, norm_eps)
        return collapse(streams, pre), (post.unsqueeze(-1), rows_then_columns(logits, sinkhorn_repeat, 0.0))

    def mhc_post(branch, streams, post, comb):
        mixed = torch.einsum("btio,btic->btoc", comb, streams.float())
        return (mixed + post * branch.float().unsqueeze(-2)).to(streams.dtype)

    module = types.ModuleType("tile_kernels.modeling.mhc.functional")
    module.mhc_pre, module.mhc_post = mhc_pre, mhc_post
    module.sinkhorn_normalize = lambda logits, repeat, eps: rows_then_columns(logits, repeat, eps)
    for name in ("tile_kernels", "tile_kernels.modeling", "tile_kernels.modeling.mhc"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def error(adapter, operator):
    return peers.largest_error(adapter, Shape(operator, 6, 4, 24, torch.float32, anchored=False), "cpu")


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("operator", LIGER.operators)
def test_liger_computes_our_operator(operator):
    assert error(LIGER, operator) < 1e-5


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("operator", TILE.operators)
def test_tile_kernels_computes_our_operator(operator):
    assert error(TILE, operator) < 1e-5


@pytest.mark.usefixtures("liger", "tile")
@pytest.mark.parametrize("adapter", [LIGER, TILE], ids=lambda adapter: adapter.name)
def test_a_wrong_orientation_is_far_beyond_the_tolerance(adapter, monkeypatch):
    monkeypatch.setattr(adapters, "transposed_mapping", lambda phi, bias, n: (phi, bias))
    assert error(adapter, "pre") > 3.0 * peers._TOLERANCE


@pytest.mark.usefixtures("liger")
def test_another_function_is_flagged_and_not_hidden(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "can_run", lambda *_: None)
    record = Record("peers", tmp_path / "peers.json")
    shape = Shape("pre", 6, 4, 24, torch.float32, anchored=False)
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr(adapters, "transposed_mapping", lambda phi, bias, n: (phi, bias))
        peers.compare(shape, LIGER, Options("cpu"), record, 1.0, 1)
    record.content["facts"] = {"tolerance": 0.03}
    (table,) = peers.tables(record.content)
    assert [row[1] for row in table.rows] == ["liger-kernel", "liger-kernel ✗"]


def test_what_a_package_cannot_take_is_named():
    wide = Shape("pre", 8, 4, 4096, torch.bfloat16)
    assert LIGER.refuses(wide) is None
    assert TILE.refuses(wide) is None
    assert "powers of two" in LIGER.refuses(Shape("pre", 8, 3, 4096, torch.bfloat16))
    for shape in (Shape("pre", 8, 4, 4000, torch.bfloat16), Shape("pre", 8, 4, 4096, torch.float16)):
        assert "multiples of 256" in TILE.refuses(shape)
