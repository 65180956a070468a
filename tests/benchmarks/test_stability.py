"""The stability benchmark: what counts as divergence, what a run leaves behind, and the gain of known matrices."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import stability
from benchmarks.record import Options

TINY = stability.Sweep((2, 4), (0.2,), blocks=3, width=8, batch=4, steps=3, rates=(1e-3,), seeds=(0,))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 64, generator=generator), torch.randint(10, (32,), generator=generator)


@pytest.fixture
def options():
    return Options("cpu", quick=True)


def test_divergence_is_not_finite_or_far_above_chance_for_some_steps():
    high = 3.1 * math.log(10.0)
    assert stability.diverged_at([2.3, 2.2]) is None
    assert stability.diverged_at([2.3, math.nan]) == 1
    assert stability.diverged_at([2.3, *[high] * 4]) is None
    assert stability.diverged_at([2.3, *[high] * 5]) == 1
    assert stability.diverged_at([*[high] * 4, 2.0]) is None


@pytest.mark.parametrize("kind", stability.KINDS)
def test_a_run_that_diverged_leaves_nothing_to_the_next(kind, data, options):
    trainer = stability.Trainer(kind, TINY, options)
    first = trainer.train(1e-3, 0, data)
    assert trainer.train(1e30, 1, data)["diverged_at"] is not None
    again = trainer.train(1e-3, 0, data)
    del first["seconds"], again["seconds"]
    assert first == again


def test_every_kind_starts_from_the_same_function(data, options):
    starts = [stability.Trainer(kind, TINY, options).train(1e-3, 0, data)["losses"][0] for kind in stability.KINDS]
    assert starts[1:] == pytest.approx(starts[:1] * 2, rel=1e-4)


def test_matrices_are_recorded_in_the_order_of_the_sites(data, options):
    trainer = stability.Trainer("none", TINY, options)
    with torch.no_grad():
        for index, (name, value) in enumerate(trainer.model.named_parameters()):
            if ".mhc." in name and name.endswith(".bias"):
                value[8:] = float(index)
    with stability.recorded_mixing() as matrices:
        trainer.compiled(data[0][:4])
    marks = [float(matrix[0, 0, 0]) for matrix in matrices]
    assert len(marks) == TINY.blocks
    assert marks == sorted(marks)
    assert len(set(marks)) == len(marks)


def test_unconstrained_gain_grows_and_constrained_does_not():
    grown, _ = stability.perturbed_gain("none", 40, 0.2, seed=0)
    held, held_backward = stability.perturbed_gain("sinkhorn", 40, 0.2, seed=0)
    assert grown[39] > 10.0 * grown[3]
    assert max(held) == pytest.approx(1.0, abs=1e-9)
    assert max(held_backward) < 1.1
    assert stability.perturbed_gain("identity", 5, 0.2, seed=0) == ([1.0] * 5, [1.0] * 5)
