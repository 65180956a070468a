"""A Llama of a given width, plain or rewritten, for the benchmarks that train one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile

PLAIN = "plain"


@dataclass(frozen=True)
class Setting:
    """A model and a batch.

    Attributes:
        width: hidden size C; heads are 128 wide, or 16 in a tiny model.
        layers: each has two sites.
        batch: sequences in a step.
        length: tokens in a sequence.
        vocabulary: with 4 to 8 layers, 32768 gives the readout the share of the step that 128k has in 32 layers.
        dtype: of parameters and streams.
    """

    width: int
    layers: int
    batch: int
    length: int
    vocabulary: int = 32768
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.length

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as JSON types."""
        return {**asdict(self), "tokens": self.tokens}


# What a layer holds, in units of C²: projections of attention (2 + 2/4) and of the MLP (3 · 3.5).
_WEIGHTS = 13
# A weight, its gradient and AdamW's two moments.
_COPIES = 4
# What a layer keeps for the backward with mHC and all streams stored, in units of C a token: about 37 in Llama-3-8B
# (`mhc-compile explain`), and room for what is alive only for a moment.
_ACTIVATIONS = 45


def layers_that_fit(setting: Setting, free_bytes: int) -> int:
    """Return how many layers of a setting's width and batch train in that much memory, at least one.

    Estimated: a fifth of the memory is left for the allocator and for Inductor's scratch.
    """
    size = getattr(torch, setting.dtype).itemsize
    ends = 2 * setting.vocabulary * setting.width * size * _COPIES + 3 * 4 * setting.tokens * setting.vocabulary
    layer = _WEIGHTS * setting.width**2 * size * _COPIES + _ACTIVATIONS * setting.tokens * setting.width * size
    return max(1, int((0.8 * free_bytes - ends) // layer))


def missing() -> str | None:
    """Return why no model can be built here, None if it can."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install 'mhc-compile[bench]')"
    return None


def build(setting: Setting, device: str) -> nn.Module:
    """Build the model with seeded weights, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, setting.width // (128 if setting.width >= 1024 else 16))
    sizes: dict[str, Any] = {
        "vocab_size": setting.vocabulary,
        "hidden_size": setting.width,
        # 3.5 C, and a quarter of the heads for keys and values, as in Llama-3-8B.
        "intermediate_size": 7 * setting.width // 2,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "max_position_embeddings": setting.length,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes))
    return model.to(getattr(torch, setting.dtype))


def tokens_of(setting: Setting, device: str, seed: int = 0) -> Tensor:
    """Return random tokens, int64 [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(setting.vocabulary, (setting.batch, setting.length), generator=generator).to(device)


def compiled(model: nn.Module, example: Tensor, options: Mapping[str, Any] | None, inner: str) -> Callable[..., Any]:
    """Compile a model, plain where `options` is None, else attached first and through the backend."""
    if options is None:
        return torch.compile(model, backend=inner, dynamic=False)
    chosen = {**options, "inner": inner}
    mhc_compile.attach(model, input_ids=example, labels=example, config=mhc_compile.MHCConfig(**chosen))
    return torch.compile(model, backend="mhc", options=chosen, dynamic=False)
