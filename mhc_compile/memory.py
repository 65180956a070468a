"""What has to outlive one call of the backend, in one place: nothing here keeps a model alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .planning.call_counts import Calls
    from .planning.graph_breaks import Break
    from .reports.reporting import Report


@dataclass
class Memory:
    """The state of the package.

    Attributes:
        breaks: graph breaks of forwards that are still running, oldest first; a new call of a model forgets its own.
        undo: for a model that a first call has given parameters, what takes them off again; dropped once the call has
            compiled.
        calls: for a model, how often its shared modules were called before a graph break, by the break's line.
        reports: what was last reported on a model.
        plain: modules whose residual adds a compilation has left plain: their compiled code must not outlive `attach`.
        watched: models whose optimizers are checked at their next step.
        checked: optimizers that have been checked since a model was last watched.
        stale_codes: code objects for which Dynamo still holds what a look has left.
    """

    breaks: list[Break] = field(default_factory=list)
    undo: weakref.WeakKeyDictionary[nn.Module, list[Callable[[], None]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    calls: weakref.WeakKeyDictionary[nn.Module, dict[int, Calls]] = field(default_factory=weakref.WeakKeyDictionary)
    reports: weakref.WeakKeyDictionary[nn.Module, Report] = field(default_factory=weakref.WeakKeyDictionary)
    plain: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    watched: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    checked: weakref.WeakSet[torch.optim.Optimizer] = field(default_factory=weakref.WeakSet)
    stale_codes: set[CodeType] = field(default_factory=set)

    def take_back(self, root: nn.Module) -> None:
        """Take off what first calls have attached to a model that could not be compiled after all."""
        for undo in reversed(self.undo.pop(root, [])):
            undo()


MEMORY = Memory()
