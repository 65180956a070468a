"""DDP and distributed checkpoints in two processes against one process, with perturbed mHC parameters."""

from __future__ import annotations

import pytest

from .launch import outcomes
from .replicated import DDP


@pytest.mark.parametrize("name", DDP)
def test_data_parallel_training_is_training_in_one_process(name: str) -> None:
    for outcome in outcomes("replicated"):
        assert outcome[name].get("loss", 1.0) <= 1e-6, outcome[name]
        assert outcome[name]["gradient"] <= 1e-5


def test_a_checkpoint_of_two_ranks_loads_on_two_and_on_one() -> None:
    for outcome in outcomes("replicated"):
        assert outcome["checkpointed"].get("on two ranks", 1.0) <= 1e-6, outcome["checkpointed"]
        assert outcome["checkpointed"]["on one"] <= 1e-6


def test_a_plain_checkpoint_loads_into_a_sharded_attached_model() -> None:
    for outcome in outcomes("replicated"):
        assert outcome["plain checkpoint"].get("difference", 1.0) <= 1e-6, outcome["plain checkpoint"]
