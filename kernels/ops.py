"""Registration of the operators with PyTorch: schema, fake, autograd, dispatch.

Every operator is opaque to Inductor, so that compile time does not grow with the number of Sinkhorn
iterations, and so is its backward. `OPERATORS` is the one table that lists them; tests walk it. `dispatch`
chooses between the Triton kernels and plain PyTorch.

An operator saves nothing but its inputs for the backward and recomputes its coefficients there.

Why `custom_op` and not `triton_op`. `triton_op` lets Inductor see the kernels and emit their launches itself,
without Python dispatch. It was not taken, for three reasons. Dispatch here depends on the device and on an
override, and an operator must also run as plain PyTorch; Inductor would have to trace the choice. The launch
heuristics depend on the number of tokens, so tracing them would guard on it and compile again at each
boundary between configurations; opaque, one graph serves every number of tokens. And `opcheck` fails on a
`triton_op` under Triton's interpreter, so that the registration could not be tested without a GPU. The price
is a Python call for each operator, which CUDA graphs (`mode="reduce-overhead"`) should remove: the kernels
allocate through PyTorch, never wait for the device and launch the same grids for the same shapes. None of
this has been measured, or captured, on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import boundary, reference
from .dispatch import run
from .manifolds import MANIFOLDS
from .reference import accumulation_dtype


@dataclass(frozen=True)
class Operator:
    """One row of the table: an operator, its backward, and the plain PyTorch that defines it."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    reference: Callable[..., Any]


@torch.library.custom_op("mhc::sinkhorn", mutates_args=())
def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """See `reference.sinkhorn`."""
    return run("sinkhorn", (logits,), logits.shape[-1], "sinkhorn", iters, eps)


@torch.library.custom_op("mhc::sinkhorn_backward", mutates_args=())
def sinkhorn_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """See `reference.sinkhorn_backward`."""
    return run("sinkhorn_backward", (grad_res, logits), logits.shape[-1], "sinkhorn", iters, eps)


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
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pre`."""
    tensors = (streams, phi, scale, bias)
    return tuple(run("pre", tensors, streams.shape[-2], manifold, iters, norm_eps, eps, manifold, anchored))


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
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.pre_backward`."""
    tensors = (grad_layer_input, grad_post, grad_res, streams, phi, scale, bias)
    return run("pre_backward", tensors, streams.shape[-2], manifold, iters, norm_eps, eps, manifold, anchored)


@torch.library.custom_op("mhc::paper_pre", mutates_args=())
def paper_pre(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.pre`; on a device it runs in the paper's separate kernels. Its backward is that of `pre`."""
    tensors = (streams, phi, scale, bias)
    return tuple(run("paper_pre", tensors, streams.shape[-2], manifold, iters, norm_eps, eps, manifold, anchored))


@torch.library.custom_op("mhc::post", mutates_args=())
def post(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """See `reference.post`."""
    return run("post", (streams, branch, post, res), streams.shape[-2], "sinkhorn")


@torch.library.custom_op("mhc::post_backward", mutates_args=())
def post_backward(
    grad_streams: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.post_backward`."""
    return run("post_backward", (grad_streams, streams, branch, post, res), streams.shape[-2], "sinkhorn")


@torch.library.custom_op("mhc::post_pre", mutates_args=())
def post_pre(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `boundary.post_pre`."""
    tensors = (streams, branch, post, res, phi, scale, bias)
    return run("post_pre", tensors, streams.shape[-2], manifold, iters, norm_eps, eps, manifold, anchored)


@torch.library.custom_op("mhc::post_pre_backward", mutates_args=())
def post_pre_backward(
    grad_fresh: Tensor,
    grad_layer_input: Tensor,
    grad_next_post: Tensor,
    grad_next_res: Tensor,
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `boundary.post_pre_backward`."""
    grads = (grad_fresh, grad_layer_input, grad_next_post, grad_next_res)
    tensors = (*grads, streams, branch, post, res, phi, scale, bias)
    return run("post_pre_backward", tensors, streams.shape[-2], manifold, iters, norm_eps, eps, manifold, anchored)


@torch.library.custom_op("mhc::head", mutates_args=())
def head(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    anchored: bool = False,
) -> Tensor:
    """See `reference.head`."""
    return run("head", (streams, phi, scale, bias), streams.shape[-2], "sinkhorn", norm_eps, eps, anchored)


@torch.library.custom_op("mhc::head_backward", mutates_args=())
def head_backward(
    grad_output: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.head_backward`."""
    tensors = (grad_output, streams, phi, scale, bias)
    return run("head_backward", tensors, streams.shape[-2], "sinkhorn", norm_eps, eps, anchored)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@sinkhorn.register_fake
def _(logits: Tensor, iters: int, eps: float) -> Tensor:
    return _like(logits)


@sinkhorn_backward.register_fake
def _(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    return _like(logits)


@pre.register_fake
@paper_pre.register_fake
def _fake_pre(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
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
    anchored: bool = False,
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


@post_pre.register_fake
def _(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (_like(streams), *_fake_pre(streams, phi, scale, bias, iters, norm_eps, eps, manifold, anchored))


@post_pre_backward.register_fake
def _(
    grad_fresh: Tensor,
    grad_layer_input: Tensor,
    grad_next_post: Tensor,
    grad_next_res: Tensor,
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    first = (_like(streams), _like(branch), _like(post), _like(res))
    return (*first, _like(phi), _like(scale), _like(bias))


@head.register_fake
def _(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: float,
    anchored: bool = False,
) -> Tensor:
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
    anchored: bool = False,
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
paper_pre.register_autograd(_apply(pre_backward), setup_context=_save(4))
post.register_autograd(_apply(post_backward), setup_context=_save(4))
post_pre.register_autograd(_apply(post_pre_backward), setup_context=_save(7))
head.register_autograd(_apply(head_backward), setup_context=_save(4))

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("sinkhorn", sinkhorn, sinkhorn_backward, reference.sinkhorn),
        Operator("pre", pre, pre_backward, reference.pre),
        Operator("paper_pre", paper_pre, pre_backward, reference.pre),
        Operator("post", post, post_backward, reference.post),
        Operator("post_pre", post_pre, post_pre_backward, boundary.post_pre),
        Operator("head", head, head_backward, reference.head),
    )
}
