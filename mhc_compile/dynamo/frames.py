"""What a backend call can learn about the frame that Dynamo is compiling: its modules, and why its graph ends.

Dynamo hands a backend only the graph. The translator that is at work (thread-local) knows the frame's variables, so
the modules behind `L['self']` and `G['model']` can be found, and whether the graph ends at a graph break.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ..attachment.plain_calls import running_module
from ..errors import OwnerError
from ..passes.fx.sources import input_sources, name_of_source

_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<function>.+)_at_(?P<line>\d+)")
_ROOT_END = re.compile(r"\._(modules|parameters|buffers)\[")


@dataclass(frozen=True)
class Frame:
    """The frame behind one captured graph.

    Attributes:
        roots: the modules that the frame's graph reads from, the frame's own `self` first.
        sources: Dynamo's sources of the roots, where known.
        paths: for the id of each module below a root: its path below the model, and the module. Where a graph break in
            the model's forward has Dynamo compile an inner module alone, paths begin at the model all the same.
        code: the code object that Dynamo compiles.
        function: name of the frame's function; of the original one if the frame resumes behind a graph break.
        resumed: the frame resumes behind a graph break.
        model: the outermost module whose forward is running, compiled or not; the first root, if that is the one. None
            if the frame shows no module.
        outer: the outermost module whose forward is running and that holds the root, called by compiled code or not;
            None if there is none. Wrappers such as DDP do not count.
        caller: a module around the root whose forward runs as plain Python, although compiled code called it: Dynamo
            gave up on that one. None if there is none.
        break_reason: why the graph ends before its function does, with the source line; None if it does not.
        resumed_line: line of the graph break behind which the frame resumes.
        break_line: line of the graph break that ends the graph, in the frame's own function.
    """

    roots: tuple[nn.Module, ...]
    sources: tuple[Any, ...]
    paths: dict[int, tuple[str, nn.Module]] = field(repr=False)
    code: CodeType
    function: str
    resumed: bool
    model: nn.Module | None
    outer: nn.Module | None
    caller: str | None
    break_reason: str | None
    resumed_line: int | None = None
    break_line: int | None = None

    @property
    def root(self) -> nn.Module:
        """The outermost module that the frame's graph reads from.

        Raises:
            OwnerError: the frame shows no module.
        """
        if not self.roots:
            raise OwnerError(
                "backend='mhc' could not tell which module this graph belongs to. Compile the model itself, "
                "torch.compile(model, backend='mhc') or model.compile(backend='mhc'), so that its parameters have "
                "a home."
            )
        return self.roots[0]

    def module_at(self, key: str, path: str) -> tuple[str, nn.Module] | None:
        """Resolve one entry of a node's module stack, by identity where torch records it, else by path."""
        identity = key.split("@", 1)[0]
        if identity.isdigit() and int(identity) in self.paths:
            return self.paths[int(identity)]
        plain = plain_path(path)
        for root in self.roots:
            try:
                found = root.get_submodule(plain)
            except AttributeError:
                continue
            return self.paths.get(id(found), (plain, found))
        return None

    def name_of(self, key: str, path: str) -> str | None:
        """Return a module's path on the model, by one entry of a node's module stack."""
        found = self.module_at(key, path)
        return found[0] if found is not None else None


def plain_path(path: str) -> str:
    """Return a module's dotted path as users write it: Dynamo's has the names of its dictionaries in it."""
    path = re.sub(r"^[LG]\['\w+'\]", "", path)
    path = re.sub(r"(?:\.__dict__)?(?:\['_modules'\]|\._modules)\['([^']+)'\]", r".\1", path)
    return path.replace(".__dict__", "").strip(".")


