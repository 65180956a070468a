"""Registration of the operators with PyTorch: schema, fake, autograd, dispatch.

`OPERATORS` is the one table. A row says what an operator takes and returns, and what its outputs look like; schemas,
the backward operator and autograd follow from it. `dispatch` finds the plain PyTorch and the Triton kernel of an
operator by its name.

Every operator is opaque to Inductor, so that compile time does not grow with the number of Sinkhorn iterations, and so
is its backward.

An operator saves its inputs for the backward, and beside them its projection, n² + 2n + 1 floats a token that it
returns: nothing is projected again. The other coefficients are recomputed from that.

`pre` and `post_pre` also come with the norm of their layer input (`normed`), and all of these in two halves. `measure`
computes the coefficients, which a graph that recomputes always keeps; `collapse` takes them, does the rest, and is
differentiated as the whole. Run again in a backward it is one pass over the streams.

Why `custom_op` and not `triton_op`. `triton_op` lets Inductor see the kernels and emit their launches itself,
without Python dispatch. It was not taken, for three reasons. Dispatch here depends on the device and on an
override, and an operator must also run as plain PyTorch; Inductor would have to trace the choice. The launch
heuristics depend on the number of tokens, so tracing them would guard on it and compile again at each
boundary between configurations; opaque, one graph serves every number of tokens. And `opcheck` fails on a
`triton_op` under Triton's interpreter, so that the registration could not be tested without a GPU. The price
is a Python call for each operator, which `gpu.prepared` keeps short, and which CUDA graphs
(`mode="reduce-overhead"`) should remove: the kernels allocate through PyTorch, never wait for the device and
launch the same grids for the same shapes. None of this has been measured, or captured, on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .dispatch import reference_of, run
from .epsilons import eps_of_site
from .manifolds import MANIFOLDS
from .orientation import like_phi
from .reference import accumulation_dtype

Outputs = Tensor | tuple[Tensor, ...]

# What a forward hands to its backward beside its inputs.
_SAVED = ("projection", "statistics")
# Defaults in schemas.
_DEFAULTS: dict[str, Any] = {"False": False, "[]": ()}


@dataclass(frozen=True)
class Signature:
    """What an operator takes and returns; its backward's signature follows.

    Attributes:
        inputs: names of the tensors it takes that are differentiable, which its backward returns the gradients of.
        constants: the arguments after all tensors, as in a schema.
        outputs: names of the tensors it returns.
        given: tensors that it takes after these and that are not differentiated.
        kept: tensors that it returns after its outputs, not differentiable.
    """

    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    given: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors that it takes."""
        return (*self.inputs, *self.given)

    @property
    def results(self) -> tuple[str, ...]:
        """Names of all tensors that it returns."""
        return (*self.outputs, *self.kept)

    @property
    def schema(self) -> str:
        """The schema without a name, such as `(Tensor logits, SymInt iters, float eps) -> Tensor`."""
        arguments = (*(f"Tensor {name}" for name in self.tensors), *self.constants)
        returned = ", ".join("Tensor" for _ in self.results)
        return f"({', '.join(arguments)}) -> {returned if len(self.results) == 1 else f'({returned})'}"

    @property
    def backward(self) -> Signature:
        """The signature of the backward: gradients of the outputs, the inputs, and what is saved beside them."""
        grads = tuple(f"grad_{name}" for name in self.outputs)
        return Signature((*grads, *self.inputs, *self.saved), self.constants, self.inputs)

    @property
    def saved(self) -> tuple[str, ...]:
        """Names of what the backward is given of a forward's results, or of what that was given."""
        return tuple(name for name in (*self.given, *self.kept) if name in _SAVED)

    @property
    def phi_at(self) -> int | None:
        """Where the tensors phi, scale and bias begin, None without."""
        return self.tensors.index("phi") if "phi" in self.tensors else None

    @cached_property
    def constant_names(self) -> tuple[str, ...]:
        """Names of the constants."""
        return tuple(constant.partition("=")[0].split()[-1] for constant in self.constants)

    def completed(self, constants: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return a call's constants with the defaults of those that it leaves out."""
        defaults = [constant.partition("=")[2] for constant in self.constants[len(constants) :]]
        return (*constants, *(_DEFAULTS[default] for default in defaults))

    def for_kernels(self, constants: tuple[Any, ...]) -> tuple[tuple[Any, ...], bool]:
        """Return a call's constants as kernels take them, and whether phi's rows are transposed, which is apart."""
        if "transposed" not in self.constant_names:
            return constants, False
        *known, transposed, sinkhorn_eps = constants
        if sinkhorn_eps:
            place = self.constant_names.index("eps")
            known[place] = eps_of_site(known[place], sinkhorn_eps, self.manifold(constants))
        return tuple(known), transposed

    def shared_with(self, other: Signature, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Return of a call's arguments those that another operator takes, too, in its order."""
        named = dict(zip((*self.tensors, *self.constants), arguments, strict=False))
        return tuple(named[name] for name in (*other.tensors, *other.constants) if name in named)

    def manifold(self, constants: tuple[Any, ...]) -> str:
        """Return the manifold that a call's constants name; operators that take none are covered by every kernel."""
        return constants[self.constant_names.index("manifold")] if "manifold" in self.constant_names else "sinkhorn"


@dataclass(frozen=True)
class Operator:
    """One row of the table: an operator, its backward if it has one, and the plain PyTorch that defines it."""

    name: str
    signature: Signature
    forward: CustomOpDef
    backward: CustomOpDef | None
    reference: Callable[..., Any]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_like_first(first: Tensor, *_: Any) -> Tensor:
    return _like(first)


def _fake_measure(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
    transposed: bool = False,
    sinkhorn_eps: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    *tokens, n, _ = streams.shape
    eps_of_site(eps, sinkhorn_eps, manifold)
    rows = MANIFOLDS[manifold].rows(n)
    torch._check(phi.shape[0] == rows, lambda: f"phi has {phi.shape[0]} rows; {n} streams on {manifold!r} need {rows}")
    shapes = ((n,), (n, n), (rows + 1,))
    return tuple(streams.new_empty(*tokens, *shape, dtype=accumulation_dtype(streams)) for shape in shapes)


def _fake_layer_input(streams: Tensor) -> Tensor:
    *tokens, _, width = streams.shape
    return streams.new_empty(*tokens, width)


def _fake_pre(streams: Tensor, *site: Any) -> tuple[Tensor, ...]:
    return (_fake_layer_input(streams), *_fake_measure(streams, *site))


def _fake_collapse(streams: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *given: Any) -> tuple[Tensor, ...]:
    post, res, *_ = given
    return (_fake_layer_input(streams), _like(post), _like(res))


def _fake_statistics(streams: Tensor) -> Tensor:
    return streams.new_empty(*streams.shape[:-2], 2, dtype=accumulation_dtype(streams))


def _fake_pre_norm(streams: Tensor, norm_weight: Tensor, norm_bias: Tensor, *site: Any) -> tuple[Tensor, ...]:
    parameters, constants = site[:3], site[3:]
    known = (*constants[:4], *constants[6:])  # without layer_eps and centered
    return (*_fake_pre(streams, *parameters, *known), _fake_statistics(streams))


def _fake_collapse_norm(streams: Tensor, norm_weight: Tensor, norm_bias: Tensor, *site: Any) -> tuple[Tensor, ...]:
    return (*_fake_collapse(streams, *site), _fake_statistics(streams))


def _behind_post(fake: Callable[..., tuple[Tensor, ...]], fresh: bool) -> Callable[..., tuple[Tensor, ...]]:
    """Return the fake of an operator that a `post` comes first in, whose streams `fresh` says it returns."""

    def fake_behind(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, *site: Any) -> tuple[Tensor, ...]:
        return (*((_like(streams),) if fresh else ()), *fake(streams, *site))

    return fake_behind


def _fake_head(streams: Tensor, phi: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *tokens, _, _ = streams.shape
    projection = streams.new_empty(*tokens, phi.shape[0] + 1, dtype=accumulation_dtype(streams))
    return _fake_layer_input(streams), projection


def _define(name: str, signature: Signature, fake: Callable[..., Outputs]) -> CustomOpDef:
    """Register one operator: it runs whatever `dispatch` chooses for its tensors."""
    count = len(signature.tensors)
    # The first input that is no gradient: streams [*, n, C], or logits [*, n, n].
    position = next(index for index, given in enumerate(signature.tensors) if not given.startswith("grad_"))

    def call(*arguments: Any) -> Outputs:
        # What a call leaves to its defaults does not come.
        tensors, constants = arguments[:count], signature.completed(arguments[count:])
        n_streams, (known, transposed) = tensors[position].shape[-2], signature.for_kernels(constants)
        manifold = signature.manifold(constants)
        result = run(name, tensors, n_streams, manifold, constants, known, signature.phi_at, transposed)
        return result if isinstance(result, Tensor) else tuple(result)

    operator = torch.library.custom_op(f"mhc::{name}", call, mutates_args=(), schema=signature.schema)
    operator.register_fake(fake)
    return operator


def _operator(
    name: str, signature: Signature, fake: Callable[..., Outputs], backward: CustomOpDef | None = None
) -> Operator:
    """Register an operator, its backward unless it is given another's, and the autograd that joins them."""
    count, outputs = len(signature.inputs), len(signature.outputs)

    def fake_backward(*arguments: Any) -> Outputs:
        inputs = arguments[outputs:][:count]
        if count == 1:
            return _like(inputs[0])
        named = zip(signature.inputs, inputs, strict=True)
        return tuple(like_phi(tensor) if name == "phi" else _like(tensor) for name, tensor in named)

    forward = _define(name, signature, fake)
    gradients = backward or _define(f"{name}_backward", signature.backward, fake_backward)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = (output,) if isinstance(output, Tensor) else output
        names = (*signature.tensors, *signature.results)
        named = dict(zip(names, (*inputs[: len(signature.tensors)], *results), strict=True))
        ctx.save_for_backward(*inputs[:count], *(named[name] for name in signature.saved))
        ctx.mark_non_differentiable(*results[outputs:])
        ctx.constants = inputs[len(signature.tensors) :]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        result = gradients(*grads[:outputs], *ctx.saved_tensors, *ctx.constants)
        nothing = (None for _ in (*signature.given, *ctx.constants))
        return (*((result,) if count == 1 else result), *nothing)

    forward.register_autograd(differentiate, setup_context=save)
    return Operator(name, signature, forward, gradients, reference_of(name))


def _without_gradient(name: str, signature: Signature, fake: Callable[..., Outputs]) -> Operator:
    """Register an operator whose results are constants to autograd."""
    forward = _define(name, signature, fake)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.arguments = len(inputs)

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None,) * ctx.arguments

    forward.register_autograd(differentiate, setup_context=save)
    return Operator(name, signature, forward, None, reference_of(name))


_PARAMETERS = ("phi", "scale", "bias")
_NORMED = ("norm_weight", "norm_bias", *_PARAMETERS)
_MIXING = ("streams", "branch", "post", "res")
_SITE = (
    "SymInt iters", "float norm_eps", "float eps", "str manifold",
    "bool anchored=False", "bool transposed=False", "float[] sinkhorn_eps=[]",
)  # fmt: skip
_NORMED_SITE = (*_SITE[:4], "float layer_eps", "bool centered", *_SITE[4:])
_HEAD = ("float norm_eps", "float eps", "bool anchored=False")
_KEPT, _STATISTICS = ("projection",), ("statistics",)
_MEASURED, _NEXT_MEASURED = ("post", "res"), ("next_post", "next_res")

_pre = _operator("pre", Signature(("streams", *_PARAMETERS), _SITE, ("layer_input", *_MEASURED), kept=_KEPT), _fake_pre)
_post_pre = _operator(
    "post_pre",
    Signature((*_MIXING, *_PARAMETERS), _SITE, ("fresh", "layer_input", *_NEXT_MEASURED), kept=_KEPT),
    _behind_post(_fake_pre, fresh=True),
)
# With the norm of the layer input; see `normed`.
_pre_norm = _operator(
    "pre_norm",
    Signature(("streams", *_NORMED), _NORMED_SITE, ("normed", *_MEASURED), kept=(*_KEPT, *_STATISTICS)),
    _fake_pre_norm,
)
_post_pre_norm = _operator(
    "post_pre_norm",
    Signature((*_MIXING, *_NORMED), _NORMED_SITE, ("fresh", "normed", *_NEXT_MEASURED), kept=(*_KEPT, *_STATISTICS)),
    _behind_post(_fake_pre_norm, fresh=True),
)

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        _operator("sinkhorn", Signature(("logits",), ("SymInt iters", "float eps"), ("res",)), _fake_like_first),
        _pre,
        # The paper's separate kernels compute the same function; its backward is that of `pre`.
        _operator("paper_pre", _pre.signature, _fake_pre, _pre.backward),
        _operator("post", Signature(_MIXING, (), ("streams",)), _fake_like_first),
        _post_pre,
        _operator("head", Signature(("streams", *_PARAMETERS), _HEAD, ("output",), kept=_KEPT), _fake_head),
        _without_gradient(
            "measure", Signature((), _SITE, (), ("streams", *_PARAMETERS), (*_MEASURED, *_KEPT)), _fake_measure
        ),
        _operator(
            "collapse",
            Signature(("streams", *_PARAMETERS), _SITE, ("layer_input", *_MEASURED), (*_MEASURED, *_KEPT)),
            _fake_collapse,
            _pre.backward,
        ),
        _without_gradient(
            "post_measure",
            Signature((), _SITE, (), (*_MIXING, *_PARAMETERS), (*_NEXT_MEASURED, *_KEPT)),
            _behind_post(_fake_measure, fresh=False),
        ),
        _operator(
            "post_collapse",
            Signature((*_MIXING, *_PARAMETERS), _SITE, _post_pre.signature.outputs, (*_NEXT_MEASURED, *_KEPT)),
            _behind_post(_fake_collapse, fresh=True),
            _post_pre.backward,
        ),
        _pre_norm,
        _post_pre_norm,
        _operator(
            "collapse_norm",
            Signature(
                ("streams", *_NORMED), _NORMED_SITE, _pre_norm.signature.outputs, (*_MEASURED, *_KEPT), _STATISTICS
            ),
            _fake_collapse_norm,
            _pre_norm.backward,
        ),
        _operator(
            "post_collapse_norm",
            Signature(
                (*_MIXING, *_NORMED),
                _NORMED_SITE,
                _post_pre_norm.signature.outputs,
                (*_NEXT_MEASURED, *_KEPT),
                _STATISTICS,
            ),
            _behind_post(_fake_collapse_norm, fresh=True),
            _post_pre_norm.backward,
        ),
    )
}

sinkhorn = OPERATORS["sinkhorn"].forward
pre = OPERATORS["pre"].forward
post = OPERATORS["post"].forward
post_pre = OPERATORS["post_pre"].forward
head = OPERATORS["head"].forward
