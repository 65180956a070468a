"""The table of GPUs: how a row is found, and that one added from outside is enough."""

from __future__ import annotations

import pytest
import torch
from mhc_compile.kernels.costs.fusion_choice import FusionReason, choose_fusion
from mhc_compile.kernels.costs.gpus import GPU, GPUS, find_gpu, gpu_of_device

import mhc_compile
from mhc_compile.errors import MHCOptionError
from mhc_compile.reports.prediction import Workload
from tests.models import Stack, features


def test_gpus_are_found_by_name_and_by_device():
    assert find_gpu("H200") is GPUS["h200"]
    with pytest.raises(MHCOptionError, match=r"'h2000' is not known; known are a100, .*Did you mean h200\?"):
        find_gpu("h2000")
    names = {"NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 80GB HBM3": "h100", "AMD Instinct MI300X": "mi300x"}
    assert {name: gpu_of_device(name).name for name in names} == names
    assert gpu_of_device("Tesla V100") is None
    assert GPUS["h200"].matmul_rate(2) == 2 * GPUS["h200"].matmul_rate(4)


def test_a_gpu_from_outside_is_recognised_chosen_for_and_predicted_for(monkeypatch):
    monkeypatch.setitem(GPUS, "4090", GPU("4090", 1.008e12, 165e12, 0.90, 0.60, 3e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 4090")
    assert find_gpu("4090") is gpu_of_device(torch.cuda.get_device_name()) is GPUS["4090"]
    choice = choose_fusion(8192, 4096, 4, torch.bfloat16, "cuda")
    assert choice.reason is FusionReason.PREDICTED
    assert "8192 tokens of width 4096 on 4090: " in choice.detail
    slow, fast = (
        mhc_compile.explain(Stack(), features(), predict_for=Workload(tokens=4096, gpu=name)).prediction
        for name in ("4090", "h200")
    )
    assert slow.gpu == "4090"
    assert slow.fusions != fast.fusions
