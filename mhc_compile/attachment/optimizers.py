"""Notice an optimizer that steps a model but not its mHC parameters: the mixing would never learn."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn

from ..errors import MHCWarning, NotAttachedError, OptimizerError
from ..memory import MEMORY
from .site_parameters import owners_in


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
        missing = _unowned(root, optimizer)
        if missing:
            warnings.warn(_unowned_message(missing), MHCWarning, stacklevel=3)


def _unowned(root: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the trainable mHC parameters that an optimizer of this model leaves out."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ours = {
        f"{path}.mhc.{name}".lstrip("."): parameter
        for path, _, parameters in owners_in(root)
        for name, parameter in parameters.named_parameters()
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
