"""Kinds of models beyond a plain stack, written small: which of their adds are residual, and that they are rewritten
exactly, at the start (against the plain model) and away from it (against the oracle)."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mhc_compile
from mhc_compile import MHCConfig

from .models import WIDTH, Block, Stack, features
from .perturbed import assert_exact


def _sequences(batch=2, length=6):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


def _attended(value, mask=None):
    """Mix tokens, without weights."""
    scores = value @ value.transpose(-1, -2) / WIDTH**0.5
    return torch.softmax(scores if mask is None else scores + mask, -1) @ value


class RecurrentDepth(Stack):
    """One block called in a loop, under `no_grad` for its first rounds."""

    def forward(self, values):
        hidden = self.stem(values)
        with torch.no_grad():
            for _ in range(2):
                hidden = self.blocks[0](hidden)
        for _ in range(2):
            hidden = self.blocks[0](hidden)
        return self.readout(hidden)


class RecurrentDepthWithInput(RecurrentDepth):
    """As above; each round also reads the embedded input, through an adapter."""

    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, values):
        embedded = self.stem(values)
        hidden = embedded
        for step in range(3):
            with torch.set_grad_enabled(step > 0):
                hidden = self.blocks[0](self.adapter(torch.cat([hidden, embedded], -1)))
        return self.readout(hidden)


class MixtureOfDepths(Stack):
    """A router picks tokens; only they pass the second block, and return weighted."""

    def __init__(self):
        super().__init__(3)
        self.router = nn.Linear(WIDTH, 1)

    def forward(self, values):
        hidden = self.blocks[0](self.stem(values))
        weights, chosen = self.router(hidden).squeeze(-1).topk(3, dim=-1)
        index = chosen.unsqueeze(-1).expand(-1, -1, WIDTH)
        passed = self.blocks[1](hidden.gather(1, index))
        hidden = hidden.scatter(1, index, torch.sigmoid(weights).unsqueeze(-1) * passed)
        return self.readout(self.blocks[2](hidden))


class Highway(Stack):
    """Skip and branch share a gate that depends on data: no carrier, since it mixes features."""

    def forward(self, values):
        hidden = self.blocks[0](self.stem(values))
        gate = torch.sigmoid(self.blocks[1].mixer(hidden))
        hidden = hidden * (1 - gate) + torch.tanh(self.blocks[1].mlp(hidden)) * gate
        return self.readout(self.blocks[0](hidden))


class ScaledSkips(Stack):
    """Each skip is scaled by a learned vector; inside the branches, one that feeds a layer's input to its output."""

    def __init__(self):
        super().__init__()
        self.keep = nn.ParameterList(0.5 + torch.rand(WIDTH) for _ in range(4))

    def forward(self, values):
        hidden = self.stem(values)
        for index, block in enumerate(self.blocks):
            inner = F.silu(block.mixer(block.norm1(hidden)))
            hidden = self.keep[index] * hidden + block.mlp(_attended(inner) + self.keep[index + 2] * inner)
        return self.readout(self.keep[3] * hidden + torch.tanh(self.blocks[0].mlp(hidden)))


class SuperResolution(nn.Module):
    """Residual blocks inside residual groups, a convolution behind each, a skip around all, then an upsampling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(11))
        self.up = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, image):
        convs = iter(self.convs)
        first = hidden = self.stem(image)
        for _ in range(2):
            group = hidden
            for _ in range(2):
                hidden = hidden + next(convs)(torch.relu(next(convs)(hidden)))
            hidden = group + next(convs)(hidden)
        return self.up(first + next(convs)(hidden))


class TwoStreams(Stack):
    """A decoder with a content and a query stream; both attend to the content, with a computed bias on the scores."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Linear(WIDTH, 6)
        self.query = nn.Parameter(torch.rand(WIDTH))

    def forward(self, values):
        content = self.stem(values)
        query = torch.zeros_like(content) + self.query
        mask = torch.full((6, 6), -1e4).triu(1)
        for block in self.blocks:
            bias = self.bias(block.norm2(content)) + mask
            keys, asked = block.norm1(content), block.norm1(query)
            scores = asked @ keys.transpose(-1, -2) + bias
            query = query + block.mixer(torch.softmax(scores, -1) @ keys)
            scores = keys @ keys.transpose(-1, -2) + bias
            content = content + block.mixer(torch.softmax(scores, -1) @ keys)
            query = query + torch.tanh(block.mlp(block.norm2(query)))
            content = content + torch.tanh(block.mlp(block.norm2(content)))
        return self.readout(query), self.readout(content)


class ResidualScores(Stack):
    """Attention scores are handed from layer to layer and summed: a stream of scores is none of hidden states."""

    def forward(self, values):
        hidden = self.stem(values)
        scores = torch.zeros(values.shape[0], 6, 6, dtype=hidden.dtype)
        for block in self.blocks:
            normed = block.norm1(hidden)
            scores = scores + normed @ block.mixer(normed).transpose(-1, -2)
            hidden = hidden + torch.softmax(scores, -1) @ normed
            hidden = hidden + torch.tanh(block.mlp(block.norm2(hidden)))
        return self.readout(hidden)


