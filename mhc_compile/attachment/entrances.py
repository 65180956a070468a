"""Let a part of a model that is called by itself run rewritten, once the model is compiled in place.

`generate()` calls the encoder of an encoder-decoder alone; `get_image_features` a vision tower. Their forward is not
the model's, so `model.compile(backend="mhc")` does not reach it. A submodule that holds whole chains therefore gets an
entrance in the slot of `nn.Module.compile`: inside a compilation it steps aside; called by Python code, it compiles the
submodule as the model is compiled. A deep copy of the model gets entrances of its own. A pickle leaves the slot empty,
and so does a copy of the submodule alone, as they do for `compile`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback, set_code_exec_strategy
from torch._dynamo.types import FrameAction, FrameExecStrategy

BACKEND_NAME = "mhc"


class Entrance:
    """Stands in the place of a submodule's compiled call.

    Attributes:
        module: the submodule.
        root: the model that it is a part of.
    """

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        """Compile nothing yet."""
        self.module = module
        self.root = root
        self._compiled: tuple[Any, Callable[..., Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the submodule: rewritten, if the model is compiled in place and this call is not a part of its own."""
        if torch.compiler.is_dynamo_compiling():
            return self.module._call_impl(*args, **kwargs)
        model_call = self.root._compiled_call_impl
        if model_call is None or _inside_compiled_code():
            return self.module._call_impl(*args, **kwargs)
        if self._compiled is None or self._compiled[0] is not model_call:
            self._compiled = model_call, _compiled_alike(self.module, model_call)
        return self._compiled[1](*args, **kwargs)


def _inside_compiled_code() -> bool:
    """Return whether compiled code is at work around this call: Dynamo then compiles what is called by itself."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def _compiled_alike(module: nn.Module, model_call: Any) -> Callable[..., Any]:
    """Compile a submodule with the options that its model was compiled in place with; plain for another backend."""
    context, name = _compilation(model_call)
    if context is None:  # another version of torch: the attached options decide alone
        compiled: Callable[..., Any] = torch.compile(module._call_impl, backend=BACKEND_NAME)
        return compiled
    alike: Callable[..., Any] = context(module._call_impl) if name == BACKEND_NAME else module._call_impl
    return alike


def _compilation(call: Any) -> tuple[Any, str | None]:
    """Return Dynamo's context behind a compiled call and the name of its backend; nothing where it cannot be told."""
    try:
        context = inspect.getclosurevars(call).nonlocals["self"]
        backend = context.callback
    except (TypeError, KeyError, AttributeError):
        return None, None
    return context, _name_of(backend)


def _name_of(backend: Any) -> str | None:
    """Return the name of the backend that Dynamo's callbacks are wrapped around, if it can be told."""
    name = None
    while backend is not None and name is None:
        name = getattr(backend, "compiler_name", None)
        backend = getattr(backend, "_torchdynamo_orig_backend", None)
    return name


def compiling_backend() -> str | None:
    """Return the name of the backend that Dynamo gives the next frame to, if it is at work and that can be told."""
    callback = get_eval_frame_callback()
    return None if callback is None or isinstance(callback, bool) else _name_of(callback)


# They are asked by hooks that run while Dynamo is at work, which is not to compile them.
for _function in (_name_of, compiling_backend):
    set_code_exec_strategy(_function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.DEFAULT))


def compiled_by(module: nn.Module) -> str | None:
    """Return the name of the backend that a module was compiled in place with, if it can be told."""
    return _compilation(module._compiled_call_impl)[1]


def leave_in_place(root: nn.Module) -> None:
    """End `model.compile(backend="mhc")` for a model and what is below it."""
    for module in root.modules():
        if compiled_by(module) == BACKEND_NAME:
            module._compiled_call_impl = None


def open_entrances(root: nn.Module, chains: Iterable[Iterable[str]]) -> None:
    """Give an entrance to every submodule that holds the whole of a chain.

    Args:
        root: the model.
        chains: for each chain, the paths of the modules that own its sites.
    """
    for owners in chains:
        parts = [path.split(".") for path in owners]
        shared = 0
        while parts and all(len(path) > shared and path[shared] == parts[0][shared] for path in parts):
            shared += 1
        for depth in range(1, shared + 1):
            path = ".".join(parts[0][:depth])
            try:
                module = root.get_submodule(path)
            except AttributeError:
                continue
            if module is not root and module._compiled_call_impl is None:
                module._compiled_call_impl = Entrance(module, root)


def copy_entrances(root: nn.Module, memo: dict[int, Any]) -> None:
    """Give the parts of a copy the entrances that the parts of the original have.

    Args:
        root: a model that `copy.deepcopy` is at work on.
        memo: its memory of what has been copied.
    """
    # From the top, as it goes by itself: a sentinel looks its owner, which lies above it, up in the memory.
    copy.deepcopy(root._modules, memo)
    for module in root.modules():
        entrance = module._compiled_call_impl
        if isinstance(entrance, Entrance):
            twin, model = memo.get(id(module)), memo.get(id(entrance.root))
            if twin is not None and model is not None:
                twin.__dict__["_compiled_call_impl"] = Entrance(twin, model)


def close_entrances(root: nn.Module) -> None:
    """Take every entrance below a model away."""
    for module in root.modules():
        if isinstance(module._compiled_call_impl, Entrance):
            module._compiled_call_impl = None
