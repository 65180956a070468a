"""What the tests of carried streams share: twins, perturbed parameters, blocks compiled alone."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile

from .models import CASES, Case, Stack, features

# Pre-norm, parallel branches, norms on both sides of a branch, post-norm, an encoder with a decoder, images.
BLOCKWISE: dict[str, Callable[[], Case]] = {
    name: CASES[name] for name in ("llama", "gpt_neox", "gemma2", "bert", "t5", "vit")
}


# What the model in one graph is compiled with: it stands for the true values only.
REFERENCE = {"inner": "eager"}


def perturb(model: nn.Module, seed: int = 1) -> None:
    """Move every mHC parameter by 0.3·randn, in an order that does not depend on wrappers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(mhc_compile.parameters(model).items()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def twins(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Return a model with perturbed mHC parameters, and a copy of it."""
    mhc_compile.attach(model, *args, **kwargs)
    perturb(model)
    return model, copy.deepcopy(model)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the equal modules that a model runs one after another."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    found = [list(blocks) for blocks in lists if len({type(block) for block in blocks}) == 1]
    inside = {id(inner) for blocks in found for block in blocks for inner in block.modules() if inner is not block}
    return [block for blocks in found for block in blocks if id(block) not in inside]


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block of a model alone, in place."""
    for block in blocks_of(model):
        block.compile(**options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model's parameters by name."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def outcome(model: nn.Module, call: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a model's loss and gradients."""
    model.zero_grad(set_to_none=True)
    output = call(**inputs)
    loss = output.loss if getattr(output, "loss", None) is not None else output[0].square().mean()
    loss.backward()
    return loss.detach(), gradients(model)


def largest_gap(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the largest difference of two gradients, relative to the largest entry (floor: a millionth of all)."""
    top = max(float(grad.abs().max()) for grad in left.values())
    return max(
        float((left[name] - right[name]).abs().max()) / max(float(left[name].abs().max()), 1e-3 * top) for name in left
    )


@contextlib.contextmanager
def one_process_group() -> Iterator[None]:
    """Inside, this process is a gloo group of its own."""
    import torch.distributed as dist

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Looped(Stack):
    """Calls something between its blocks, as plain Python."""

    def __init__(self, blocks: int, between: Any = lambda hidden, index: hidden) -> None:
        super().__init__(blocks)
        self.between = between

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(inputs)
        for index, block in enumerate(self.blocks):
            hidden = self.between(hidden, index)
            hidden = block(hidden)
        return self.readout(hidden)


@functools.cache
def _stack(blocks: int, kind: type[Stack]) -> nn.Module:
    torch.manual_seed(0)
    return twins(kind(blocks), features())[0]


def stack(blocks: int = 3, kind: type[Stack] = Stack) -> nn.Module:
    """Return an attached model with perturbed parameters."""
    return copy.deepcopy(_stack(blocks, kind))


@functools.cache
def in_one_graph(blocks: int, kind: type[Stack]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return loss and gradients of `stack`, compiled whole."""
    whole = stack(blocks, kind)
    outcome = run(whole, torch.compile(whole, backend="mhc", options=REFERENCE))
    torch._dynamo.reset()
    return outcome


def wanted(blocks: int = 3, kind: type[Stack] = Stack):
    """Return loss and gradients of a model in one graph, and the model, not compiled yet."""
    return in_one_graph(blocks, kind), stack(blocks, kind)


def run(model: nn.Module, call: Any, *args: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the gradients of one call."""
    model.zero_grad(set_to_none=True)
    loss = call(*(args or (features(),))).square().mean()
    loss.backward()
    return loss.detach(), gradients(model)


def same(left: Any, right: Any) -> None:
    """Compare what `run` has returned."""
    assert torch.allclose(left[0], right[0], rtol=1e-6, atol=1e-6)
    assert left[1].keys() == right[1].keys()
    assert largest_gap(left[1], right[1]) < 1e-5
