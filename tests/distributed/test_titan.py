"""torchtitan's own parallelize and pipelining functions in two processes against one, with perturbed mHC parameters."""

from __future__ import annotations

import pytest

from .launch import outcomes

pytest.importorskip("torchtitan", reason="torchtitan 0.3.0 wants some forty packages: pip install torchtitan==0.3.0")

from .titan import EXACT, LAYERS


@pytest.mark.parametrize("name", EXACT)
def test_what_torchtitan_makes_trains_as_one_process(name: str) -> None:
    parameters = 0
    for outcome in outcomes("titan", launch="titan"):
        assert outcome[name].get("loss", 1.0) <= 1e-6, outcome[name]
        assert outcome[name]["gradient"] <= 1e-5
        parameters += outcome[name].get("parameters", 0)
    # Of a block: attention 2, feed-forward 3, two norms, 2 x 3 of mHC; then embedding, norm and head.
    assert name != "pipeline" or parameters == LAYERS * 13 + 3


def test_init_weights_resets_what_came_from_the_meta_device() -> None:
    for outcome in outcomes("titan", launch="titan"):
        assert outcome["from meta"] == {"equal": True, "finite": True}, outcome["from meta"]


def test_blocks_with_flex_attention_are_compiled_by_mhc() -> None:
    for outcome in outcomes("titan", launch="titan"):
        found = outcome["flex attention"]
        assert found.get("sites") == 2 * found.get("blocks", 0) > 0, found
        assert (found["attention"], found["compiled by"]) == (["FlexAttention"], ["mhc"])


def test_settings_that_mhc_cannot_do_are_refused() -> None:
    for outcome in outcomes("titan", launch="titan"):
        said = outcome["refused"]
        assert "set compile.enable" in said["off"]
        assert "leave it at 'inductor'" in said["named"]
        assert "set 'partial_dtensor'" in said["layouts"]
