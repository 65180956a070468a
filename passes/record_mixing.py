"""Run a rewritten graph node by node and note the mixing matrices of its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from ..kernels import ops
from ..kernels.anchored import release, released_mixing

# Where the operators that compute a site's coefficients return res.
_RES = {
    getattr(torch.ops.mhc, name).default: ops.OPERATORS[name].signature.results.index("res")
    for name in ("pre", "measure")
}


class MixingRecorder(Interpreter):
    """Interprets a rewritten graph whose sites run `pre` as an operator.

    Attributes:
        note: is told phi, res and the streams of every `pre`, in order; res [*, n, n] (`res[out, in]`) and streams
            [*, n, C] are released. phi tells which site it is.
    """

    def __init__(self, graph_module: GraphModule, note: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        """Tell `note`."""
        super().__init__(graph_module)
        self.note = note

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator."""
        result = super().call_function(target, args, kwargs)
        if target in _RES:
            self.note(args[1], released_mixing(result[_RES[target]]), release(args[0]))
        return result
