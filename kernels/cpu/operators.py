"""Calls of the compiled operators; arguments and results are those of `reference` and `boundary`.

Streams stay in their dtype. Parameters and coefficients, small beside them, are handed on as float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import boundary, reference
from ..epsilons import Eps, Epsilons, epsilons
from ..manifolds import MANIFOLDS
from ..orientation import ROWS_FIRST, PhiLayout
from .build import BuildError, HeldEpsilons, library

# As in operators.cpp.
_ANCHORED, _GATED, _MIXES, _SINKHORN, _HEAD, _EXACT, _ROW, _TRANSPOSED, _COLUMNS = 1, 2, 4, 8, 16, 32, 64, 128, 256
_MATRICES = {"logits": 0, "sinkhorn": _SINKHORN, "row": _ROW, "permutation": 512, "kronecker": 1024}


def sinkhorn(logits: Tensor, iters: int, eps: Eps) -> Tensor:
    """See `reference.sinkhorn`."""
    wide = _wide(logits)
    res = torch.empty_like(wide)
    _call("mhc_sinkhorn", wide, (wide, res), _tokens(wide, 2), iters, _held(eps))
    return res.to(logits.dtype)


def sinkhorn_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: Eps) -> Tensor:
    """See `reference.sinkhorn_backward`."""
    grad, wide = _wide(grad_res), _wide(logits)
    grad_logits = torch.empty_like(wide)
    _call("mhc_sinkhorn_backward", wide, (grad, wide, grad_logits), _tokens(wide, 2), iters, _held(eps))
    return grad_logits.to(logits.dtype)


def pre(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """See `reference.pre`."""
    streams = streams.contiguous()
    outputs = (_value_like(streams), *_coefficients(streams, bias))
    constants = _site(streams, iters, norm_eps, eps, manifold, anchored, layout)
    _call("mhc_pre", streams, (streams, _wide(phi), _wide(scale), _wide(bias), *outputs), *constants)
    return outputs


# The paper's split is another lowering of the same function.
paper_pre = pre


def measure(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """See `reference.measure`."""
    streams = streams.contiguous()
    outputs = _coefficients(streams, bias)
    constants = _site(streams, iters, norm_eps, eps, manifold, anchored, layout)
    _call("mhc_pre", streams, (streams, _wide(phi), _wide(scale), _wide(bias), None, *outputs), *constants)
    return outputs


def collapse(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    post: Tensor,
    res: Tensor,
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """See `reference.collapse`."""
    streams = streams.contiguous()
    layer_input = _value_like(streams)
    constants = _site(streams, iters, norm_eps, eps, manifold, anchored, layout)
    tensors = (streams, _wide(scale), _wide(bias), _wide(projection), layer_input)
    _call("mhc_collapse", streams, tensors, *constants)
    return layer_input, post.clone(), res.clone()


def pre_backward(
    grad_layer_input: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """See `reference.pre_backward`."""
    streams = streams.contiguous()
    grads = (_like(grad_layer_input, streams), _wide(grad_post), _wide(grad_res))
    grad_streams, mapping = torch.empty_like(streams), (_wide(phi), _wide(scale), _wide(bias))
    grad_mapping = _empty(mapping)
    constants = _site(streams, iters, norm_eps, eps, manifold, anchored, layout)
    tensors = (*grads, streams, *mapping, _wide(projection), grad_streams, *grad_mapping)
    _call("mhc_pre_backward", streams, tensors, *constants)
    return (grad_streams, *_as(grad_mapping, (phi, scale, bias)))


def head(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float,
    eps: Eps,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, Tensor]:
    """See `reference.head`."""
    streams = streams.contiguous()
    output = _value_like(streams)
    projection = streams.new_empty(*streams.shape[:-2], layout.rows(phi) + 1, dtype=torch.float32)
    tensors = (streams, _wide(phi), _wide(scale), _wide(bias), output, None, None, projection)
    _call("mhc_pre", streams, tensors, *_sizes(streams), 0, norm_eps, _held(eps), _head(anchored, layout))
    return output, projection


def head_backward(
    grad_output: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    norm_eps: float,
    eps: Eps,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Tensor, ...]:
    """See `reference.head_backward`."""
    streams = streams.contiguous()
    grad_streams, mapping = torch.empty_like(streams), (_wide(phi), _wide(scale), _wide(bias))
    grad_mapping = _empty(mapping)
    grad = _like(grad_output, streams)
    tensors = (grad, None, None, streams, *mapping, _wide(projection), grad_streams, *grad_mapping)
    _call("mhc_pre_backward", streams, tensors, *_sizes(streams), 0, norm_eps, _held(eps), _head(anchored, layout))
    return (grad_streams, *_as(grad_mapping, (phi, scale, bias)))


def post(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """See `reference.post`."""
    if _wider(branch, streams):
        return _plain(reference.post, streams, branch, post, res)
    streams = streams.contiguous()
    result = torch.empty_like(streams)
    tensors = (streams, _like(branch, streams), _wide(post), _wide(res), result)
    _call("mhc_post", streams, tensors, *_sizes(streams))
    return result


def post_backward(
    grad_streams: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, ...]:
    """See `reference.post_backward`."""
    if _wider(branch, streams):
        return _plain(reference.post_backward, grad_streams, streams, branch, post, res)
    streams = streams.contiguous()
    tensors = (streams, _like(branch, streams), _wide(post), _wide(res))
    grads = _empty(tensors)
    _call("mhc_post_backward", streams, (_like(grad_streams, streams), *tensors, *grads), *_sizes(streams))
    return (grads[0], *_as(grads[1:], (branch, post, res)))


def post_pre(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    *constants: Any,
) -> tuple[Tensor, ...]:
    """See `boundary.post_pre`."""
    if _wider(branch, streams):
        return _plain_site(boundary.post_pre, (streams, branch, post, res, phi, scale, bias), 4, *constants)
    streams = streams.contiguous()
    outputs = (torch.empty_like(streams), _value_like(streams), *_coefficients(streams, bias))
    wide = (_wide(tensor) for tensor in (post, res, phi, scale, bias))
    _call("mhc_post_pre", streams, (streams, _like(branch, streams), *wide, *outputs), *_site(streams, *constants))
    return outputs


def post_measure(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    *constants: Any,
) -> tuple[Tensor, ...]:
    """See `boundary.post_measure`."""
    if _wider(branch, streams):
        return _plain_site(boundary.post_measure, (streams, branch, post, res, phi, scale, bias), 4, *constants)
    streams = streams.contiguous()
    outputs = _coefficients(streams, bias)
    wide = (_wide(tensor) for tensor in (post, res, phi, scale, bias))
    tensors = (streams, _like(branch, streams), *wide, torch.empty_like(streams), None, *outputs)
    _call("mhc_post_pre", streams, tensors, *_site(streams, *constants))
    return outputs


def post_collapse(
    streams: Tensor,
    branch: Tensor,
    post: Tensor,
    res: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    next_post: Tensor,
    next_res: Tensor,
    projection: Tensor,
    *constants: Any,
) -> tuple[Tensor, ...]:
    """See `boundary.post_collapse`."""
    if _wider(branch, streams):
        given = (streams, branch, post, res, phi, scale, bias, next_post, next_res, projection)
        return _plain_site(boundary.post_collapse, given, 4, *constants)
    streams = streams.contiguous()
    fresh, layer_input = torch.empty_like(streams), _value_like(streams)
    wide = (_wide(tensor) for tensor in (post, res, scale, bias, projection))
    tensors = (streams, _like(branch, streams), *wide, fresh, layer_input)
    _call("mhc_post_collapse", streams, tensors, *_site(streams, *constants))
    return fresh, layer_input, next_post.clone(), next_res.clone()


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
    projection: Tensor,
    *constants: Any,
) -> tuple[Tensor, ...]:
    """See `boundary.post_pre_backward`."""
    inputs = (streams, branch, post, res, phi, scale, bias)
    grads: tuple[Tensor, ...] = (grad_fresh, grad_layer_input, grad_next_post, grad_next_res)
    if _wider(branch, streams):
        given = (*grads, *inputs, projection)
        *results, grad_phi, grad_scale, grad_bias = _plain_site(boundary.post_pre_backward, given, 8, *constants)
        return (*results, grad_phi.mT if phi.shape != grad_phi.shape else grad_phi, grad_scale, grad_bias)
    streams = streams.contiguous()
    grads = (_like(grad_fresh, streams), _like(grad_layer_input, streams), _wide(grad_next_post), _wide(grad_next_res))
    tensors = (streams, _like(branch, streams), *(_wide(tensor) for tensor in inputs[2:]))
    results = _empty(tensors)
    given = (*grads, *tensors, _wide(projection), torch.empty_like(streams), *results)
    _call("mhc_post_pre_backward", streams, given, *_site(streams, *constants))
    return (results[0], *_as(results[1:], inputs[1:]))


def _site(
    streams: Tensor,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> tuple[Any, ...]:
    return (*_sizes(streams), iters, norm_eps, _held(eps), _flags(manifold, eps, anchored, layout))


@functools.cache
def _held(eps: Eps) -> HeldEpsilons:
    return HeldEpsilons(*epsilons(eps))


def _head(anchored: bool, layout: PhiLayout) -> int:
    return _HEAD | _GATED | _ANCHORED * anchored | _COLUMNS * layout.columns


def _flags(manifold: str, eps: Eps, anchored: bool, layout: PhiLayout) -> int:
    family = MANIFOLDS[manifold]
    mixing = _MIXES * family.mixes | _MATRICES[family.kernel_matrix or "logits"]
    stored = _TRANSPOSED * (layout.transposed and family.logits is None) | _COLUMNS * layout.columns
    return _ANCHORED * anchored | _GATED * family.gated | mixing | _EXACT * family.rows_are_exact(eps) | stored


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _like(tensor: Tensor, streams: Tensor) -> Tensor:
    return tensor.to(streams.dtype).contiguous()


def _wider(branch: Tensor, streams: Tensor) -> bool:
    """Whether a branch would lose precision in the streams' dtype."""
    return torch.promote_types(branch.dtype, streams.dtype) != streams.dtype


