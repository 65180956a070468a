"""Compare a model with its rewritten self: outputs and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile import MHCConfig

from .models import assert_same_function


def tensors_of(value: Any) -> list[Tensor]:
    """Return the floating-point tensors of nested outputs, caches left out."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if is_dataclass(value) and not isinstance(value, Mapping):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        value = [inner for key, inner in value.items() if key != "past_key_values"]
    return [tensor for inner in value for tensor in tensors_of(inner)] if isinstance(value, list | tuple) else []


def run(call: Any, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Call, sum all outputs with fixed weights, and return outputs and gradients."""
    torch.manual_seed(5)
    outputs = tensors_of(call(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    trained = [tensor for tensor in outputs if tensor.requires_grad]
    torch.stack(
        [(tensor * torch.randn(tensor.shape, generator=generator)).mean() for tensor in trained]
    ).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return [tensor.detach() for tensor in outputs], gradients


def assert_preserved(model: nn.Module, *args: Any, chains: list[int], **kwargs: Any) -> mhc_compile.Report:
    """Check that attaching finds chains of these lengths, and that outputs and gradients stay the plain ones."""
    plain, gradients = run(model, model, *args, **kwargs)
    report = mhc_compile.attach(model, *args, config=MHCConfig(), **kwargs)
    assert sorted(len(chain.sites) for chain in report.chains) == sorted(chains)
    rewritten, after = run(torch.compile(model, backend="mhc", options={"inner": "eager"}), model, *args, **kwargs)
    assert_same_function(plain, rewritten, 1e-5)
    assert gradients.keys() <= after.keys()
    # A key bias has no gradient but rounding: the floor is far below every other parameter's.
    top = max(float(gradient.abs().max()) for gradient in gradients.values())
    names = list(gradients)
    assert_same_function([gradients[n] for n in names], [after[n] for n in names], 1e-4, floor=1e-3 * top)
    return report
