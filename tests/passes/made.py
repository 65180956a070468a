"""A model whose forward is a function of its layers and the input: one kind of add each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WIDTH = 16


class Made(nn.Module):
    """Layers of width 16 and a forward that is given."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.gain = nn.Parameter(torch.rand(16) + 0.5)
        self.conv, self.conv2 = nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 3, padding=1)
        self.short = nn.Conv1d(16, 16, 1)
        self.batch_norm = nn.BatchNorm1d(16)
        self.small = nn.Linear(16, 4)
        self.table = nn.Embedding(32, 16)

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x * 1.0)