class Graph(Stack):
    """Messages along edges, gathered and summed."""

    def forward(self, values):
        source, target = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 2])
        hidden = self.stem(values)
        for block in self.blocks:
            messages = torch.relu(block.mixer(torch.cat([hidden[source], hidden[target]], -1)[:, ::2]))
            hidden = hidden + torch.zeros_like(hidden).index_add(0, target, messages)
            hidden = block.norm2(hidden + block.mlp(hidden))
        return self.readout(hidden)


class Diffusion(Stack):
    """Shift, scale and gate of each branch come from a condition."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.ModuleList(nn.Linear(WIDTH, 6 * WIDTH) for _ in range(2))

    def forward(self, values):
        hidden = self.stem(values)
        condition = F.silu(self.stem(values.mean(1)))
        for block, modulation in zip(self.blocks, self.modulation, strict=True):
            shift, scale, gate, shift2, scale2, gate2 = modulation(condition)[:, None].chunk(6, -1)
            hidden = hidden + gate * block.mixer(_attended(block.norm1(hidden) * (1 + scale) + shift))
            hidden = hidden + gate2 * torch.tanh(block.mlp(block.norm2(hidden) * (1 + scale2) + shift2))
        return self.readout(hidden)


class StateSpaceHybrid(Stack):
    """A recurrence and a linear attention with decay, step by step, then attention."""

    def forward(self, values):
        hidden = self.stem(values)
        for block in self.blocks:
            inner = block.mixer(block.norm1(hidden))
            decay = torch.sigmoid(block.mlp(inner))
            state, outputs = torch.zeros_like(inner[:, 0]), []
            for step in range(values.shape[1]):
                state = decay[:, step] * state + inner[:, step]
                outputs.append(state)
            hidden = hidden + block.mixer(torch.stack(outputs, 1))
            keys = block.norm2(hidden)
            memory, outputs = torch.zeros(values.shape[0], WIDTH, WIDTH, dtype=hidden.dtype), []
            for step in range(values.shape[1]):
                memory = 0.9 * memory + keys[:, step, :, None] * inner[:, step, None, :]
                outputs.append((keys[:, step, None] @ memory)[:, 0])
            hidden = hidden + torch.stack(outputs, 1)
            hidden = hidden + torch.tanh(block.mlp(_attended(block.norm2(hidden))))
        return self.readout(hidden)


class TwoTowers(nn.Module):
    """Two towers, one of which then reads the other."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        self.stems = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.cross = nn.Linear(WIDTH, WIDTH)

    def forward(self, values):
        left, right = self.stems[0](values), self.stems[1](values.flip(1))
        for one, other in zip(self.left, self.right, strict=True):
            left, right = one(left), other(right)
        scores = torch.softmax(self.cross(left) @ right.transpose(-1, -2), -1)
        left = left + scores @ right
        return F.normalize(left.mean(1), dim=-1) @ F.normalize(right.mean(1), dim=-1).T


# (model, input, lengths of its chains)
KINDS = {
    "recurrent depth": (RecurrentDepth, features, [8]),
    "recurrent depth that reads its input again": (RecurrentDepthWithInput, features, [2, 2, 2]),
    "mixture of depths": (MixtureOfDepths, _sequences, [2, 2, 2]),
    "highway": (Highway, features, [2, 2]),
    "scaled skips": (ScaledSkips, _sequences, [3]),
    "super-resolution": (SuperResolution, lambda: torch.rand(2, 3, 6, 6), [1, 2, 2, 2]),
    "two streams of a decoder": (TwoStreams, _sequences, [4, 4]),
    "residual attention scores": (ResidualScores, _sequences, [4]),
    "graph": (Graph, features, [4]),
    "diffusion": (Diffusion, _sequences, [4]),
    "state-space hybrid": (StateSpaceHybrid, lambda: _sequences(length=3), [6]),
    "two towers": (TwoTowers, _sequences, [4, 5]),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_kinds(kind):
    build, inputs, chains = KINDS[kind]
    config = MHCConfig(n_streams=3, min_sites=1)
    report = assert_exact(
        build(), (inputs(),), config=config, options={"inner": "eager"}, seeds=(None, 0, 1), double=True
    )
    assert sorted(len(chain.sites) for chain in report.chains) == chains, str(report)


CONFIG = MHCConfig(n_streams=3, min_sites=1, sinkhorn_iters=3)


@functools.cache
def _recurrent_depth():
    """Return a model in float64 with mHC parameters, and what `assert_exact` needs of it."""
    torch.manual_seed(0)
    model = RecurrentDepth().double()
    plain = copy.deepcopy(model)
    return model, (plain, mhc_compile.attach(model, features().double(), config=CONFIG))


@pytest.mark.parametrize(
    ("fusion", "recompute"),
    [(fusion, recompute) for fusion in ("site", "boundary") for recompute in ("none", 1, "auto")] + [("inductor", 1)],
)
def test_a_stream_out_of_no_grad_loses_no_gradient(fusion, recompute):
    """A `post` in the last frozen round and a `pre` in the first trained one may not become one operator."""
    options = {"fusion": fusion, "recompute": recompute}
    model, attached = _recurrent_depth()
    assert_exact(
        copy.deepcopy(model), (features(),), config=CONFIG, options=options, seeds=(None, 0), double=True,
        attached=attached,
    )  # fmt: skip
