"""What the scripts of cases share: small models with perturbed mHC parameters, and their twins in one graph.

Most cases take the decoder of `decoder.py`, which is traced in a third of the time that a Llama takes. A Llama is what
the Trainer, accelerate and the README's snippets get, and FSDP2 where it is compiled whole.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import mhc_compile

from ..carrying import perturb
from .decoder import VOCABULARY, WIDTH, Decoder

BATCH, LENGTH = 8, 8
INNER = {"inner": "aot_eager"}


def llama(layers: int = 2) -> Any:
    """Return a Llama of random weights, the same on every rank."""
    # Cases without a Llama are spared the time that this takes.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def tokens(batch: int = BATCH, seed: int = 3) -> Tensor:
    """Return token ids, the same on every rank."""
    return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def mine(batch: Tensor) -> Tensor:
    """Return this rank's share of a batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def decoder(layers: int = 2) -> Decoder:
    """Return a decoder of random weights, the same on every rank."""
    torch.manual_seed(0)
    return Decoder(layers)


def attached(layers: int = 2, build: Callable[[int], nn.Module] = decoder, readout: str = "mean") -> Any:
    """Return a model with perturbed mHC parameters, the same on every rank."""
    model = as_attached(layers, build, readout)
    perturb(model)
    return model


def as_attached(layers: int = 2, build: Callable[[int], nn.Module] = decoder, readout: str = "mean") -> Any:
    """Return a model with mHC parameters as they start."""
    return copy.deepcopy(_attached(layers, build, readout))


@functools.cache
def _attached(layers: int, build: Callable[[int], nn.Module], readout: str) -> nn.Module:
    model = build(layers)
    mhc_compile.attach(model, tokens(1), config=mhc_compile.MHCConfig(readout=readout))
    return model


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the loss of predicting the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def loss_of(call: Callable[..., Any], ids: Tensor) -> Tensor:
    """Return a language model's loss."""
    output = call(ids)
    return next_token_loss(getattr(output, "logits", output), ids)


def in_one_graph(
    layers: int = 2, build: Callable[[int], nn.Module] = decoder, readout: str = "mean", batch: int = BATCH
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of `attached`, compiled whole in this process."""
    return _in_one_graph(layers, build, readout, batch)


@functools.cache
def _in_one_graph(
    layers: int, build: Callable[[int], nn.Module], readout: str, batch: int
) -> tuple[float, dict[str, Tensor]]:
    model = attached(layers, build, readout)
    loss = loss_of(torch.compile(model, backend="mhc", options=INNER), tokens(batch))
    loss.backward()
    torch._dynamo.reset()
    return float(loss.detach()), gradients(model)


@contextlib.contextmanager
def small_first_bucket() -> Iterator[None]:
    """Inside, DDP's bucket for the first gradients holds a part of these models; 1 MB is more than they have."""
    before = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 8000
    try:
        yield
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = before


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
