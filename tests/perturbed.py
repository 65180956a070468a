"""Compare a rewritten model with the oracle where it matters: away from the start that preserves the function."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile import MHCConfig
from mhc_compile.reports.reporting import Report

from .oracle import oracle
from .preserving import tensors_of


def perturbed(start: Mapping[str, Tensor], seed: int, size: float = 0.3) -> dict[str, Tensor]:
    """Return mHC parameters with size·randn added to each."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + size * torch.randn(value.shape, generator=generator) for name, value in start.items()}


def widened(value: Any) -> Any:
    """Return inputs with every floating-point tensor in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: widened(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(widened(inner) for inner in value)
    return value


def outputs_and_gradients(
    call: Any, parameters: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Call; return the outputs, and the gradients of their sum with fixed random weights, in float64."""
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(5)
    outputs = tensors_of(call(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros((), dtype=torch.float64)
    for tensor in outputs:
        weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.requires_grad:
            finite = torch.where(torch.isfinite(tensor), tensor, 0.0).double()
            loss = loss + (finite * weights).sum() / max(tensor.numel(), 1) ** 0.5
    loss.backward()
    gradients = {name: p.grad.double() for name, p in parameters.items() if p.grad is not None}
    return [tensor.detach().double().nan_to_num(posinf=0.0, neginf=0.0) for tensor in outputs], gradients


def gaps(
    wanted: tuple[list[Tensor], dict[str, Tensor]], got: tuple[list[Tensor], dict[str, Tensor]], floor: float
) -> tuple[float, float, str]:
    """Return the largest relative differences of outputs and of gradients, and the gradient's name.

    Relative to the largest entry of each tensor; for gradients, at least to `floor` times the largest of all.
    """
    assert len(wanted[0]) == len(got[0])
    # Nothing reads a dead site: whether its gradients are zeros or missing depends on what it is computed with.
    names = {*wanted[1], *got[1]}
    nothing = {name: torch.zeros_like({**wanted[1], **got[1]}[name]) for name in names}
    wanted, got = (wanted[0], {**nothing, **wanted[1]}), (got[0], {**nothing, **got[1]})
    worst = max((_gap(left, right, 1e-30) for left, right in zip(wanted[0], got[0], strict=True)), default=0.0)
    top = max((float(gradient.abs().max()) for gradient in wanted[1].values() if gradient.numel()), default=0.0)
    worst_gradient, name = max(
        ((_gap(gradient, got[1][name], floor * top), name) for name, gradient in wanted[1].items()), default=(0.0, "")
    )
    return worst, worst_gradient, name


def _gap(wanted: Tensor, got: Tensor, floor: float) -> float:
    assert wanted.shape == got.shape
    if not wanted.numel():
        return 0.0
    difference = float((wanted - got).abs().max()) / max(float(wanted.abs().max()), floor, 1e-30)
    return difference if difference == difference else float("inf")


def compare(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    config: MHCConfig,
    options: dict[str, Any] | None = None,
    seeds: Iterable[int | None] = (0,),
    double: bool = False,
    wide: bool = True,
    floor: float = 1e-4,
    attached: tuple[nn.Module, Report] | None = None,
) -> tuple[Report, list[tuple[float, float, str]]]:
    """Attach to a model, perturb, compile, and return how far it is from the oracle (see `gaps`), seed by seed.

    Args:
        model: a plain model; it keeps its mHC parameters.
        args: inputs.
        kwargs: inputs by name.
        config: the options that decide the function; min_sites must be 1.
        options: what else is given to the compiler (fusion, recompute, inner).
        seeds: of the perturbations; None is the start, at which the plain model itself is the oracle.
        double: run the rewritten model in float64 as well, so that only rounding to float32 inside it is left.
        wide: run the oracle's plain model in float64; a model that casts by hand may not run in it.
        floor: as in `gaps`.
        attached: of a model that is attached already (and in float64, if `double`): the model as it was before, in
            float64 if `wide`, and what `attach` returned.
    """
    kwargs = kwargs or {}
    widen = widened if wide else lambda value: value
    if double:
        args, kwargs = widened(args), widened(kwargs)
    if attached is None:
        plain = copy.deepcopy(model).double() if wide else copy.deepcopy(model)
        if double:
            model.double()
        report = mhc_compile.attach(model, *args, config=config, **kwargs)
    else:
        plain, report = attached
    ours = mhc_compile.parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in ours.items()}
    copies = {name: value.double().requires_grad_() for name, value in start.items()}
    by_oracle = oracle(plain, report, copies, config)
    compiled = torch.compile(model, backend="mhc", options={"inner": "aot_eager", **(options or {})})
    found = []
    for seed in seeds:
        with torch.no_grad():
            for name, value in (start if seed is None else perturbed(start, seed)).items():
                ours[name].copy_(value)
                copies[name].copy_(value)
        parameters = dict(plain.named_parameters())
        call = plain if seed is None else by_oracle
        both = parameters if seed is None else {**parameters, **copies}
        wanted = outputs_and_gradients(call, both, widen(args), widen(kwargs))
        trained = {name: parameter for name, parameter in model.named_parameters() if name in both}
        model.zero_grad()
        got = outputs_and_gradients(compiled, trained, args, kwargs)
        found.append(gaps(wanted, got, floor))
    return report, found


def assert_exact(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **more: Any
) -> Report:
    """Check that a rewritten model is what the oracle says: outputs to 1e-5, every gradient to 1e-4."""
    report, found = compare(model, args, kwargs, **more)
    for out, gradient, name in found:
        assert out <= 1e-5, f"outputs differ by {out:.1e}"
        assert gradient <= 1e-4, f"the gradient of {name} differs by {gradient:.1e}"
    return report
