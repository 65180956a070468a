"""Interrupt a call somewhere inside the package, as Ctrl-C would."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile

from .models import Stack, features

_PACKAGE = tuple(str(Path(__file__).parents[1] / name) for name in ("mhc_compile", "passes", "kernels"))


def interrupt(call: Callable[[], Any], at: int) -> tuple[int, str]:
    """Run a call and raise KeyboardInterrupt at the entry of the package's function call number `at`, from 1.

    Returns:
        How many function calls were entered, and the function interrupted; "" where the call came to its end.
    """
    entered, where = 0, ""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal entered, where
        if event != "call" or not frame.f_code.co_filename.startswith(_PACKAGE):
            return
        entered += 1
        if entered == at:
            sys.setprofile(None)
            where = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        return entered, where
    finally:
        sys.setprofile(None)
    return entered, ""


def attach(model: nn.Module) -> None:
    """Attach ahead."""
    mhc_compile.attach(model, features())


def first_call(model: nn.Module) -> Tensor:
    """Compile, and attach unless that was done."""
    out: Tensor = torch.compile(model, backend="mhc", options={"inner": "eager"})(features())
    return out


def state_of(model: nn.Module) -> list[Any]:
    """Return all that attaching changes on a model."""
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    return [sorted(model.state_dict()), hooks, compiled]


def check(call: Callable[[nn.Module], Any], at: int, attached: bool) -> tuple[int, str]:
    """Interrupt `call` on a model; check that the model is as it was, and that the call may be made again."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Stack()
    plain = model(features())
    if attached:
        attach(model)
    before = state_of(model)
    entered, where = interrupt(lambda: call(model), at)
    if where:
        assert state_of(model) == before, f"interrupted in {where}, the model is left changed"
    if not attached and where:
        assert torch.equal(model(features()), plain), f"interrupted in {where}, the plain model is another"
    call(model)
    assert torch.equal(first_call(model), plain), f"interrupted in {where}, the next call is wrong"
    return entered, where


def places(call: Callable[[nn.Module], Any], attached: bool, count: int, seed: int = 0) -> Iterator[int]:
    """Draw calls of functions to interrupt, spread over the whole."""
    total, _ = check(call, 0, attached)
    step = total / count
    yield from (int(step * (index + random.Random(seed + index).random())) + 1 for index in range(count))
