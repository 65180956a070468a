"""Registration of the operators with PyTorch: schema, fake, autograd, dispatch.

`OPERATORS` is the one table. A row says what an operator takes and returns, and what its outputs look like; schemas,
the backward operator and autograd follow from it. `dispatch` finds the plain PyTorch and the Triton kernel of an
operator by its name.

Every operator is opaque to Inductor, so that compile time does not grow with the number of Sinkhorn iterations, and so
is its backward.

An operator saves nothing but its inputs for the backward and recomputes its coefficients there.

Why `custom_op` and not `triton_op`. `triton_op` lets Inductor see the kernels and emit their launches itself,
without Python dispatch. It was not taken, for three reasons. Dispatch here depends on the device and on an
override, and an operator must also run as plain PyTorch; Inductor would have to trace the choice. The launch
heuristics depend on the number of tokens, so tracing them would guard on it and compile again at each
boundary between configurations; opaque, one graph serves every number of tokens. And `opcheck` fails on a
`triton_op` under Triton's interpreter, so that the registration could not be tested without a GPU. The price
is a Python call for each operator, which CUDA graphs (`mode="reduce-overhead"`) should remove: the kernels
allocate through PyTorch, never wait for the device and launch the same grids for the same shapes. None of
this has been measured, or captured, on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .dispatch import reference_of, run
from .manifolds import MANIFOLDS
from .reference import accumulation_dtype

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Signature:
    """What an operator takes and returns; its backward's signature follows.

    Attributes:
        inputs: names of the tensors it takes, all differentiable, which its backward returns the gradients of.
        constants: the arguments after them, as in a schema.
        outputs: names of the tensors it returns.
    """

    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def schema(self) -> str:
        """The schema without a name, such as `(Tensor logits, SymInt iters, float eps) -> Tensor`."""
        arguments = (*(f"Tensor {name}" for name in self.inputs), *self.constants)
        returned = ", ".join("Tensor" for _ in self.outputs)
        return f"({', '.join(arguments)}) -> {returned if len(self.outputs) == 1 else f'({returned})'}"

    @property
    def backward(self) -> Signature:
        """The signature of the backward: gradients of the outputs, then all that the operator takes."""
        grads = tuple(f"grad_{name}" for name in self.outputs)
        return Signature((*grads, *self.inputs), self.constants, self.inputs)

    def manifold(self, constants: tuple[Any, ...]) -> str:
        """Return the manifold that a call's constants name; operators that take none are covered by every kernel."""
        return constants[self.constants.index("str manifold")] if "str manifold" in self.constants else "sinkhorn"


@dataclass(frozen=True)
class Operator:
    """One row of the table: an operator, its backward, and the plain PyTorch that defines it."""

    name: str
    signature: Signature
    forward: CustomOpDef
    backward: CustomOpDef
    reference: Callable[..., Any]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_like_first(first: Tensor, *_: Any) -> Tensor:
    return _like(first)


def _fake_pre(
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
) -> tuple[Tensor, ...]:
    *tokens, n, width = streams.shape
    rows = MANIFOLDS[manifold].rows(n)
    torch._check(phi.shape[0] == rows, lambda: f"phi has {phi.shape[0]} rows; {n} streams on {manifold!r} need {rows}")
    coefficients = accumulation_dtype(streams)
    return (
        streams.new_empty(*tokens, width),
        streams.new_empty(*tokens, n, dtype=coefficients),
        streams.new_empty(*tokens, n, n, dtype=coefficients),
    )


def _fake_post_pre(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor, *site: Any) -> tuple[Tensor, ...]:
    return (_like(streams), *_fake_pre(streams, *site))


def _fake_head(streams: Tensor, *rest: Any) -> Tensor:
    *tokens, _, width = streams.shape
    return streams.new_empty(*tokens, width)


def _define(name: str, signature: Signature, fake: Callable[..., Outputs]) -> CustomOpDef:
    """Register one operator: it runs whatever `dispatch` chooses for its tensors."""
    count = len(signature.inputs)
    # The first input that is no gradient: streams [*, n, C], or logits [*, n, n].
    position = next(index for index, given in enumerate(signature.inputs) if not given.startswith("grad_"))

    def call(*arguments: Any) -> Outputs:
        tensors, constants = arguments[:count], arguments[count:]
        n_streams = tensors[position].shape[-2]
        result = run(name, tensors, n_streams, signature.manifold(constants), *constants)
        return result if isinstance(result, Tensor) else tuple(result)

    operator = torch.library.custom_op(f"mhc::{name}", call, mutates_args=(), schema=signature.schema)
    operator.register_fake(fake)
    return operator


def _operator(
    name: str, signature: Signature, fake: Callable[..., Outputs], backward: CustomOpDef | None = None
) -> Operator:
    """Register an operator, its backward unless it is given another's, and the autograd that joins them."""
    count = len(signature.inputs)

    def fake_backward(*arguments: Any) -> Outputs:
        inputs = arguments[len(signature.outputs) :][:count]
        return _like(inputs[0]) if count == 1 else tuple(_like(tensor) for tensor in inputs)

    forward = _define(name, signature, fake)
    gradients = backward or _define(f"{name}_backward", signature.backward, fake_backward)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.constants = inputs[count:]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        result = gradients(*grads, *ctx.saved_tensors, *ctx.constants)
        return (*((result,) if count == 1 else result), *(None for _ in ctx.constants))

    forward.register_autograd(differentiate, setup_context=save)
    return Operator(name, signature, forward, gradients, reference_of(name))


_PARAMETERS = ("phi", "scale", "bias")
_MIXING = ("streams", "branch", "post", "res")
_SITE = ("SymInt iters", "float norm_eps", "float eps", "str manifold", "bool anchored=False", "bool transposed=False")
_HEAD = ("float norm_eps", "float eps", "bool anchored=False")

_pre = _operator("pre", Signature(("streams", *_PARAMETERS), _SITE, ("layer_input", "post", "res")), _fake_pre)

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        _operator("sinkhorn", Signature(("logits",), ("SymInt iters", "float eps"), ("res",)), _fake_like_first),
        _pre,
        # The paper's separate kernels compute the same function; its backward is that of `pre`.
        _operator("paper_pre", _pre.signature, _fake_pre, _pre.backward),
        _operator("post", Signature(_MIXING, (), ("streams",)), _fake_like_first),
        _operator(
            "post_pre",
            Signature((*_MIXING, *_PARAMETERS), _SITE, ("fresh", "layer_input", "next_post", "next_res")),
            _fake_post_pre,
        ),
        _operator("head", Signature(("streams", *_PARAMETERS), _HEAD, ("output",)), _fake_head),
    )
}

sinkhorn = OPERATORS["sinkhorn"].forward
pre = OPERATORS["pre"].forward
post = OPERATORS["post"].forward
post_pre = OPERATORS["post_pre"].forward
head = OPERATORS["head"].forward
