"""Shard mHC parameters with FSDP2 in a group of their own, which stays in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..attachment.site_parameters import owners_in
from ..errors import MHCError, NotAttachedError


def shard_parameters(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> None:
    """Shard the mHC parameters of a model as one FSDP2 group in float32.

    FSDP2 casts a group to the `param_dtype` of its policy, and takes no group of two dtypes: within the group of their
    block, mHC parameters would be rounded to bf16, or refused in a bf16 model. In this group they are gathered once at
    the model's forward and reduced once behind its backward: at width C and n streams a site has (n² + 2n)(n·C + 1)
    values, 0.2 % of a Llama's block of width 4096.

    Call it between `attach` and the first `fully_shard`; the model itself has to be given to `fully_shard` as well.

    Args:
        model: the model that `fully_shard` will be called on last, with mHC parameters.
        mesh: the data-parallel mesh, as for `fully_shard`.
        **options: further arguments of `fully_shard`, such as `offload_policy`. `reshard_after_forward` is False.

    Raises:
        NotAttachedError: the model has no mHC parameters.
        MHCError: some of them are sharded already, or the options name a mixed precision policy.
    """
    groups = [owned for _, _, owned in owners_in(model)]
    if not groups:
        raise NotAttachedError(
            "the model has no mHC parameters to shard: call mhc_compile.attach(model, example_input) first."
        )
    if "mp_policy" in options:
        raise MHCError("mHC parameters are kept in float32: leave mp_policy to the fully_shard calls of the blocks.")
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group.parameters()):
        raise MHCError(
            "mHC parameters are sharded already, together with their blocks: call "
            "mhc_compile.distributed.shard_parameters(model) before the first fully_shard."
        )
    options = {"reshard_after_forward": False, **options}
    # The policy that casts inputs would do so at a forward that never runs.
    fully_shard(groups, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
    model.register_forward_pre_hook(_Unshard(groups[0]))


class _Unshard:
    """Gathers the group of mHC parameters when the model begins, since no forward of theirs does.

    FSDP2 reduces their gradients and frees them behind the backward, as for every group whose forward has not run.
    """

    def __init__(self, group: nn.Module) -> None:
        self.group = group

    @torch._dynamo.disable(reason="FSDP2 gathers parameters outside of compiled code")
    def __call__(self, module: nn.Module, args: Any) -> None:
        self.group.unshard()  # type: ignore[operator]
