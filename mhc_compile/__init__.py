"""mhc-compile: rewrite any PyTorch model's residual stream into manifold-constrained hyper-connections.

    compiled = torch.compile(model, backend="mhc")

Names are resolved on first use: `import torch` loads this module (for its TORCH_LOGS artifacts), and must not pay
for the rest of the package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    ConfigMismatchError,
    GraphInvariantError,
    MHCError,
    MHCOptionError,
    MHCWarning,
    NoResidualError,
    NotAttachedError,
    OptimizerError,
    OwnerError,
    StreamCutError,
    UnrewrittenCallError,
)

if TYPE_CHECKING:
    from . import distributed, functional
    from .api import attach, detach, explain, param_groups, parameters, report, reset_parameters
    from .attachment.optimizers import check_optimizer
    from .config import MHCConfig
    from .sharing.exporting import export
    from .sharing.saving import from_pretrained, save_pretrained
    from .watching.inspection import inspect
    from .watching.trainer_callback import MHCCallback

__version__ = "0.1.0"

_LAZY = {
    "MHCCallback": "watching.trainer_callback",
    "MHCConfig": "config",
    "attach": "api",
    "check_optimizer": "attachment.optimizers",
    "detach": "api",
    "explain": "api",
    "export": "sharing.exporting",
    "inspect": "watching.inspection",
    "from_pretrained": "sharing.saving",
    "param_groups": "api",
    "parameters": "api",
    "report": "api",
    "reset_parameters": "api",
    "save_pretrained": "sharing.saving",
}

__all__ = [
    "ConfigMismatchError",
    "GraphInvariantError",
    "MHCCallback",
    "MHCConfig",
    "MHCError",
    "MHCOptionError",
    "MHCWarning",
    "NoResidualError",
    "NotAttachedError",
    "OptimizerError",
    "OwnerError",
    "StreamCutError",
    "UnrewrittenCallError",
    "attach",
    "check_optimizer",
    "detach",
    "distributed",
    "explain",
    "export",
    "from_pretrained",
    "functional",
    "inspect",
    "param_groups",
    "parameters",
    "report",
    "reset_parameters",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name in ("distributed", "functional"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
