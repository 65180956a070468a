"""The promise: once a model carries mHC parameters, its plain forward never runs silently.

A forward pre-hook on every module that owns mHC parameters, and on the children whose output its adds write, calls
the operator `mhc::sentinel`. The operator raises. Inside a graph that backend="mhc" compiles, the rewrite takes the
sentinel out together with the add it guards; on any other way to run the module, eagerly, behind a recompile limit or
a graph break, under `suppress_errors`, on another backend, in an exported program, the operator is still there.

A check that asks "am I being compiled?" would not do: Dynamo traces it into a frame that later falls back.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import MHCWarning, NotAttachedError, OptimizerError, UnrewrittenCallError
from .mappings import mappings_of, owners_in

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
            mappings = mappings_of(candidate)
            if mappings is not None and any(label in mappings._modules for label in labels):
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
    mappings = mappings_of(owner)
    assert mappings is not None
    _disarm(owner)
    labels = tuple(label for label in mappings._modules)
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


_CHECKED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch_optimizers(root: nn.Module) -> None:
    """Report, once an optimizer steps the parameters of `root`, if it does not own its mHC parameters."""
    _hook_optimizers()
    _WATCHED.add(root)
    _CHECKED.clear()


@functools.cache
def _hook_optimizers() -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _CHECKED:
        return
    _CHECKED.add(optimizer)
    for root in list(_WATCHED):
        missing = _unowned(root, optimizer)
        if missing:
            warnings.warn(_unowned_message(missing), MHCWarning, stacklevel=3)


def _unowned(root: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the trainable mHC parameters that an optimizer of this model leaves out."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ours = {
        f"{path}.mhc.{name}".lstrip("."): parameter
        for path, _, mappings in owners_in(root)
        for name, parameter in mappings.named_parameters()
    }
    mine = {id(parameter) for parameter in ours.values()}
    steps_this_model = any(id(p) in owned and id(p) not in mine for p in root.parameters())
    if not steps_this_model:
        return []
    return [name for name, p in ours.items() if p.requires_grad and id(p) not in owned]


def _unowned_message(missing: list[str]) -> str:
    return (
        f"the optimizer steps the model but not {len(missing)} of its mHC parameters ({missing[0]}, …), so the "
        "mixing will never learn. Call mhc_compile.attach(model, example_input) before building the optimizer, or "
        "add mhc_compile.param_groups(model, weight_decay=…) to it."
    )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer owns every trainable mHC parameter of a model.

    Raises:
        NotAttachedError: the model has no mHC parameters.
        OptimizerError: some are missing; the message names how to add them.
    """
    if next(iter(owners_in(model)), None) is None:
        raise NotAttachedError("the model has no mHC parameters: call mhc_compile.attach(model, example_input).")
    missing = _unowned(model, optimizer)
    if missing:
        raise OptimizerError(_unowned_message(missing))
