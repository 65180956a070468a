"""FSDP2 in two processes against one process and one graph, with perturbed mHC parameters."""

from __future__ import annotations

import pytest

from .launch import outcomes
from .sharded import CASES, EXACT


@pytest.mark.parametrize("name", [*EXACT, "by block, selectively checkpointed"])
def test_sharded_training_is_training_in_one_process(name: str) -> None:
    for outcome in outcomes("sharded"):
        assert outcome[name].get("loss", 1.0) <= 1e-6, outcome[name]
        assert outcome[name]["gradient"] <= 1e-5


def test_parameters_stay_in_float32_under_a_bf16_policy() -> None:
    for outcome in outcomes("sharded"):
        assert outcome["stays in float32"].get("gradient", 1.0) <= 1e-5, outcome["stays in float32"]
        assert outcome["stays in float32"]["dtypes"] == ["torch.float32"]


def test_a_bf16_model_keeps_float32_parameters_in_a_group_of_their_own() -> None:
    for outcome in outcomes("sharded"):
        assert outcome["bf16 model"] == {"dtypes": ["torch.float32"], "finite": True}


def test_attached_on_meta_the_parameters_start_where_they_should() -> None:
    for outcome in outcomes("sharded"):
        assert outcome["from meta"] == {"equal": True}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("refuses bf16", "shard_parameters(model) before the first fully_shard"),
        ("attach late", "is sharded by fully_shard already"),
        ("never attached", "attach(model, example_input) on the whole model first"),
    ],
)
def test_what_would_be_wrong_is_refused_on_every_rank(name: str, said: str) -> None:
    for outcome in outcomes("sharded"):
        assert said in outcome[name]["error"]


def test_gradients_are_gathered_and_reduced_in_the_order_of_a_plain_model() -> None:
    for outcome in outcomes("sharded"):
        order = outcome["hooks in order"]
        assert order["plain"] == order["mhc"]
        assert order["plain"].count("post_backward block 1") == 1


def test_every_case_is_checked() -> None:
    checked = {*EXACT, "by block, selectively checkpointed", "stays in float32", "refuses bf16", "bf16 model"}
    assert set(CASES) == checked | {"from meta", "attach late", "never attached", "hooks in order"}
