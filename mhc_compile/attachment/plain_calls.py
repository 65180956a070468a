"""Say which call was about to run a model's plain forward, and which one to make instead."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType

import torch
from torch import nn

from .site_parameters import SiteParameters, parameters_of

_COMPILED = 'torch.compile(model, backend="mhc")'
_IN_PLACE = 'model.compile(backend="mhc")'


# By the functions that stand on the stack while a transform runs: the innermost names what the user called last.
_TRANSFORMS = {
    "grad_and_value_impl": "grad",
    "vmap_impl": "vmap",
    "_vjp_with_argnums": "vjp",
    "_jvp_with_argnums": "jvp",
    "functional_call": "functional_call",
}


class RootMark:
    """What tells the attached model itself on the stack; the sentinel of the model is one.

    Attributes:
        copied: the model is a copy of the one that was attached.
    """

    copied: bool = False


@dataclass
class _Stack:
    """What the Python stack shows, innermost first."""

    modules: list[nn.Module] = field(default_factory=list)
    codes: list[CodeType] = field(default_factory=list)
    functions: set[str] = field(default_factory=set)
    dynamo: bool = False
    transform: str | None = None


# What a graph says that another backend has compiled; its sites are not on the stack.
OTHER_COMPILER = (
    "a graph of a model that carries mHC parameters was compiled without the rewrite, so that its result would not be "
    f"the rewritten model's. Call {_COMPILED}: its option inner= names the compiler that runs the result. "
    "mhc_compile.detach(model) gives back the plain model."
)


def plain_call_message(site: str) -> str:
    """Return the message of an `UnrewrittenCallError` that is raised at a site."""
    stack = _stack()
    root = next((module for module in stack.modules if _mark(module) is not None), None)
    outer = stack.modules[-1] if stack.modules else None
    return (
        f"the plain forward of {_named(root or outer)} was about to run (at {site}), although it carries mHC "
        f"parameters: the result would not be the rewritten model's. {_cause(stack, root, outer)} "
        "mhc_compile.detach(model) gives back the plain model."
    )


def _cause(stack: _Stack, root: nn.Module | None, outer: nn.Module | None) -> str:
    stance = torch._dynamo.eval_frame._stance.stance
    if stance == "force_eager":
        return (
            "torch.compiler.set_stance('force_eager') has switched compilation off: take it back with "
            "torch.compiler.set_stance('default')."
        )
    if stack.transform == "functional_call":
        return (
            "torch.func.functional_call calls the model's Python code: load the values into the model "
            f"(load_state_dict) and call the compiled one, {_COMPILED}."
        )
    if stack.transform is not None:
        return (
            f"torch.func.{stack.transform} calls the model's Python code, which is not rewritten: call the "
            f"compiled model ({_COMPILED}), with samples as a batch, and take gradients with backward()."
        )
    if stack.dynamo:
        return _fallback(stack)
    mark = _mark(root) if root is not None else None
    if mark is not None and mark.copied:
        return (
            "It is a copy (copy.deepcopy, an average of weights, a quantized copy), and copies do not take their "
            f'compilation along: call copy.compile(backend="mhc") on it, or {_COMPILED.replace("model", "copy")}.'
        )
    if root is not None and outer is not None and outer is not root:
        return (
            f"{_named(outer)} wraps the model and calls it as Python code: compile the wrapper, "
            f'wrapper.compile(backend="mhc"), or call {_IN_PLACE} on the model inside.'
        )
    if root is None:
        return (
            f"{_named(outer)} is a part of the model and was called by itself: after {_IN_PLACE} on the whole model it "
            'runs rewritten, too, if it holds a whole stream; else compile it alone, part.compile(backend="mhc").'
        )
    if "generate" in stack.functions:
        return (
            "generate() calls the model that it is a method of, also behind torch.compile(model).generate(): call "
            f"{_IN_PLACE} once, then model.generate(…)."
        )
    return (
        f"Call what torch.compile returns, compiled = {_COMPILED}, or compile in place with {_IN_PLACE}, so that "
        "model(…), generate() and Trainer run it rewritten."
    )


def _fallback(stack: _Stack) -> str:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    limit = torch._dynamo.config.recompile_limit
    for code in stack.codes:
        if len(_debug_get_cache_entry_list(code)) >= limit:
            return (
                f"It was called compiled, but {code.co_qualname if sys.version_info >= (3, 11) else code.co_name} has "
                f"been compiled {limit} times already, for other shapes, modes or modules, and Dynamo stops there: "
                f"raise torch._dynamo.config.recompile_limit (now {limit}); TORCH_LOGS=recompiles shows what changes."
            )
    return (
        "It was called compiled, but Dynamo fell back to Python here: TORCH_LOGS=graph_breaks,recompiles shows where "
        "and why (a graph break inside the block, an operator that it cannot trace, a recompile limit)."
    )


def _stack() -> _Stack:
    seen = _Stack()
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        code = frame.f_code
        seen.functions.add(code.co_name)
        seen.dynamo |= code.co_name == "compile_wrapper" and "eval_frame" in code.co_filename
        if "_functorch" in code.co_filename and code.co_name in _TRANSFORMS:
            seen.transform = _TRANSFORMS[code.co_name]
        module = running_module(frame)
        if module is not None:
            if not any(known is module for known in seen.modules):
                seen.modules.append(module)
            seen.codes.append(code)
    return seen


def running_module(frame: FrameType) -> nn.Module | None:
    """Return the module whose forward a Python frame is, None if it is none."""
    code = frame.f_code
    module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount and code.co_name == "forward" else None
    return module if isinstance(module, nn.Module) else None


def _mark(module: nn.Module) -> RootMark | None:
    hooks: Iterable[object] = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, RootMark)), None)


def _named(module: nn.Module | None) -> str:
    return type(module).__name__ if module is not None else "the model"


def running_sites(labels: Sequence[str]) -> list[str]:
    """Return the names of the sites of these labels whose owner's forward is on the Python stack."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        arguments = frame.f_code.co_varnames[: min(frame.f_code.co_argcount, 1)]
        candidate = frame.f_locals.get(arguments[0]) if arguments else None
        owned = parameters_of(candidate) if isinstance(candidate, nn.Module) else None
        if owned is not None:
            sites = [owned._modules[label] for label in labels if label in owned._modules]
            if sites:
                return [site.name for site in sites if isinstance(site, SiteParameters)]
    return []
