"""Other packages' operators behind the signatures of ours: which layouts they take, and how their results map back.

Orientation is the easiest thing to get wrong. Ours is `res[out, in]`, columns normalized first and rows last. Both
packages normalize the last axis of what they are given first. Given the transposed logits they compute the transposed
matrix, by the same iteration.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problems import ITERS, NORM_EPS, Shape

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Adapter:
    """One package.

    Attributes:
        name: of the package in the index.
        module: what to import.
        operators: of ours that it has.
        refuses: why it cannot take a shape, None if it can.
        convert: (operator, our tensors) -> tensors in its layout; differentiable.
        call: (operator, its tensors) -> its outputs: what is timed.
        restore: (operator, its outputs) -> outputs in our layout; differentiable.
    """

    name: str
    module: str
    operators: tuple[str, ...]
    refuses: Callable[[Shape], str | None]
    convert: Callable[[str, Tensors], Tensors]
    call: Callable[[str, Tensors], Tensors]
    restore: Callable[[str, Tensors], Tensors]

    @property
    def installed(self) -> bool:
        """Whether the package can be imported."""
        return importlib.util.find_spec(self.module) is not None

    def as_ours(self, operator: str) -> Callable[..., Any]:
        """Return a function with the signature of our operator, to check the package's results with."""

        def run(*arguments: Any) -> Tensors:
            tensors = tuple(argument for argument in arguments if isinstance(argument, Tensor))
            return self.restore(operator, self.call(operator, self.convert(operator, tensors)))

        return run


def transposed_mapping(phi: Tensor, bias: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return phi [n² + 2n, n·C] and bias with the rows of res in the order of the transposed matrix."""
    order = torch.arange(n * n, device=phi.device).reshape(n, n).mT.flatten() + 2 * n
    order = torch.cat([torch.arange(2 * n, device=phi.device), order])
    return phi[order], bias[order]


def _liger_refuses(shape: Shape) -> str | None:
    if shape.n & (shape.n - 1):
        return f"liger-kernel takes powers of two, not n={shape.n}"
    return None


def _liger_convert(operator: str, tensors: Tensors) -> Tensors:
    if operator == "post":
        return tensors
    *rest, phi, scale, bias = tensors
    streams = tensors[0]
    phi, bias = transposed_mapping(phi, bias, streams.shape[-2])
    # [n·C, rows], in the streams' dtype: with another, their kernel takes no tensor cores.
    phi = phi.mT.to(streams.dtype).contiguous()
    # Three scalars, not a tensor of three: `unbind` keeps the way back.
    return (*rest, phi, bias, *scale.unbind())


def _liger_call(operator: str, tensors: Tensors) -> Tensors:
    from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre

    if operator == "post":
        return (liger_mhc_post_res(*tensors),)
    fresh: Tensors = ()
    streams, *rest = tensors
    if operator == "post_pre":
        streams = liger_mhc_post_res(streams, *rest[:3])
        fresh, rest = (streams,), rest[3:]
    wide = streams.dtype == torch.float32
    pre, post, res = liger_mhc_coeffs(
        streams, *rest, allow_fp32=wide, tmax=ITERS, rms_eps=NORM_EPS, pre_eps=0.0, sinkhorn_eps=0.0, post_mult=2.0
    )
    return (*fresh, liger_mhc_pre(streams, pre), post, res)


def _transpose_res(operator: str, outputs: Tensors) -> Tensors:
    return outputs if operator == "post" else (*outputs[:-1], outputs[-1].mT)


def _tile_refuses(shape: Shape) -> str | None:
    if shape.operator == "sinkhorn":
        return None if shape.n == 4 else f"tile-kernels takes n=4, not {shape.n}"
    if shape.n != 4 or shape.width % 256 or shape.dtype != torch.bfloat16:
        return f"tile-kernels takes n=4, multiples of 256 channels and bfloat16, not {shape}"
    return None


def _tile_convert(operator: str, tensors: Tensors) -> Tensors:
    """Give everything two leading dimensions; post [*, n, 1]; res and its logits [*, in, out]."""
    if operator == "sinkhorn":
        return (tensors[0].mT.contiguous(),)
    streams = tensors[0].unsqueeze(0)
    converted: Tensors = (streams,)
    if operator in ("post", "post_pre"):
        _, branch, post, res = tensors[:4]
        through = (branch.unsqueeze(0), post.unsqueeze(0).unsqueeze(-1), res.mT.contiguous().unsqueeze(0))
        converted = (streams, *through)
    if operator == "post":
        return converted
    phi, scale, bias = tensors[-3:]
    phi, bias = transposed_mapping(phi, bias, streams.shape[-2])
    return (*converted, phi, scale, bias)


def _tile_call(operator: str, tensors: Tensors) -> Tensors:
    from tile_kernels.modeling.mhc.functional import mhc_post, mhc_pre, sinkhorn_normalize

    if operator == "sinkhorn":
        return (sinkhorn_normalize(tensors[0], repeat=ITERS, eps=0.0),)
    fresh: Tensors = ()
    streams, *rest = tensors
    if operator in ("post", "post_pre"):
        branch, post, res, *rest = rest
        streams = mhc_post(branch, streams, post, res)
        fresh = (streams,)
    if operator == "post":
        return fresh
    layer_input, (post, res) = mhc_pre(
        streams, *rest, norm_eps=NORM_EPS, mhc_mult=streams.shape[-2], post_mult_value=2.0,
        pre_eps=0.0, sinkhorn_eps=0.0, sinkhorn_repeat=ITERS,
    )  # fmt: skip
    return (*fresh, layer_input, post, res)


def _tile_restore(operator: str, outputs: Tensors) -> Tensors:
    if operator == "sinkhorn":
        return (outputs[0].mT,)
    if operator == "post":
        return (outputs[0].squeeze(0),)
    *fresh, layer_input, post, res = (output.squeeze(0) for output in outputs)
    return (*fresh, layer_input, post.squeeze(-1), res.mT)


ADAPTERS = (
    Adapter(
        "liger-kernel", "liger_kernel", ("post_pre", "pre", "post"),
        _liger_refuses, _liger_convert, _liger_call, _transpose_res,
    ),
    Adapter(
        "tile-kernels", "tile_kernels", ("post_pre", "pre", "post", "sinkhorn"),
        _tile_refuses, _tile_convert, _tile_call, _tile_restore,
    ),
)  # fmt: skip
