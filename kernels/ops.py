"""Registration of the operators with PyTorch: schema, fake, autograd, dispatch.

Every operator is opaque to Inductor, so that compile time does not grow with the number of Sinkhorn iterations, and
so is its backward. `OPERATORS` is the one table that lists them; tests walk it.

An operator saves nothing but its inputs for the backward and recomputes its coefficients there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .manifolds import MANIFOLDS
from .reference import accumulation_dtype


@dataclass(frozen=True)
class Operator:
    """One row of the table: an operator, its backward, and the plain PyTorch that defines it."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    reference: Callable[..., Any]


def _without_autocast(streams: Tensor) -> torch.autocast:
    """Ambient autocast would run the projection in bf16: its error in the row sums is 170 times larger."""
    return torch.autocast(device_type=streams.device.type, enabled=False)


@torch.library.custom_op("mhc::sinkhorn", mutates_args=())
def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """See `reference.sinkhorn`."""
    with _without_autocast(logits):
        return reference.sinkhorn(logits.contiguous(), iters, eps)


@torch.library.custom_op("mhc::sinkhorn_backward", mutates_args=())
def sinkhorn_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """See `reference.sinkhorn_backward`."""
    with _without_autocast(logits):
        return reference.sinkhorn_backward(grad_res.contiguous(), logits.contiguous(), iters, eps)


@torch.library.custom_op("mhc::pre", mutates_args=())
def pre(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pre`."""
    with _without_autocast(streams):
        layer_input, post, res = reference.pre(streams.contiguous(), phi, scale, bias, iters, norm_eps, eps, manifold)
        return layer_input, post, res


@torch.library.custom_op("mhc::pre_backward", mutates_args=())
def pre_backward(
    grad_layer_input: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.pre_backward`."""
    with _without_autocast(streams):
        return reference.pre_backward(
            grad_layer_input, grad_post, grad_res, streams.contiguous(), phi, scale, bias,
            iters, norm_eps, eps, manifold,
        )  # fmt: skip


@torch.library.custom_op("mhc::post", mutates_args=())
def post(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """See `reference.post`."""
    with _without_autocast(streams):
        return reference.post(streams.contiguous(), branch, post, res)


@torch.library.custom_op("mhc::post_backward", mutates_args=())
def post_backward(
    grad_streams: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.post_backward`."""
    with _without_autocast(streams):
        return reference.post_backward(grad_streams, streams.contiguous(), branch.contiguous(), post, res)


@torch.library.custom_op("mhc::head", mutates_args=())
def head(streams: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, norm_eps: float, eps: float) -> Tensor:
    """See `reference.head`."""
    with _without_autocast(streams):
        return reference.head(streams.contiguous(), phi, scale, bias, norm_eps, eps)


@torch.library.custom_op("mhc::head_backward", mutates_args=())
def head_backward(
    grad_output: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.head_backward`."""
    with _without_autocast(streams):
        return reference.head_backward(grad_output, streams.contiguous(), phi, scale, bias, norm_eps, eps)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@sinkhorn.register_fake
def _(logits: Tensor, iters: int, eps: float) -> Tensor:
    return _like(logits)


@sinkhorn_backward.register_fake
def _(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    return _like(logits)


@pre.register_fake
def _(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
) -> tuple[Tensor, Tensor, Tensor]:
    *tokens, n, width = streams.shape
    torch._check(
        phi.shape[0] == MANIFOLDS[manifold].rows(n),
        lambda: f"phi has {phi.shape[0]} rows; {n} streams on {manifold!r} need {MANIFOLDS[manifold].rows(n)}",
    )
    coefficients = accumulation_dtype(streams)
    return (
        streams.new_empty(*tokens, width),
        streams.new_empty(*tokens, n, dtype=coefficients),
        streams.new_empty(*tokens, n, n, dtype=coefficients),
    )


@pre_backward.register_fake
def _(
    grad_layer_input: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(streams), _like(phi), _like(scale), _like(bias)


@post.register_fake
def _(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    return _like(streams)


@post_backward.register_fake
def _(
    grad_streams: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(streams), _like(branch), _like(post), _like(res)


@head.register_fake
def _(streams: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, norm_eps: float, eps: float) -> Tensor:
    *tokens, _, width = streams.shape
    return streams.new_empty(*tokens, width)


@head_backward.register_fake
def _(
    grad_output: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(streams), _like(phi), _like(scale), _like(bias)


def _save(tensors: int) -> Callable[..., None]:
    """Save the first `tensors` inputs as tensors and the rest as plain values."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.constants = inputs[tensors:]

    return setup_context


def _apply(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Call the backward operator with the output gradients, the saved tensors and the constants."""

    def run(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        result = backward(*grads, *ctx.saved_tensors, *ctx.constants)
        result = result if isinstance(result, tuple | list) else (result,)
        return (*result, *(None for _ in ctx.constants))

    return run


sinkhorn.register_autograd(_apply(sinkhorn_backward), setup_context=_save(1))
pre.register_autograd(_apply(pre_backward), setup_context=_save(4))
post.register_autograd(_apply(post_backward), setup_context=_save(4))
head.register_autograd(_apply(head_backward), setup_context=_save(4))

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("sinkhorn", sinkhorn, sinkhorn_backward, reference.sinkhorn),
        Operator("pre", pre, pre_backward, reference.pre),
        Operator("post", post, post_backward, reference.post),
        Operator("head", head, head_backward, reference.head),
    )
}
