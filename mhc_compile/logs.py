"""The `TORCH_LOGS` artifacts of the package: `mhc_report`, `mhc_passes` and `mhc_memory`.

`autoload` runs inside `import torch` (entry point group "torch.backends"), just before TORCH_LOGS is parsed. An
exception there would break `import torch` itself, so it stays tiny and swallows what it cannot do.
"""

from __future__ import annotations

import logging

# torch gives handlers to its own loggers alone, and artifacts propagate to them: so ours hang below "torch".
_PARENT = "torch.mhc_compile"

ARTIFACTS = {
    "mhc_report": "What backend='mhc' rewrote, what it left alone and why, per graph",
    "mhc_passes": "The graph as it was captured and behind each pass of backend='mhc', with times",
    "mhc_memory": "What the forward saves and what the backward computes again, with bytes and source lines",
}


def autoload() -> None:
    """Register the artifacts, if this version of torch lets us."""
    try:
        from torch._logging._internal import getArtifactLogger, register_artifact

        for name, description in ARTIFACTS.items():
            register_artifact(name, description, visible=True, off_by_default=True)
            # Known before TORCH_LOGS is parsed, a logger is given its level then.
            getArtifactLogger(_PARENT, name)
    except Exception:
        logging.getLogger(__name__).debug("the TORCH_LOGS artifacts are not available", exc_info=True)


def artifact(name: str) -> logging.Logger:
    """Return the logger of an artifact; with autoloading switched off, a plain logger of the same name."""
    from torch._logging import getArtifactLogger

    try:
        return getArtifactLogger(_PARENT, name)
    except ValueError:
        return logging.getLogger(f"{_PARENT}.{name}")
