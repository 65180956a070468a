"""Which operators `fusion="auto"` runs: the rules by device, the cost model, the table of measurements."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mhc_compile.kernels.costs import fusion_choice
from mhc_compile.kernels.costs.fusion_choice import FusionReason, choose_fusion, choose_on, site_seconds
from mhc_compile.kernels.costs.gpus import GPUS, LAUNCH_SECONDS
from mhc_compile.kernels.dispatch import choosing

from mhc_compile import MHCError


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")


def choose(tokens=8192, width=4096, n_streams=4, dtype=torch.bfloat16, device="cuda", **more):
    return choose_fusion(tokens, width, n_streams, dtype, device, **more)


def test_plain_pytorch_joins_nothing():
    with choosing("reference"):
        assert choose(device="cpu").reason is FusionReason.PLAIN_PYTORCH
    assert choose(device="meta").fusion == "site"


@pytest.mark.usefixtures("h200")
def test_what_the_kernels_do_not_cover_joins_nothing():
    assert choose(dtype=torch.float64).reason is FusionReason.PLAIN_PYTORCH
    assert choose(manifold="one of a user").reason is FusionReason.PLAIN_PYTORCH
    with choosing("reference"):
        assert choose().reason is FusionReason.PLAIN_PYTORCH


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [1, 64, 65, 8192, 100_000])
def test_four_streams_are_joined(tokens, training):
    choice = choose(tokens, training=training)
    assert choice.fusion == "boundary"
    assert choice.reason is FusionReason.PREDICTED
    assert f"{tokens} tokens of width 4096 on h200" in choice.detail


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("tokens", [1, 8192])
def test_five_streams_are_joined_too(tokens):
    assert choose(tokens, n_streams=5).fusion == "boundary"


def test_one_token_costs_its_launches():
    gpu = GPUS["h200"]
    seconds = {name: site_seconds(name, gpu, 1, 4096, 4, 2, False) for name in ("site", "boundary")}
    # Projection, coefficients and collapse; `post` is a fourth launch.
    assert 3 * LAUNCH_SECONDS < seconds["boundary"] < 4 * LAUNCH_SECONDS < seconds["site"] < 5 * LAUNCH_SECONDS


def row(tokens, site, boundary, **more):
    times = {"microseconds": {"site": site, "boundary": boundary}}
    same = {"gpu": "h200", "dtype": "bfloat16", "n_streams": 4, "width": 4096, "training": True}
    return {**same, "tokens": tokens, **times, **more}


@pytest.mark.usefixtures("h200")
def test_a_measurement_beats_the_model_within_its_reach(monkeypatch, tmp_path):
    file = tmp_path / "times.json"
    file.write_text(json.dumps([row(8192, 10.0, 20.0), row(1024, 30.0, 20.0), row(64, 1, 2, training=False)]))
    monkeypatch.setattr(fusion_choice, "TABLE", file)
    fusion_choice._table.cache_clear()
    try:
        near = choose(7000)
        assert (near.fusion, near.reason) == ("site", FusionReason.MEASURED)
        assert near.detail == "8192 tokens of width 4096 on h200: site 10 µs, boundary 20 µs a site"
        assert choose(1100).fusion == "boundary"
        for far in (choose(100_000), choose(64), choose(8192, 1024), choose(8192, n_streams=2)):
            assert far.reason is FusionReason.PREDICTED
    finally:
        fusion_choice._table.cache_clear()


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("text", ["", "[{", '{"gpu": "h200"}', '[{"gpu": "h200"}]', "[1, 2]", "\xff"])
def test_a_file_of_measurements_that_is_broken_is_named(monkeypatch, tmp_path, text):
    file = tmp_path / "times.json"
    file.write_text(text, encoding="latin-1")
    monkeypatch.setattr(fusion_choice, "TABLE", file)
    fusion_choice._table.cache_clear()
    with pytest.raises(MHCError, match=r"times\.json cannot be read"):
        choose(7000)


def test_an_unknown_gpu_is_said_to_be_guessed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 4090")
    choice = choose(table=[row(8192, 1.0, 2.0)])
    assert choice.fusion == "boundary"
    assert choice.detail.startswith("this GPU is not in the table; 8192 tokens of width 4096 on h100: ")


def test_the_benchmark_writes_rows_that_are_read(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    bench = importlib.import_module("benchmarks.fusion_choice")
    run = []
    for name, operator in bench.OPERATORS.items():
        counted = replace(
            operator,
            forward=lambda *arguments, name=name, call=operator.forward: run.append(name) or call(*arguments),
            backward=lambda *arguments, name=name, call=operator.backward: (
                run.append(f"{name}_backward") or call(*arguments)
            ),
        )
        monkeypatch.setitem(bench.OPERATORS, name, counted)
    rotated = []
    monkeypatch.setattr(bench, "copies_to_rotate", lambda size, device: rotated.append(size) or 2)
    monkeypatch.setattr(bench, "median_seconds", lambda calls, device, repeats: calls[0]() or 1e-3)
    shape = bench.Shape("post_pre", 3, 2, 8, torch.bfloat16)
    written = bench.measure_row(shape, "cpu", "h200", training=False, repeats=1)
    assert run == ["post", "pre", "post_pre"]
    # Two streams and a branch of eight channels, at least; there are two sets, of which one runs here.
    assert all(size > 3 * 3 * 8 * 2 for size in rotated)
    assert written["microseconds"] == {"site": 1000.0, "boundary": 1000.0}
    assert choose_on(GPUS["h200"], 3, 8, 2, torch.bfloat16, training=False, table=[written]).reason.name == "MEASURED"
    run.clear()
    bench.measure_row(shape, "cpu", "h200", training=True, repeats=1)
    # Each forward of both sets once for the gradients' shapes, then the site.
    assert run[-4:] == ["post_pre"] * 3 + ["post_pre_backward"]
    assert run[4:8] == ["post", "pre", "post_backward", "pre_backward"]