def _plain(function: Callable[..., Any], *arguments: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return function(*arguments)


def _plain_site(
    function: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    phi_at: int,
    iters: int,
    norm_eps: float,
    eps: Eps,
    manifold: str,
    anchored: bool = False,
    layout: PhiLayout = ROWS_FIRST,
) -> Any:
    phi = tensors[phi_at].mT if layout.columns else tensors[phi_at]
    given = (*tensors[:phi_at], phi, *tensors[phi_at + 1 :])
    own, sinkhorn_eps = (eps.pre, eps[1:]) if isinstance(eps, Epsilons) else (eps, ())
    return _plain(function, *given, iters, norm_eps, own, manifold, anchored, layout.transposed, sinkhorn_eps)


def _empty(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in tensors)


def _as(tensors: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(model.dtype) for tensor, model in zip(tensors, like, strict=True))


def _value_like(streams: Tensor) -> Tensor:
    return streams.new_empty(*streams.shape[:-2], streams.shape[-1])


def _coefficients(streams: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Return memory for post, res and the projection."""
    *tokens, n, _ = streams.shape
    shapes = ((n,), (n, n), (bias.shape[0] + 1,))
    return tuple(streams.new_empty(*tokens, *shape, dtype=torch.float32) for shape in shapes)


def _tokens(tensor: Tensor, per_token: int) -> int:
    """Return the product of a tensor's leading sizes, its last `per_token` ones left out."""
    return tensor.shape[:-per_token].numel()


def _sizes(streams: Tensor) -> tuple[int, int]:
    return _tokens(streams, 2), streams.shape[-1]


def _call(name: str, streams: Tensor, tensors: tuple[Tensor | None, ...], *constants: Any) -> None:
    compiled = library(streams.shape[-2], streams.dtype)
    if isinstance(compiled, BuildError):
        raise compiled
    # The tensors outlive the call: the caller holds them.
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    if getattr(compiled, name)(*pointers, *constants, torch.get_num_threads()):
        raise MemoryError(f"{name}: no memory for scratch")
