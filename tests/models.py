"""Small models of real architectures, and a few hand-written ones, with an example input each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WIDTH, LAYERS, HEADS, VOCABULARY = 32, 2, 4, 99
QUICK = {"inner": "aot_eager"}


@dataclass(frozen=True)
class Case:
    """An architecture, built small from its config, and what the finder must show."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    chains: tuple[int, ...]
    norm: str


def decoder(config: str, chains: tuple[int, ...] = (4,), **changes: Any) -> Case:
    """Return a decoder of transformers, two layers small."""
    import transformers

    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    made = getattr(transformers, config)(**{**sizes, **changes})
    return Case(lambda: transformers.AutoModelForCausalLM.from_config(made), _tokens, chains, "pre")


def _gpt2(config: str, chains: tuple[int, ...], **changes: Any) -> Case:
    import transformers

    made = getattr(transformers, config)(
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    return Case(lambda: transformers.AutoModelForCausalLM.from_config(made), _tokens, chains, "pre")


def _encoder(model: str, config: str, **changes: Any) -> Case:
    import transformers

    made = getattr(transformers, config)(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        vocab_size=VOCABULARY, **changes,
    )  # fmt: skip
    return Case(lambda: getattr(transformers, model)(made), _tokens, (4,), "post")


def _tokens() -> dict[str, Any]:
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def _pixels(**more: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)), **more}


def t5(layers: int = LAYERS) -> Case:
    """Return a small T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=WIDTH, d_kv=8, d_ff=64, num_layers=layers, num_heads=HEADS, vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )  # fmt: skip
    return Case(lambda: T5ForConditionalGeneration(config), _tokens, (2 * layers, 3 * layers), "pre")


def bart(layers: int = LAYERS) -> Case:
    """Return a small BART."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=WIDTH, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCABULARY,
    )  # fmt: skip
    return Case(lambda: BartForConditionalGeneration(config), _tokens, (2 * layers, 3 * layers), "post")


def whisper(layers: int = LAYERS) -> Case:
    """Return a small Whisper."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=WIDTH, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=VOCABULARY, num_mel_bins=8,
        max_source_positions=16, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip

    def inputs() -> dict[str, Any]:
        features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
        return {"input_features": features, "labels": _tokens()["labels"]}

    return Case(lambda: WhisperForConditionalGeneration(config), inputs, (2 * layers, 3 * layers), "pre")


def _vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=32,
        patch_size=8,
    )  # fmt: skip
    labels = torch.tensor([0, 1])
    return Case(lambda: ViTForImageClassification(config), lambda: _pixels(labels=labels), (4,), "pre")


def _clip() -> Case:
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "bos_token_id": 1,
                     "eos_token_id": 98},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip

    def inputs() -> dict[str, Any]:
        return _pixels(input_ids=_tokens()["input_ids"], return_loss=True)

    return Case(lambda: CLIPModel(config), inputs, (4, 4), "pre")


CASES: dict[str, Callable[[], Case]] = {
    "llama": lambda: decoder("LlamaConfig", num_key_value_heads=2),
    "gpt2": lambda: _gpt2("GPT2Config", (4,)),
    "mistral": lambda: decoder("MistralConfig", num_key_value_heads=2),
    "qwen3": lambda: decoder("Qwen3Config", num_key_value_heads=2, head_dim=8),
    "gemma2": lambda: decoder("Gemma2Config", num_key_value_heads=2, head_dim=8),
    "gpt_neox": lambda: decoder("GPTNeoXConfig", (2,)),
    "gptj": lambda: _gpt2("GPTJConfig", (2,), rotary_dim=4),
    "falcon": lambda: decoder("FalconConfig", (2,)),
    "mixtral": lambda: decoder("MixtralConfig", num_key_value_heads=2, num_local_experts=4),
    "exaone4": lambda: decoder("Exaone4Config", num_key_value_heads=2),
    "bert": lambda: _encoder("BertForMaskedLM", "BertConfig"),
    "roberta": lambda: _encoder("RobertaForMaskedLM", "RobertaConfig"),
    "electra": lambda: _encoder("ElectraForMaskedLM", "ElectraConfig", embedding_size=16),
    "t5": t5,
    "bart": bart,
    "vit": _vit,
    "clip": _clip,
    "whisper": whisper,
}


def llama(**changes: Any) -> nn.Module:
    """Build a small Llama in eval mode."""
    torch.manual_seed(0)
    return decoder("LlamaConfig", num_key_value_heads=2, **changes).build().eval()


def token_ids(batch: int = 2, length: int = 8) -> torch.Tensor:
    """Return random token ids [batch, length]."""
    return torch.randint(5, 90, (batch, length), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Two pre-norm residual branches."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixer, self.mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.dropout(self.mixer(self.norm1(hidden)))
        return hidden + self.dropout(torch.tanh(self.mlp(self.norm2(hidden))))


class Stack(nn.Module):
    """A stem, blocks and a readout."""

    def __init__(self, depth: int = 2, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.readout = nn.Linear(width, 3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(features)
        for block in self.blocks:
            hidden = block(hidden)
        return self.readout(hidden)


class BreaksBetween(Stack):
    """A graph break between the two blocks."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks[0](self.stem(features))
        torch._dynamo.graph_break()
        return self.readout(self.blocks[1](hidden))


class BreaksInLoop(Stack):
    """A graph break in the loop over blocks: Dynamo gives up on the whole forward."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(features)
        for block in self.blocks:
            hidden = block(hidden)
            torch._dynamo.graph_break()
        return self.readout(hidden)


def features(batch: int = 5, width: int = WIDTH) -> torch.Tensor:
    """Return random features [batch, width]."""
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(1))


def assert_same_function(
    plain: list[torch.Tensor], rewritten: list[torch.Tensor], tolerance: float, floor: float = 0.0
) -> None:
    """Compare tensor by tensor: largest difference against the largest value, or against `floor` if that is larger.

    The floor is for gradients that are zero but for rounding, such as that of an attention's key bias.
    """
    assert len(plain) == len(rewritten)
    for index, (left, right) in enumerate(zip(plain, rewritten, strict=True)):
        scale = max(float(left.abs().max()), floor, 1e-30) if left.numel() else 1.0
        gap = float((left.double() - right.double()).abs().max()) / scale if left.numel() else 0.0
        assert gap <= tolerance, f"tensor {index} of shape {tuple(left.shape)} differs by {gap:.1e} of {scale:.1e}"


def named_example() -> tuple[nn.Module, torch.Tensor]:
    """Return what the command line takes as `tests.models:named_example`."""
    return Stack(), features()
