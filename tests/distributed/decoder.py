"""A small decoder that tensor parallelism can split: heads of attention, hidden units, tokens of the stream."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

WIDTH, VOCABULARY, HEADS = 32, 64, 4


class Attention(nn.Module):
    """Causal attention; the number of heads on this rank follows from the projections."""

    def __init__(self) -> None:
        """Create the projections."""
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, C] to [B, S, C]."""
        q, k, v = (part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps with a GELU in between."""

    def __init__(self) -> None:
        """Create the projections."""
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, C] to [B, S, C]."""
        return self.down(functional.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm block with two sites."""

    def __init__(self) -> None:
        """Create the two branches."""
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, C] to [B, S, C]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, layers: int = 2) -> None:
        """Create the layers."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [B, S] to logits [B, S, V]."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
