"""DTensor's tensor parallelism in two processes against one process, with perturbed mHC parameters."""

from __future__ import annotations

import pytest

from .launch import outcomes
from .parallel import EXACT, SHARDED_CASES


@pytest.mark.parametrize("name", EXACT)
def test_a_stream_on_a_mesh_is_the_stream_of_one_process(name: str) -> None:
    for outcome in outcomes("parallel"):
        assert outcome[name].get("loss", 1.0) <= 1e-6, outcome[name]
        assert outcome[name]["gradient"] <= 1e-5


@pytest.mark.parametrize("name", SHARDED_CASES)
def test_tensor_and_data_parallel_together(name: str) -> None:
    for outcome in outcomes("parallel", launch="parallel", ranks=4):
        assert outcome[name].get("loss", 1.0) <= 1e-6, outcome[name]
        assert outcome[name]["gradient"] <= 1e-5
