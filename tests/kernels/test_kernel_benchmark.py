"""The benchmark checks before it measures, and divides by the least traffic."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return importlib.import_module("benchmarks.kernels")


@pytest.mark.usefixtures("kernels")
def test_a_wrong_kernel_is_reported(bench, monkeypatch, device):
    shape = bench.Shape("post", 3, 4, 40, torch.bfloat16)
    assert bench.check(shape, device) == []
    right = bench.OPERATORS["post"]
    wrong = dataclasses.replace(right, forward=lambda *tensors: right.forward(*tensors) * 1.02)
    monkeypatch.setitem(bench.OPERATORS, "post", wrong)
    assert [problem.split(" forward ")[1][:8] for problem in bench.check(shape, device)] == ["output 0"]


def test_least_traffic(bench):
    # Ten tokens of 100 channels in bfloat16, and in float32 20 coefficients a token and phi [24, 400]: (2n + 2) rows
    # forward and (3n + 3) backward for a boundary, coefficients in and out (and their gradients), phi and its gradient.
    boundary = bench.Shape("post_pre", 10, 4, 100, torch.bfloat16)
    phi = 24 * 400 * 4
    assert boundary.traffic(False) == 10 * (10 * 100 * 2 + 2 * 20 * 4) + phi
    assert boundary.traffic(True) == 10 * (15 * 100 * 2 + 3 * 20 * 4) + 2 * phi
    alone = bench.Shape("sinkhorn", 10, 4, 1, torch.float32)
    assert alone.traffic(False) == 10 * 2 * 16 * 4
