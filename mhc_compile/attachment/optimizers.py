"""Notice an optimizer that steps a model but not its mHC parameters: the mixing would never learn."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn

from ..errors import MHCWarning, NotAttachedError, OptimizerError
from ..memory import MEMORY
from .adapters import is_adapted
from .site_parameters import named_parameters, owners_in


def watch_optimizers(root: nn.Module) -> None:
    """Report, once an optimizer steps the parameters of `root`, if it does not own its mHC parameters."""
    _hook_optimizers()
    MEMORY.watched.add(root)
    MEMORY.checked.clear()


@functools.cache
def _hook_optimizers() -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in MEMORY.checked:
        return
    MEMORY.checked.add(optimizer)
    for root in list(MEMORY.watched):
        for message in _complaints(root, optimizer):
            warnings.warn(message, MHCWarning, stacklevel=3)


def _complaints(root: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Say what is wrong with how an optimizer treats the mHC parameters of a model, if it steps that model."""
    ours = named_parameters(root)
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    mine = {id(parameter) for parameter in ours.values()}
    if not any(id(parameter) in owned and id(parameter) not in mine for parameter in root.parameters()):
        return []
    missing = _unowned(ours, optimizer)
    complaints = [_unowned_message(missing)] if missing else []
    if is_adapted(root) and not any(parameter.requires_grad for parameter in ours.values()):
        complaints.append(
            "the adapter trains, but every mHC parameter is frozen, so the mixing will never learn. Give peft's "
            'configuration modules_to_save=["mhc"]: they are then trained, and saved with the adapter.'
        )
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups if group.get("weight_decay")
               for p in group["params"]}  # fmt: skip
    pulled = [name for name, p in ours.items() if not name.endswith(".phi") and id(p) in decayed]
    if pulled:
        complaints.append(
            f"weight decay {max(decayed.values()):g} pulls {len(pulled)} mHC parameters that should not decay towards "
            f"zero ({pulled[0]}, …). Build the optimizer with mhc_compile.param_groups(model, weight_decay=…); "
            "Hugging Face's Trainer gets its groups right with callbacks=[mhc_compile.MHCCallback()]."
        )
    return complaints


def _unowned(ours: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of trainable parameters that an optimizer leaves out."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [name for name, parameter in ours.items() if parameter.requires_grad and id(parameter) not in owned]


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
    missing = _unowned(named_parameters(model), optimizer)
    if missing:
        raise OptimizerError(_unowned_message(missing))
