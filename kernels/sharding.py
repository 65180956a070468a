"""The operators on tensors that are divided over a device mesh: sharding rules, and parameters that enter a mesh.

Token dimensions may be sharded, n and C may not: an operator then runs on each rank's tokens alone. The parameters are
the same on every rank, and their gradients the sum of what the ranks compute.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.library import CustomOpDef

from .ops import OPERATORS, Signature

_PARAMETERS = {"phi", "scale", "bias", "norm_weight", "norm_bias"}


class _SumGradients(torch.autograd.Function):
    """Hands parameters on to each rank's part of the tokens, and sums their gradients over the ranks.

    All gradients travel in one message for each dimension of the mesh.
    """

    @staticmethod
    def forward(ctx: Any, mesh: DeviceMesh, dims: tuple[int, ...], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.over = mesh, dims
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        mesh, dims = ctx.over
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        for dim in dims:
            joined = collectives.all_reduce(joined, "sum", (mesh, dim))
        summed = joined.split([gradient.numel() for gradient in gradients])
        shaped = (piece.view(gradient.shape) for piece, gradient in zip(summed, gradients, strict=True))
        return (None, None, *shaped)


def sum_gradients(*parameters: Tensor, mesh: DeviceMesh, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return parameters whose gradients are summed over dimensions of a mesh. They have to have one dtype."""
    summed: tuple[Tensor, ...] = _SumGradients.apply(mesh, dims, *parameters)
    return summed


def replicated(*parameters: Tensor, mesh: DeviceMesh, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return parameters as DTensors that are the same on every rank; partial gradients are summed."""
    everywhere = [Replicate()] * mesh.ndim
    return tuple(DTensor.from_local(parameter, mesh, everywhere, run_check=False) for parameter in parameters)


@functools.cache
def register_sharding_rules() -> None:
    """Tell DTensor how the operators and their backwards may be sharded."""
    for operator in OPERATORS.values():
        _register(operator.forward, operator.signature)
        if operator.backward is not None:
            _register(operator.backward, operator.signature.backward)


def _register(definition: CustomOpDef, signature: Signature) -> None:
    register_sharding(definition._opoverload)(functools.partial(_acceptable, signature))


def _acceptable(signature: Signature, *arguments: Any) -> Sequence[tuple[list[Any], list[Any]]]:
    """Return the placements, for one dimension of a mesh, under which an operator runs on each rank alone."""
    position = next(index for index, name in enumerate(signature.tensors) if not name.startswith("grad_"))
    token_dims = arguments[position].ndim - 2
    constants = [None] * (len(arguments) - len(signature.tensors))
    backward = signature.tensors[0].startswith("grad_")

    def placed(placement: Any) -> tuple[list[Any], list[Any]]:
        inputs = [Replicate() if name in _PARAMETERS else placement for name in signature.tensors]
        summed = Partial() if placement.is_shard() else Replicate()
        outputs = [summed if backward and name in _PARAMETERS else placement for name in signature.results]
        return outputs, [*inputs, *constants]

    return [placed(Replicate()), *(placed(Shard(dim)) for dim in range(token_dims))]
