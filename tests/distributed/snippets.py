"""The README's snippets for several processes, each on a model of its own."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import mhc_compile

from .launch import run
from .models import llama, next_token_loss, tokens
from .pipelined import LlamaPart

README = Path(__file__).parents[2] / "README.md"
SNIPPETS = re.findall(r"^```py\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def cut(model: Any, rank: int) -> nn.Module:
    """Return this rank's half of a Llama."""
    return LlamaPart(model, range(rank, rank + 1))


def snippet(code: str) -> dict[str, Any]:
    """Run a snippet as it stands, but for what Inductor would take its time for."""
    model = llama()
    names = {"torch": torch, "mhc_compile": mhc_compile, "model": model, "ids": tokens(8), "rank": dist.get_rank()}
    quick = code.replace('backend="mhc"', 'backend="mhc", options={"inner": "aot_eager"}')
    with torch._dynamo.config.patch(optimize_ddp="ddp_optimizer"):
        exec(compile(quick, "README.md", "exec"), {**names, "cut": cut, "loss_fn": next_token_loss})
    gradients = {name: parameter.grad for name, parameter in mhc_compile.parameters(model).items()}
    return {"trained": sorted(name for name, gradient in gradients.items() if gradient is not None)}


CASES = {str(number): functools.partial(snippet, code) for number, code in enumerate(SNIPPETS)}

if __name__ == "__main__":
    run(snippets=CASES)
