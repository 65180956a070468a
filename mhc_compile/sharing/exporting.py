"""Export the rewritten model as a program in plain ATen, which runs where this package is not installed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..api import unwrap
from ..attachment.site_parameters import attached_config
from ..errors import MHCError, NotAttachedError
from ..passes.plain_operators import size_inputs, without_autocast_regions

_INNER = "mhc_export"
_NO_LIMIT = 1 << 30


@dataclass
class _Captured:
    """One rewritten graph, with the values that it was called with and those that it returned."""

    graph: GraphModule
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()


_CAPTURED: list[_Captured] = []


def export(model: nn.Module, *args: Any, dynamic_shapes: Any = None, **kwargs: Any) -> torch.export.ExportedProgram:
    """Export the rewritten model to plain ATen: for AOTInductor, ONNX, or `torch.export.save`.

    The program takes the arguments given here. It runs, is saved, compiled and converted without this package; whoever
    loads one of a Hugging Face model has to import `transformers.modeling_outputs`, whose classes it returns. A Hugging
    Face model is exported without its cache of keys and values unless `use_cache` is among the arguments.

    Code that was compiled before is compiled again at its next call.

    Args:
        model: an attached model, compiled or not; in eval mode for a program that infers.
        *args: one example input. What is to be dynamic must be larger than 1 in it.
        dynamic_shapes: as `torch.export.export` takes it, for the arguments given here:
            `{"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}`.
        **kwargs: the input's keyword arguments.

    Returns:
        a program whose `state_dict` has the model's own names.

    Raises:
        NotAttachedError: the model has no mHC parameters.
        MHCError: a graph break cuts the model, or it returns what no graph computes.
    """
    root = unwrap(model)
    if attached_config(root) is None:
        raise NotAttachedError("the model has no mHC parameters: torch.export.export(model, …) exports it as it is.")
    baked = {} if "use_cache" in kwargs or not _takes(root, "use_cache") else {"use_cache": False}
    captured, returned = _capture(root, args, {**kwargs, **baked})
    program = _Program(root, captured, (args, kwargs), returned)
    program.forward = _like(root, program.run, len(args), kwargs)
    with torch.no_grad():
        return torch.export.export(program, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def _like(root: nn.Module, run: Callable[..., Any], count: int, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Return a function with the model's own names for the arguments that are given."""
    known = inspect.signature(root.forward).parameters
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [name for name, one in known.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    names = [*names[:count], *(f"input_{number}" for number in range(len(names), count)), *kwargs]

    def forward(*arguments: Any, **options: Any) -> Any:
        return run(*arguments, **options)

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in names]
    )
    return forward


def _takes(root: nn.Module, name: str) -> bool:
    return name in inspect.signature(root.forward).parameters


def _capture(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Captured, Any]:
    from torch._dynamo.exc import Unsupported
    from torch.fx.experimental import _config as shapes

    options: dict[str, Any] = {"inner": _INNER, "fusion": "inductor", "recompute": "none"}
    options["disable_passes"] = ["mark_cacheable"]
    # `forward`, not `__call__`: a module that was compiled in place would run that compilation.
    compiled = torch.compile(root.forward, backend="mhc", fullgraph=True, dynamic=True, options=options)
    try:
        # All sizes of the input may vary: `torch.export` is what fixes them. A float would become a tensor.
        with (
            torch.no_grad(),
            shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
            torch._dynamo.config.patch(specialize_float=True, specialize_int=True, recompile_limit=_NO_LIMIT),
        ):
            returned = compiled(*args, **kwargs)
    except Unsupported as error:
        raise MHCError(
            f"the model cannot be exported, since a graph break cuts it: {str(error).strip().splitlines()[0]}. "
            "TORCH_LOGS=graph_breaks shows the line."
        ) from error
    finally:
        captured = _CAPTURED[-1:]
        _CAPTURED.clear()
        torch._dynamo.reset()
    return captured[0], returned


@register_backend(name=_INNER)
def _remember(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    captured = _Captured(graph_module)
    _CAPTURED.append(captured)

    def run(*inputs: Any) -> Any:
        captured.inputs = inputs
        captured.outputs = tuple(graph_module(*inputs))
        return captured.outputs

    return run


class _Program(nn.Module):
    """The captured graph with the model's own signature: inputs by their place, parameters by their names."""

    def __init__(self, root: nn.Module, captured: _Captured, given: Any, returned: Any) -> None:
        super().__init__()
        owned = {
            id(tensor): name for tensors in (root.named_buffers(), root.named_parameters()) for name, tensor in tensors
        }
        leaves = {id(leaf): number for number, leaf in enumerate(pytree.tree_leaves(given)) if isinstance(leaf, Tensor)}
        sizes = size_inputs(captured.graph)
        self._sources: list[tuple[str, Any]] = []
        for number, value in enumerate(captured.inputs):
            if number in sizes:
                self._sources.append(("size", sizes[number]))
            elif id(value) in leaves:
                self._sources.append(("given", leaves[id(value)]))
            elif id(value) in owned:
                self._sources.append(("owned", owned[id(value)]))
                self._put(owned[id(value)], value)
            elif isinstance(value, Tensor):
                self._sources.append(("owned", f"constant_{number}"))
                self.register_buffer(f"constant_{number}", value)
            else:
                self._sources.append(("constant", value))
        without_autocast_regions(captured.graph)
        self.rewritten = captured.graph
        outputs = {id(value): number for number, value in enumerate(captured.outputs) if isinstance(value, Tensor)}
        values, self._form = pytree.tree_flatten(returned)
        self._returned = [_origin(value, outputs, leaves) for value in values]

    def _put(self, name: str, tensor: Tensor) -> None:
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(last, tensor)
        else:
            module.register_buffer(last, tensor)

    def _owned(self, name: str) -> Any:
        path, _, last = name.rpartition(".")
        return getattr(self.get_submodule(path), last)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        values: list[Any] = []
        for kind, what in self._sources:
            values.append(leaves[what] if kind == "given" else self._owned(what) if kind == "owned" else what)
        for number, (kind, what) in enumerate(self._sources):
            if kind == "size":
                values[number] = values[what[0]].shape[what[1]]
        outputs = self.rewritten(*values)
        made = [
            outputs[what] if kind == "output" else leaves[what] if kind == "given" else what
            for kind, what in self._returned
        ]
        return pytree.tree_unflatten(made, self._form)


def _origin(value: Any, outputs: dict[int, int], leaves: dict[int, int]) -> tuple[str, Any]:
    if not isinstance(value, Tensor):
        return "constant", value
    if id(value) in outputs:
        return "output", outputs[id(value)]
    if id(value) in leaves:
        return "given", leaves[id(value)]
    raise MHCError(
        "the model returns a tensor that its graph does not compute: return it from an operator, or leave it out."
    )
