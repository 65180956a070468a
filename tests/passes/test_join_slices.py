"""Two sequences that travel apart and are joined in each block are one stream."""

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import MHCConfig

from ..models import WIDTH
from ..perturbed import assert_exact


class Single(nn.Module):
    """A block as Flux's single ones: joins two sequences, adds attention and MLP at once, and parts them again."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, text, image):
        cut = text.shape[1]
        joined = torch.cat([text, image], dim=1)
        normed = self.norm(joined)
        mixed = torch.cat([normed.softmax(1), torch.tanh(self.mlp(normed))], dim=2)
        joined = joined + self.out(mixed)
        return self.parted(joined, cut)

    def parted(self, joined, cut):
        return joined[:, :cut], joined[:, cut:]


class Swapped(Single):
    def parted(self, joined, cut):
        return joined[:, -cut:], joined[:, :-cut]


class Overlapping(Single):
    def parted(self, joined, cut):
        return joined[:, :cut], joined[:, cut - 1 :]


class Model(nn.Module):
    def __init__(self, block=Single):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.readout = nn.Linear(WIDTH, 3)

    def forward(self, text, image):
        text, image = self.stem(text), self.stem(image)
        for block in self.blocks:
            text, image = block(text, image)
        return self.readout(image)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, WIDTH, generator=generator), torch.randn(2, 5, WIDTH, generator=generator)


def test_blocks_that_part_and_join_are_one_chain():
    report = assert_exact(Model(), inputs(), config=MHCConfig(min_sites=1))
    assert [len(chain.sites) for chain in report.chains] == [3]


@pytest.mark.parametrize("block", [Swapped, Overlapping])
def test_what_is_put_together_otherwise_is_another_value(block):
    report = mhc_compile.explain(Model(block), *inputs(), min_sites=1)
    assert [len(chain.sites) for chain in report.chains] == [1, 1, 1]
