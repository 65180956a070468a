"""The kernel benchmark checks before it measures, and divides by the least traffic."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import implementations, kernels, problems
from benchmarks.problems import OPERATORS, Shape
from benchmarks.record import Options, Record


@pytest.fixture
def shape():
    return Shape("post", 3, 4, 40, torch.bfloat16)


def wrong(monkeypatch, name, factor=1.02):
    right = OPERATORS[name]
    broken = dataclasses.replace(right, forward=lambda *tensors: right.forward(*tensors) * factor)
    monkeypatch.setitem(OPERATORS, name, broken)


def test_a_wrong_kernel_is_reported(shape, monkeypatch):
    assert problems.check(shape, "cpu") == []
    wrong(monkeypatch, "post")
    (problem,) = problems.check(shape, "cpu")
    assert "forward, output 0 errs by" in problem


def test_a_result_that_is_not_a_number_is_wrong(shape, monkeypatch):
    wrong(monkeypatch, "post", float("nan"))
    assert problems.check(shape, "cpu")


def test_what_fails_its_check_is_not_measured(monkeypatch, tmp_path):
    wrong(monkeypatch, "post")
    monkeypatch.setattr(kernels, "shapes_to_check", lambda quick, device: [Shape("post", 3, 4, 40, torch.bfloat16)])
    measured = [Shape(name, 3, 4, 40, torch.bfloat16) for name in ("post", "head")]
    monkeypatch.setattr(kernels, "shapes_to_measure", lambda quick, device: measured)
    record = Record("kernels", tmp_path / "kernels.json")
    kernels.run(Options("cpu", quick=True), record)
    assert [row["operator"] for row in record.content["rows"]] == ["head"]
    assert [entry["why"] for entry in record.content["skipped"]] == ["its check failed"]
    assert record.content["facts"]["failed_operators"] == ["post"]


@pytest.mark.parametrize("name", ["boundary", "site", "paper"])
def test_every_fusion_implements_a_boundary(name):
    shape = Shape("post_pre", 5, 4, 24, torch.bfloat16)
    assert implementations.problems_of(implementations.implementations_of("post_pre")[name], shape, "cpu") == []


def test_an_implementation_with_a_wrong_gradient_is_reported():
    def detached(streams, branch, post, res):
        return OPERATORS["post"].forward(streams, branch, post, res.detach() + 0.0 * res)

    found = implementations.problems_of(detached, Shape("post", 5, 4, 24, torch.float32), "cpu")
    assert [problem.split(" errs")[0] for problem in found] == ["gradient 3"]


def test_least_traffic():
    # Ten tokens of 100 channels in bfloat16, and in float32 20 coefficients a token and phi [24, 400]: (2n + 2) rows
    # forward and (3n + 3) backward for a boundary, coefficients in and out (and their gradients), 25 floats of the
    # projection, phi and its gradient.
    boundary = Shape("post_pre", 10, 4, 100, torch.bfloat16)
    phi = 24 * 400 * 4
    assert boundary.traffic(False) == 10 * (10 * 100 * 2 + (2 * 20 + 25) * 4) + phi
    assert boundary.traffic(True) == 10 * (15 * 100 * 2 + (3 * 20 + 25) * 4) + 2 * phi
    alone = Shape("sinkhorn", 10, 4, 1, torch.float32)
    assert alone.traffic(False) == 10 * 2 * 16 * 4
