"""Every error and warning of the package. Each message names the cause and what to do next."""


class MHCError(RuntimeError):
    """Base of every error that mhc-compile raises."""


class MHCOptionError(MHCError, ValueError):
    """An option is unknown, or its value is out of range."""


class NoResidualError(MHCError):
    """No residual add could be rewritten, and `strict` is on."""


class ConfigMismatchError(MHCError):
    """The options differ from those the mHC parameters were made for."""


class NotAttachedError(MHCError):
    """The model has no mHC parameters."""


class StreamCutError(MHCError):
    """A graph break or a higher-order operator cuts the residual stream."""


class UnrewrittenCallError(MHCError):
    """The plain forward of a model that carries mHC parameters was about to run."""


class OwnerError(MHCError):
    """The module that holds a residual add cannot be told, so its parameters have no home."""


class GraphInvariantError(MHCError):
    """A rewriting pass left the graph in a state that its contract forbids: a bug of mhc-compile."""


class OptimizerError(MHCError):
    """An optimizer steps the model's parameters but not its mHC parameters."""


class MHCWarning(UserWarning):
    """Something works, but probably not as intended."""
