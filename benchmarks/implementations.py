"""The implementations of one operator, as differentiable functions of the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mhc_compile.kernels import ops
from mhc_compile.kernels.dispatch import reference_of
from mhc_compile.kernels.fusions import FUSIONS
from mhc_compile.kernels.ops import OPERATORS
from torch import Tensor
from torch._functorch import config as functorch_config

from .problems import Shape, excess, held_dtype, make_inputs, many, sizes_of

Implementation = Callable[..., Any]
INDUCTOR = "inductor"
# What is checked before it is timed: as many tokens as float64 takes in a moment.
_CHECKED_TOKENS = 256


def implementations_of(operator: str) -> dict[str, Implementation]:
    """Return every implementation of an operator by name: functions of its tensors and constants.

    `post_pre` is the boundary between two sites; each fusion choice is an implementation of it.
    """
    found: dict[str, Implementation] = {}
    if operator == "post_pre":
        for fusion in reversed(FUSIONS.values()):
            if fusion.post_pre is not None:
                found[fusion.name] = OPERATORS[fusion.post_pre].forward
            elif not fusion.inlined:
                found[fusion.name] = _joined(OPERATORS[fusion.pre].forward)
    else:
        found["kernel"] = OPERATORS[operator].forward
        if operator == "pre":
            found["paper"] = OPERATORS["paper_pre"].forward
    found[INDUCTOR] = torch.compile(reference_of(operator), dynamic=False)
    return found


def _joined(pre: Implementation) -> Implementation:
    def boundary(*arguments: Any) -> tuple[Tensor, ...]:
        fresh = ops.post(*arguments[:4])
        return fresh, *many(pre(fresh, *arguments[4:]))

    return boundary


@dataclass(frozen=True)
class Prepared:
    """One set of inputs of an implementation, its outputs, and their gradients."""

    leaves: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]

    def backward(self) -> tuple[Tensor, ...]:
        """Return the gradients of the leaves; may be called again."""
        return torch.autograd.grad(self.outputs, self.leaves, self.grads, retain_graph=True)


def prepare(
    implementation: Implementation, tensors: Sequence[Tensor], constants: Sequence[Any], seed: int = 0
) -> Prepared:
    """Run an implementation on leaves that require gradients.

    Args:
        implementation: the function.
        tensors: its inputs, which stay as they are.
        constants: the rest of its arguments.
        seed: of the outputs' gradients: the same for every implementation.
    """
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)
    # Donated buffers of a compiled backward would forbid to run it a second time.
    with functorch_config.patch(donated_buffer=False):
        outputs = tuple(out for out in many(implementation(*leaves, *constants)) if out.requires_grad)
    generator = torch.Generator(leaves[0].device).manual_seed(seed)
    grads = tuple(
        torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype).contiguous() for out in outputs
    )
    return Prepared(leaves, outputs, grads)


def problems_of(implementation: Implementation, shape: Shape, device: str) -> list[str]:
    """Return where an implementation's outputs and gradients err by more than plain PyTorch and one rounding."""
    few = shape.with_tokens(min(shape.tokens, _CHECKED_TOKENS))
    tensors, constants = make_inputs(few, device)
    plain = reference_of(shape.operator)
    mine, theirs = prepare(implementation, tensors, constants), prepare(plain, tensors, constants)
    wide = prepare(plain, [tensor.double() for tensor in tensors], constants)
    # Rounded as they are in the narrow dtype: the gradients handed in must be the same numbers.
    true = Prepared(wide.leaves, wide.outputs, tuple(grad.double() for grad in mine.grads))
    found = []
    for what, results in (
        ("output", (mine.outputs, theirs.outputs, true.outputs)),
        ("gradient", (mine.backward(), theirs.backward(), true.backward())),
    ):
        sizes = sizes_of([exact.detach() for exact in results[2]])
        for index, (ours, plains, exact, size) in enumerate(zip(*results, sizes, strict=True)):
            held = held_dtype(shape, index) if what == "gradient" else None
            wrong = excess(ours.detach(), plains.detach(), exact.detach(), size, held)
            if wrong:
                found.append(f"{what} {index} {wrong}")
    return found