def current_frame(graph_module: GraphModule) -> Frame:
    """Describe the frame whose graph is being compiled; call it only inside a backend."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    output = translator.output
    roots = _roots(graph_module, output.local_scope, output.global_scope)
    callers, beyond = _plain_callers(roots)
    outermost = [module for module, _ in (*callers, *beyond) if not _is_wrapper(module)]
    around = next((module for module, _ in reversed(callers) if not _is_wrapper(module)), None)
    paths: dict[int, tuple[str, nn.Module]] = {}
    for top in roots if around is None else (around, *roots):
        for path, module in top.named_modules():
            paths.setdefault(id(module), (path, module))
    name = output.root_tx.f_code.co_name
    resumed = _RESUMED.fullmatch(name)
    return Frame(
        roots=roots,
        sources=tuple(_root_sources(graph_module)),
        paths=paths,
        code=output.root_tx.f_code,
        function=resumed["function"] if resumed else name,
        resumed=resumed is not None,
        model=around or next(iter(roots), None),
        outer=outermost[-1] if outermost else None,
        caller=callers[-1][1] if callers else None,
        break_reason=_break_reason(output.compile_subgraph_reason),
        resumed_line=int(resumed["line"]) if resumed else None,
        break_line=_break_line(output.compile_subgraph_reason),
    )


def _roots(
    graph_module: GraphModule, local_scope: dict[str, Any], global_scope: dict[str, Any]
) -> tuple[nn.Module, ...]:
    found: dict[int, nn.Module] = {}
    for name in ("self", "fn", *local_scope):
        value = local_scope.get(name)
        if isinstance(value, nn.Module):
            found.setdefault(id(value), value)
    for read_from in map(name_of_source, input_sources(graph_module)):
        match = _ROOT_END.search(read_from)
        if match is None:
            continue
        try:
            value = eval(read_from[: match.start()], {"L": local_scope, "G": global_scope})
        except Exception:
            continue
        if isinstance(value, nn.Module):
            found.setdefault(id(value), value)
    roots = tuple(found.values())
    below = {id(module) for root in roots for module in root.modules() if module is not root}
    return tuple(root for root in roots if id(root) not in below)


def _root_sources(graph_module: GraphModule) -> list[Any]:
    """Return the sources of the modules that the graph's parameters hang from: L['self'], G['model']."""
    found: dict[str, Any] = {}
    for source in input_sources(graph_module):
        match = _ROOT_END.search(name_of_source(source))
        root = match.string[: match.start()] if match is not None else None
        while root is not None and source is not None and name_of_source(source) != root:
            source = getattr(source, "base", None)
        if root is not None and source is not None:
            found.setdefault(root, source)
    return list(found.values())


def pin_to_modules(frame: Frame) -> None:
    """Make Dynamo compile again for another module of the same class.

    A look at a model has to see each of its blocks; while none has mHC parameters, Dynamo would show the first for all.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    for source in frame.sources:
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


_Caller = tuple[nn.Module, str]


def _plain_callers(roots: tuple[nn.Module, ...]) -> tuple[list[_Caller], list[_Caller]]:
    """Look up the Python stack for modules around the roots.

    While a frame is traced it is not on the stack, so a module that is, runs as plain Python.

    Returns:
        Each module with its place in the source, innermost first: those up to the call that compilation began with, and
        those beyond it.
    """
    found: tuple[list[_Caller], list[_Caller]] = ([], [])
    beyond = False
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        beyond |= frame.f_code.co_name == "compile_wrapper"
        module = running_module(frame)
        if module is not None and roots and _holds(module, roots[0]):
            place = f"{type(module).__name__}.forward ({frame.f_code.co_filename}:{line})"
            found[beyond].append((module, place))
    return found if beyond else ([], [])


def running_modules() -> Iterator[nn.Module]:
    """Yield the modules whose forward runs as plain Python around the frame that is compiled, innermost first."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        if (module := running_module(frame)) is not None:
            yield module


def _is_wrapper(module: nn.Module) -> bool:
    """Return whether a module stands around the user's model, such as DDP: it adds a step to every path."""
    return type(module).__module__.startswith(("torch.nn.parallel", "torch.distributed"))


def _holds(module: nn.Module, inner: nn.Module) -> bool:
    return any(candidate is inner for candidate in module.modules() if candidate is not module)


def _break_reason(reason: Any) -> str | None:
    if reason is None or not reason.graph_break:
        return None
    text = str(reason.reason).strip().splitlines()[0] if reason.reason else "graph break"
    if reason.user_stack:
        frame = reason.user_stack[-1]
        text += f" ({frame.filename}:{frame.lineno}  {frame.line or ''})".replace("  )", ")")
    return text


def _break_line(reason: Any) -> int | None:
    if reason is None or not reason.graph_break or not reason.user_stack:
        return None
    line = reason.user_stack[0].lineno
    return int(line) if line is not None else None


def is_sharded(root: nn.Module) -> bool:
    """Return whether FSDP2 has sharded a module or one below it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in root.modules())


def inside_ddp() -> bool:
    """Return whether the frame runs inside a DistributedDataParallel forward."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module() is not None
