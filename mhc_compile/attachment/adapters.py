"""Adapters of peft: mHC parameters that are made on an adapted model belong to its adapter, or they would not be saved.

peft saves what its adapter is, and what its option `modules_to_save` names. Attached first, a model is adapted with
`LoraConfig(…, modules_to_save=["mhc"])`; adapted first, `attach` does the same here.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .site_parameters import CHILD, OwnedParameters, owners_in


def join_adapter(root: nn.Module) -> None:
    """Hand the mHC parameters below an adapted model to its active adapter; nothing for any other model."""
    adapted = _adapted(root)
    if adapted is None:
        return
    from peft.utils.other import ModulesToSaveWrapper

    name = adapted.active_adapter
    for _, owner, _ in list(owners_in(root)):
        if isinstance(owner._modules[CHILD], OwnedParameters):
            wrapper = ModulesToSaveWrapper(owner._modules[CHILD], name)
            wrapper.set_adapter(name)
            owner._modules[CHILD] = wrapper
    options = adapted.peft_config[name]
    options.modules_to_save = [*dict.fromkeys([*(options.modules_to_save or ()), CHILD])]


def is_adapted(root: nn.Module) -> bool:
    """Return whether a model has layers of peft."""
    peft = sys.modules.get("peft")
    return peft is not None and any(
        isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in root.modules()
    )


def _adapted(root: nn.Module) -> Any:
    """Return the model of peft that adapts another below `root`, if its kind of adapter can hold further modules."""
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    for module in root.modules():
        if isinstance(module, peft.PeftModel):
            name = module.active_adapter
            if isinstance(name, str) and hasattr(module.peft_config[name], "modules_to_save"):
                return module
    return None
