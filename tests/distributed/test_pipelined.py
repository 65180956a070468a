"""Pipelines of two processes against one process and one graph, with perturbed mHC parameters."""

from __future__ import annotations

import subprocess

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import MHCError, NotAttachedError, StreamCutError, distributed

from .launch import environment, outcomes, torchrun
from .pipelined import CASES, Part


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_trains_as_one_process(name: str) -> None:
    parameters = 0
    for outcome in outcomes("pipelined"):
        assert outcome[name].get("loss", 1.0) <= 1e-6, outcome[name]
        assert outcome[name]["gradient"] <= 1e-5
        parameters += outcome[name]["parameters"]
    assert parameters == 63


def test_a_stage_that_was_not_wrapped_ends_every_rank() -> None:
    done = subprocess.run(
        torchrun("failing", 2), env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "StreamCutError: the streams are lost before model.layers.2.mhc.self_attn" in done.stdout + done.stderr


def parts() -> list[Part]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, use_cache=False
    )
    model = LlamaForCausalLM(config)
    mhc_compile.attach(model, input_ids=torch.zeros(1, 4, dtype=torch.long))
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
    with pytest.raises(StreamCutError, match=r"has received \(2, 4, 8\) of torch.float32, and takes 4 streams"):
        last(torch.zeros(2, 4, 8))
    with pytest.raises(StreamCutError, match="as its first argument"):
        last(torch.zeros(2, 4, 32, dtype=torch.long))


def test_a_stage_needs_parameters() -> None:
    with pytest.raises(NotAttachedError, match="attach"):
        distributed.stage(nn.Linear(2, 2))
