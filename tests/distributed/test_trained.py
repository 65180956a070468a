"""Hugging Face's Trainer and accelerate in two processes against a plain loop in one, with perturbed mHC parameters."""

from __future__ import annotations

import pytest

from .launch import outcomes
from .trained import CASES


@pytest.mark.parametrize("name", CASES)
def test_training_in_two_processes_is_training_in_one(name: str) -> None:
    for outcome in outcomes("trained"):
        assert outcome[name].get("loss", 1.0) <= 1e-6, outcome[name]
        assert outcome[name]["apart"] <= 3e-6
        assert outcome[name]["moved"] >= 0.1


@pytest.mark.parametrize("name", ["Trainer", "accelerate"])
def test_gradients_were_reduced_in_several_buckets(name: str) -> None:
    for outcome in outcomes("trained"):
        assert outcome[name]["buckets"] > 2


def test_accelerate_has_sharded_every_parameter() -> None:
    for outcome in outcomes("trained"):
        assert outcome["accelerate, FSDP2"]["sharded"]
