"""Small models that carry streams themselves: transformers' own, and one written by hand in other words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "moe_intermediate_size": 16, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "q_lora_rank": 16,
}  # fmt: skip


def deepseek_v4(layers: int = 2, **more: Any) -> nn.Module:
    """Sinkhorn stored [in, out], a learned readout, experts."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        **_COMMON, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, o_lora_rank=8, o_groups=2, num_hash_layers=0,
        sliding_window=8, layer_types=["sliding_attention"] * layers, mlp_layer_types=["moe"] * layers, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return DeepseekV4ForCausalLM(config)


def glm5_next(layers: int = 2, kind: str = "linear_attention") -> nn.Module:
    """Sinkhorn, `rms_norm_eps` of its own, a readout by the mean."""
    from transformers import Glm5NextTextConfig
    from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextModel

    config = Glm5NextTextConfig(
        **_COMMON, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        kv_lora_rank=16, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, linear_head_dim=16, linear_num_heads=2, index_topk=32, index_kpool=4, index_head_dim=8,
        index_n_heads=2, mlp_layer_types=["dense"] * layers, layer_types=[kind] * layers,
    )  # fmt: skip
    torch.manual_seed(0)
    return Glm5NextTextModel(config)


def hy_v4(layers: int = 2) -> nn.Module:
    """Identity mixing, eps added to post too, a learned readout."""
    from transformers import HYV4Config, HYV4ForCausalLM

    config = HYV4Config(
        **_COMMON, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, index_topk=8,
        index_head_dim=16, index_n_heads=2, n_routed_experts=4, num_experts_per_tok=2,
        mlp_layer_types=["dense"] * layers,
    )  # fmt: skip
    torch.manual_seed(0)
    return HYV4ForCausalLM(config)


def perturb(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Add size·randn to every parameter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


class Mixer(nn.Module):
    """mHC in other words: weights [n·C, rows] of their own, a norm with a gain, Sinkhorn on logarithms, einsum."""

    def __init__(self, width: int, n: int = 4, iters: int = 6, last: int = -1, transposed: bool = False) -> None:
        super().__init__()
        self.n, self.iters, self.last, self.transposed = n, iters, last, transposed
        self.gain = nn.Parameter(torch.ones(n * width))
        self.to_pre = nn.Parameter(torch.randn(n * width, n) * 0.1)
        self.to_post = nn.Parameter(torch.randn(n * width, n) * 0.1)
        self.to_res = nn.Parameter(torch.randn(n * width, n * n) * 0.1)
        self.alphas = nn.ParameterList([nn.Parameter(torch.tensor(0.5)) for _ in range(3)])
        self.pre, self.post = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))
        self.res = nn.Parameter(4 * torch.eye(n))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = F.rms_norm(x.flatten(-2), (x.shape[-2] * x.shape[-1],), self.gain, 1e-5)
        read = (self.alphas[0] * (normed @ self.to_pre) + self.pre).sigmoid()
        write = self.alphas[1] * (normed @ self.to_post) + self.post
        logits = self.alphas[2] * (normed @ self.to_res).unflatten(-1, (self.n, self.n)) + self.res
        for _ in range(self.iters):
            logits = logits - logits.logsumexp(-3 - self.last, keepdim=True)
            logits = logits - logits.logsumexp(self.last, keepdim=True)
        return torch.einsum("btn,btnc->btc", read, x), self.gate(write), logits.exp()

    def gate(self, logits: Tensor) -> Tensor:
        return 2.0 / (1.0 + (-logits).exp())


class HandWritten(nn.Module):
    """Streams written by hand, and before them an ordinary residual stream of `plain` blocks."""

    def __init__(
        self,
        layers: int = 2,
        plain: int = 0,
        width: int = 12,
        mixer: type[Mixer] = Mixer,
        checkpointed: bool = False,
        **more: Any,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.plain = nn.ModuleList(self.branch(width) for _ in range(plain))
        self.mixers = nn.ModuleList(mixer(width, **more) for _ in range(layers))
        self.branches = nn.ModuleList(self.branch(width) for _ in range(layers))

    @staticmethod
    def branch(width: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.plain:
            x = x + block(x)
        streams = torch.stack([x] * self.mixers[0].n, dim=-2)
        for mixer, branch in zip(self.mixers, self.branches, strict=True):
            if self.checkpointed:
                streams = checkpoint(self.site, mixer, branch, streams, use_reentrant=False)
            else:
                streams = self.site(mixer, branch, streams)
        return streams.mean(-2)

    @staticmethod
    def site(mixer: Mixer, branch: nn.Module, streams: Tensor) -> Tensor:
        read, write, res = mixer(streams)
        equation = "btio,btic->btoc" if mixer.transposed else "btoi,btic->btoc"
        return torch.einsum("btn,btc->btnc", write, branch(read)) + torch.einsum(equation, res, streams)
