"""Let streams cross from one pipeline stage to the next: n streams of width C travel as one tensor [*, n·C].

A pipeline sends what a stage's module returns, and knows nothing of the streams beside it. `stage` puts hooks on the
module: one packs the streams of what it returns, one unpacks them again at the other end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attachment.site_parameters import OwnedParameters, Role, SiteParameters, owners_in
from ..carried_streams import STREAMS
from ..errors import MHCError, NotAttachedError, StreamCutError


def stage(module: nn.Module) -> nn.Module:
    """Make a module a stage of a pipeline, which receives and sends streams where the model's chain is cut.

    Call `attach` on the whole model first, then cut it into stages (by deleting layers, or into modules of their own),
    and give each to this function: whether a stage receives and sends streams follows from the sites that it holds. It
    may be compiled whole or block by block. The stream is the stage's first argument, [*, n·C], and its result or the
    first of its results.

    Args:
        module: one stage, with the mHC parameters that `attach` gave the whole model.

    Returns:
        The module itself, with hooks; names in its `state_dict` are unchanged.

    Raises:
        NotAttachedError: no module of the stage has mHC parameters.
        MHCError: the module is a stage already.
    """
    sites = [
        (site, owned)
        for _, _, owned in owners_in(module)
        for site in owned._modules.values()
        if isinstance(site, SiteParameters) and site.role != Role.READOUT.value
    ]
    if not sites:
        raise NotAttachedError(
            "this stage has no mHC parameters: call mhc_compile.attach(model, example_input) on the whole model, and "
            "cut it into stages afterwards. A stage without residual blocks needs no mhc_compile.distributed.stage."
        )
    if any(isinstance(hook, _Arrival | _Departure) for hook in _hooks(module)):
        raise MHCError("this module is a stage already: mhc_compile.distributed.stage(module) is called once.")
    (first, owned), (last, _) = sites[0], sites[-1]
    if not Role(first.role).begins:
        module.register_forward_pre_hook(_Arrival(first, owned))
    if not Role(last.role).ends:
        module.register_forward_hook(_Departure(last))
    return module


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


class _Arrival:
    """Takes the streams out of what a stage receives."""

    def __init__(self, site: SiteParameters, owned: OwnedParameters) -> None:
        self.site = site
        self.n = owned.config.n_streams
        self.width = site.start.shape.width

    @torch._dynamo.disable(reason="mHC streams arrive from another pipeline stage")
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        packed = args[0] if args else None
        if not isinstance(packed, Tensor) or not packed.is_floating_point():
            raise StreamCutError(
                f"the stage that begins before {self.site.name} was given {_described(packed)} as its first argument, "
                f"where it takes {self._wanted()}."
            )
        if packed.shape[-1] != self.n * self.width:
            raise StreamCutError(
                f"the stage that begins before {self.site.name} has received {_described(packed)}, and takes "
                f"{self._wanted()}. The stage before it sends something else: give every stage to "
                "mhc_compile.distributed.stage, and attach before cutting the model."
            )
        streams = _Contiguous.apply(packed).unflatten(-1, (self.n, self.width))
        # Anchored: stream 0, and the differences of the others from it.
        visible = streams[..., 0, :] + streams[..., 1:, :].sum(-2) / self.n
        STREAMS.put(visible, streams, f"the start of a pipeline stage ({self.site.name})")
        return (visible, *args[1:])

    def _wanted(self) -> str:
        return f"{self.n} streams of width {self.width} as one tensor [*, {self.n * self.width}]"


class _Departure:
    """Packs the streams of what a stage returns."""

    def __init__(self, site: SiteParameters) -> None:
        self.site = site

    @torch._dynamo.disable(reason="mHC streams leave for another pipeline stage")
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        several = isinstance(output, tuple | list)
        visible = output[0] if several and output else output
        if not isinstance(visible, Tensor):
            raise StreamCutError(
                f"the stage that ends behind {self.site.name} returns {type(output).__name__}, where its hidden state "
                "is to be its result, or the first of a tuple."
            )
        streams = STREAMS.take(visible, f"the end of the pipeline stage behind {self.site.name}")
        packed = _Packed.apply(streams)
        return type(output)((packed, *output[1:])) if several else packed


class _Contiguous(torch.autograd.Function):
    """Hands back a contiguous gradient: point-to-point sends take no other."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class _Packed(torch.autograd.Function):
    """Flattens streams [*, n, C] to [*, n·C].

    The result is no view, since schedules that split the backward detach it in place.
    """

    @staticmethod
    def forward(ctx: Any, streams: Tensor) -> Tensor:
        ctx.form = streams.shape
        flat = streams.flatten(-2)
        return flat.new_empty(0).set_(flat.untyped_storage(), flat.storage_offset(), flat.shape, flat.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.reshape(ctx.form)


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
