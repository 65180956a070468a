"""One small transformer, its residual stream written by hand in several ways: plain, and as others write mHC."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STREAMS = 4
_HEAD = 16


class Attention(nn.Module):
    """Causal attention behind an RMSNorm, [batch, tokens, C] to the same."""

    def __init__(self, width: int) -> None:
        """Build it with PyTorch's own weights."""
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.inputs = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the stream."""
        heads = self.inputs(self.norm(x)).unflatten(-1, (3, -1, _HEAD)).transpose(1, 3).unbind(2)
        return self.output(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A gated MLP, 3.5 times as wide, behind an RMSNorm."""

    def __init__(self, width: int) -> None:
        """Build it with PyTorch's own weights."""
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (nn.Linear(width, 7 * width // 2, bias=False) for _ in range(2))
        self.down = nn.Linear(7 * width // 2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the stream."""
        normed = self.norm(x)
        return self.down(F.silu(self.gate(normed)) * self.up(normed))


class Plain(nn.Module):
    """Residual adds around the branches; two a layer. The same seed gives all models the same branches."""

    def __init__(self, width: int, layers: int) -> None:
        """Build it."""
        super().__init__()
        kinds = (Attention, MLP)
        self.branches = nn.ModuleList(kinds[index % 2](width) for index in range(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, tokens, C] for such an input."""
        for branch in self.branches:
            x = x + branch(x)
        return x


class HyperConnections(Plain):
    """With mHC of the package `hyper-connections`, which norms and projects each stream alone."""

    def __init__(self, width: int, layers: int) -> None:
        """Build it."""
        from hyper_connections.manifold_constrained_hyper_connections import mHC

        super().__init__(width, layers)
        self.expand, self.collapse = mHC.get_expand_reduce_stream_functions(_STREAMS)
        self.sites = nn.ModuleList(mHC(_STREAMS, dim=width, layer_index=index) for index in range(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the streams."""
        streams = self.expand(x)
        for site, branch in zip(self.sites, self.branches, strict=True):
            layer_input, write = site(streams)
            streams = write(branch(layer_input))
        return self.collapse(streams)


class DeepSeekV4(nn.Module):
    """The mixers of transformers' DeepSeek-V4 around branches, and its head; the mixers' weights are not set."""

    def __init__(self, width: int, branches: nn.ModuleList) -> None:
        """Build a mixer for each branch."""
        from transformers import DeepseekV4Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

        super().__init__()
        config = DeepseekV4Config(hidden_size=width, hc_mult=_STREAMS)
        self.sites = nn.ModuleList(DeepseekV4HyperConnection(config) for _ in branches)
        self.branches = branches
        self.head = DeepseekV4HyperHead(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, tokens, C] for such an input: the streams as the head reads them."""
        streams = x.unsqueeze(2).expand(-1, -1, _STREAMS, -1).contiguous()
        for site, branch in zip(self.sites, self.branches, strict=True):
            post, comb, layer_input = site(streams)
            written = post.unsqueeze(-1) * branch(layer_input).unsqueeze(-2)
            streams = written + torch.matmul(comb.transpose(-1, -2), streams)
        return self.head(streams)


def deepseek_v4(width: int, layers: int) -> DeepSeekV4:
    """Build `DeepSeekV4` around the branches of `Plain`, with random mixers."""
    model = DeepSeekV4(width, Plain(width, layers).branches)
    for parameter in (*model.sites.parameters(), *model.head.parameters()):
        nn.init.normal_(parameter, std=0.1)
    return model


@dataclass(frozen=True)
class Writing:
    """A way to write the residual stream.

    Attributes:
        name: in tables and on the command line.
        build: makes the model of a width and a number of layers.
        module: what has to be installed.
        fusion: our backend compiles the model, with this fusion; None for the inner backend alone.
        attached: the mHC parameters are ours.
        same_as: the writing whose function it computes.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    module: str = "torch"
    fusion: str | None = None
    attached: bool = False
    same_as: str | None = None

    @property
    def installed(self) -> bool:
        """Whether it can be built here."""
        return importlib.util.find_spec(self.module) is not None


PLAIN = "plain"
# In order of importance: a run that is stopped early has compared what matters most.
WRITINGS = (
    Writing(PLAIN, Plain),
    Writing("ours", Plain, fusion="auto", attached=True, same_as=PLAIN),
    Writing("hyper-connections", HyperConnections, module="hyper_connections"),
    Writing("DeepSeek-V4's mixers", deepseek_v4, module="transformers"),
    Writing(
        "DeepSeek-V4's mixers, ours", deepseek_v4, module="transformers", fusion="auto", same_as="DeepSeek-V4's mixers"
    ),
    Writing("ours, fusion=inductor", Plain, fusion="inductor", attached=True, same_as=PLAIN),
)
