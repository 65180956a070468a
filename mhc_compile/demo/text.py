"""Text that every machine with Python has: the sources of its standard library, as characters."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MHCError

VOCABULARY = 128
# Every tenth file is held out: whole files, so that no line of the held-out text was trained on by its
# neighbors.
_HELD_OUT_EVERY = 10
_REPLACEMENT = ord("?")


@dataclass(frozen=True)
class Text:
    """Characters as integers below `VOCABULARY`.

    Attributes:
        train: [characters], uint8.
        held_out: [characters], uint8, of other files.
        files: number of files read.
    """

    train: Tensor
    held_out: Tensor
    files: int


def standard_library(folder: str | Path | None = None) -> Text:
    """Read the top-level modules of the standard library, in the order of their names.

    Args:
        folder: where to read `*.py` from; left out, the running interpreter's standard library.

    Raises:
        MHCError: the folder holds fewer than two Python files.
    """
    source = Path(folder or sysconfig.get_paths()["stdlib"])
    train, held_out = bytearray(), bytearray()
    files = sorted(source.glob("*.py"))
    for index, path in enumerate(files):
        (held_out if index % _HELD_OUT_EVERY == 1 else train).extend(path.read_bytes())
    if not train or not held_out:
        raise MHCError(
            f"{source} holds no Python sources to train on (is the standard library zipped?). Run the demo "
            "with a Python whose standard library is installed as files, such as that of a venv."
        )
    return Text(_characters(train), _characters(held_out), len(files))


def _characters(data: bytearray) -> Tensor:
    values = torch.frombuffer(data, dtype=torch.uint8)
    return torch.where(values < VOCABULARY, values, torch.full_like(values, _REPLACEMENT))


def random_batch(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Cut `batch` random windows out of a text: int64 [batch, length]."""
    starts = torch.randint(0, text.numel() - length + 1, (batch, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def even_batches(text: Tensor, batch: int, length: int, count: int) -> list[Tensor]:
    """Cut `count` batches, int64 [batch, length] each, at even distances over the whole of a text."""
    starts = torch.linspace(0, text.numel() - length, batch * count, dtype=torch.float64).long()
    windows = text[starts.unsqueeze(1) + torch.arange(length)].long()
    # Interleaved: every batch covers the whole text, so that batches can stand for repeated measurements.
    return [windows[index::count] for index in range(count)]
