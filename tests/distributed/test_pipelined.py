"""Pipelines of two processes against one process and one graph, with perturbed mHC parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mhc_compile import MHCError, NotAttachedError, StreamCutError, distributed

from .launch import outcomes, output
from .models import WIDTH, as_attached
from .pipelined import LAYERS, SCHEDULES, WHOLE, Part


def check(found: list[dict[str, Any]], parameters: int) -> None:
    for outcome in found:
        assert outcome.get("loss", 1.0) <= 1e-6, outcome
        assert outcome["gradient"] <= 1e-5
    assert sum(outcome["parameters"] for outcome in found) == parameters


# Of a block: attention 4, MLP 2 (of a Llama 3), two norms, 2 x 3 of mHC; then embedding, norm and head.
@pytest.mark.parametrize(("name", "parameters"), zip(WHOLE, (2 * 15 + 3, LAYERS * 14 + 3), strict=True))
def test_a_pipeline_trains_as_one_process(name: str, parameters: int) -> None:
    check([outcome[name] for outcome in outcomes("pipelined")], parameters)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_of_blocks_compiled_alone_trains_as_one_process(schedule: str) -> None:
    found = [outcome["by block"] for outcome in outcomes("pipelined")]
    check([outcome.get(schedule, outcome) for outcome in found], LAYERS * 14 + 3)


def test_a_stage_that_was_not_wrapped_ends_every_rank() -> None:
    said = output()
    assert "StreamCutError: the streams are lost before blocks.2.mhc.attention" in said
    assert "together ended with status 1" in said


def parts() -> list[Part]:
    model = as_attached(4)
    return [Part(model, range(2)), Part(model, range(2, 4))]


def test_names_stay_and_a_stage_is_made_once() -> None:
    first, _ = parts()
    names = list(first.state_dict())
    assert distributed.stage(first) is first
    assert list(first.state_dict()) == names
    with pytest.raises(MHCError, match="is a stage already"):
        distributed.stage(first)


def test_what_arrives_is_checked() -> None:
    _, last = parts()
    distributed.stage(last)
    with pytest.raises(StreamCutError, match=r"has received \(2, 4, 32\) of torch.float32, and takes 4 streams"):
        last(torch.zeros(2, 4, WIDTH))
    with pytest.raises(StreamCutError, match="as its first argument"):
        last(torch.zeros(2, 4, 4 * WIDTH, dtype=torch.long))


def test_a_stage_needs_parameters() -> None:
    with pytest.raises(NotAttachedError, match="attach"):
        distributed.stage(nn.Linear(2, 2))
