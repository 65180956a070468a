"""Run a rewritten graph node by node and note the mixing matrices of its sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from ..kernels import ops
from ..kernels.anchored import release, released_mixing

assert ops.OPERATORS, "importing the table registers torch.ops.mhc"


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
        if target is torch.ops.mhc.pre.default:
            self.note(args[1], released_mixing(result[2]), release(args[0]))
        return result
