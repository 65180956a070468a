"""A network of many residual blocks on scikit-learn's handwritten digits: small enough to diverge many times."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

CLASSES = 10
_PIXELS = 64


class Block(nn.Module):
    """A pre-norm residual MLP: [batch, width] -> [batch, width]."""

    def __init__(self, width: int) -> None:
        """Make the branch; its hidden layer is twice as wide."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Add the branch to the stream."""
        return hidden + self.down(nnf.gelu(self.up(self.norm(hidden))))


class DigitsNet(nn.Module):
    """Pixels [batch, 64] to logits [batch, 10] through `depth` residual blocks."""

    def __init__(self, depth: int, width: int) -> None:
        """Make the network with PyTorch's default initialisation."""
        super().__init__()
        self.embed = nn.Linear(_PIXELS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.embed(pixels)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.readout(self.norm(hidden))
        return logits


def digits() -> tuple[Tensor, Tensor]:
    """Return all 1797 images as [images, 64] in about ±1, and their classes.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 8.0 - 1.0, torch.from_numpy(classes).long()


def batches(images: Tensor, classes: Tensor, size: int, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Draw `steps` batches; the same seed gives every run the same ones."""
    generator = torch.Generator().manual_seed(seed)
    picks = [torch.randint(len(images), (size,), generator=generator) for _ in range(steps)]
    return [(images[pick], classes[pick]) for pick in picks]
