"""The promise: once a model carries mHC parameters, its plain forward never runs silently.

A forward pre-hook on every module that owns mHC parameters, and on the children whose output its adds write, calls
the operator `mhc::sentinel`. The operator raises. Inside a graph that backend="mhc" compiles, the rewrite takes the
sentinel out together with the add it guards; on any other way to run the module, eagerly, behind a recompile limit or
a graph break, under `suppress_errors`, on another backend, in an exported program, the operator is still there.

A check that asks "am I being compiled?" would not do: Dynamo traces it into a frame that later falls back.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnrewrittenCallError
from .site_parameters import parameters_of

_LIBRARY = torch.library.Library("mhc", "FRAGMENT")
_LIBRARY.define("sentinel(str owner, str[] labels, bool only_inside_owner) -> ()")


@dataclass(frozen=True)
class Sentinel:
    """The hook: calls the operator, so that every tracer sees it.

    Attributes:
        owner: path of the module that owns the sites.
        labels: the sites' labels below that owner.
        only_inside_owner: sits on a child, which may well be called alone: raises only while the owner's own
            forward is running.
    """

    owner: str
    labels: tuple[str, ...]
    only_inside_owner: bool

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Run before the module's forward."""
        torch.ops.mhc.sentinel.default(self.owner, list(self.labels), self.only_inside_owner)


def raise_if_plain(owner: str, labels: list[str], only_inside_owner: bool) -> None:
    """Refuse to run the plain forward of a module that carries mHC parameters.

    Raises:
        UnrewrittenCallError: always, or for a child's sentinel while its owner's forward is on the stack.
    """
    if only_inside_owner and not _owner_is_running(labels):
        return
    name = owner or "the model"
    which = f" ({', '.join(labels)})" if labels else ""
    raise UnrewrittenCallError(
        f"the plain forward of {name} was about to run, although it carries mHC parameters{which}: the "
        "result would not be the rewritten model's. Call the compiled model "
        "(torch.compile(model, backend='mhc'), or model.compile(backend='mhc') so that generate() and Trainer use it "
        "too). If it was called compiled, Dynamo fell back: look for a graph break or a recompile limit with "
        "TORCH_LOGS=graph_breaks,recompiles. mhc_compile.detach(model) gives back the plain model."
    )


def _owner_is_running(labels: list[str]) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        arguments = frame.f_code.co_varnames[: min(frame.f_code.co_argcount, 1)]
        candidate = frame.f_locals.get(arguments[0]) if arguments else None
        if isinstance(candidate, nn.Module):
            parameters = parameters_of(candidate)
            if parameters is not None and any(label in parameters._modules for label in labels):
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_LIBRARY.impl("sentinel", raise_if_plain, "CompositeExplicitAutograd")
torch.library.register_fake("mhc::sentinel", lambda owner, labels, only_inside_owner: None, lib=_LIBRARY)
# Without tensors in or out, every dead-code elimination would drop it.
torch.fx.node.has_side_effect(torch.ops.mhc.sentinel.default)


def arm(owner_path: str, owner: nn.Module, children: dict[str, list[nn.Module]]) -> None:
    """Put sentinels on an owner and on the children that its sites' labels come from.

    A child's sentinel catches what the owner's cannot: the owner's forward resuming behind a graph break, plain,
    when its pre-hook has long been traced.
    """
    parameters = parameters_of(owner)
    assert parameters is not None
    _disarm(owner)
    labels = tuple(label for label in parameters._modules)
    owner.register_forward_pre_hook(Sentinel(owner_path, labels, only_inside_owner=False))
    for label, modules in children.items():
        for child in modules:
            if not any(isinstance(hook, Sentinel) for hook in child._forward_pre_hooks.values()):
                child.register_forward_pre_hook(Sentinel(owner_path, (label,), only_inside_owner=True))


def arm_root(root: nn.Module) -> None:
    """Put a sentinel on the model itself, which no higher-order region hides from other compilers.

    In the body of an activation checkpoint a sentinel may be dropped as dead code.
    """
    if not any(isinstance(hook, Sentinel) for hook in root._forward_pre_hooks.values()):
        root.register_forward_pre_hook(Sentinel("", (), only_inside_owner=False))


def disarm(root: nn.Module) -> None:
    """Take every sentinel below `root` away."""
    for module in root.modules():
        _disarm(module)


def _disarm(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, Sentinel):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
