"""What the scripts of cases share: a small Llama with perturbed mHC parameters, and its twin in one graph."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import mhc_compile

from ..carrying import perturb

WIDTH, VOCABULARY, BATCH, LENGTH = 32, 64, 4, 8


def llama(layers: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Return a Llama of random weights, the same on every rank."""
    # Cases without a Llama are spared the time that this takes.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).train()


def tokens(batch: int = BATCH, seed: int = 3) -> Tensor:
    """Return token ids, the same on every rank."""
    return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def mine(batch: Tensor) -> Tensor:
    """Return this rank's share of a batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def attached(layers: int = 2) -> Any:
    """Return a Llama with perturbed mHC parameters."""
    return copy.deepcopy(_attached(layers))


@functools.cache
def _attached(layers: int) -> Any:
    model = llama(layers)
    mhc_compile.attach(model, input_ids=tokens(1))
    perturb(model)
    return model


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the language model's loss."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


@functools.cache
def in_one_graph(layers: int = 2, batch: int = BATCH) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of `attached(layers)`, compiled whole in this process."""
    model = attached(layers)
    loss = loss_of(torch.compile(model, backend="mhc", options={"inner": "aot_eager"}), tokens(batch))
    loss.backward()
    torch._dynamo.reset()
    return float(loss.detach()), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole gradient of each parameter, under the name that it has without wrappers."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
                name = name.replace(wrapper, "")
            found[name] = grad.clone()
    return found


def average(value: float) -> float:
    """Return the mean of a number over the ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def gap(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """Return the largest relative difference of two sets of gradients."""
    assert wanted.keys() == got.keys(), sorted(wanted.keys() ^ got.keys())
    top = max(float(value.abs().max()) for value in wanted.values())
    return max(
        float((value - got[name]).abs().max()) / max(float(value.abs().max()), 1e-3 * top)
        for name, value in wanted.items()
    )


def differences(wanted: tuple[float, dict[str, Tensor]], loss: float, model: nn.Module) -> dict[str, float]:
    """Return how far a model's loss (of this rank's share) and gradients are from one process in one graph."""
    return {"loss": abs(average(loss) - wanted[0]), "gradient": gap(wanted[1], gradients(model))}
