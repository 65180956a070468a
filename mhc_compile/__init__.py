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

__version__ = "0.1.0"

_LAZY = {
    "MHCConfig": "config",
    "attach": "api",
    "check_optimizer": "attachment.optimizers",
    "detach": "api",
    "explain": "api",
    "param_groups": "api",
    "parameters": "api",
    "report": "api",
    "reset_parameters": "api",
}

__all__ = [
    "ConfigMismatchError",
    "GraphInvariantError",
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
    "functional",
    "param_groups",
    "parameters",
    "report",
    "reset_parameters",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name in ("distributed", "functional"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
