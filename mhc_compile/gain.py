"""The composite gain of a model's mixing matrices: how far a signal can grow on its way through the streams.

arXiv 2512.24880, section 3.1: for the product of the mixing matrices over a range of depth, the largest
absolute row sum bounds the forward signal, the largest absolute column sum the gradient. A plain residual
stream has exactly 1; the paper reports about 1.6 for mHC and about 3000 for unconstrained
hyper-connections at 27B parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import register_backend
from torch.fx import GraphModule

from .api import explain, parameters, unwrap
from .errors import MHCError, NotAttachedError
from .passes.record_mixing import MixingRecorder
from .reports.reporting import keep_report, report_of

_INNER = "mhc_record_mixing"
_RECORD: ContextVar[list[tuple[Tensor, SiteObservation]] | None] = ContextVar("mhc_mixing", default=None)


@dataclass(frozen=True)
class SiteObservation:
    """What a site did with one input.

    Attributes:
        res: its mixing matrices [*, n, n], `res[out, in]`, float32 (float64 for float64 streams).
        similarity: cosine between two different streams that come in, mean over pairs and tokens; 1 while all are
            equal, and for a single stream.
    """

    res: Tensor
    similarity: float


@dataclass(frozen=True)
class ChainGain:
    """The composite gain of one chain, by depth.

    Attributes:
        sites: names of the chain's sites, in the order in which the stream passes them.
        forward: for k = 1 … len(sites), the largest absolute row sum of res_k · … · res_1, mean over tokens.
        backward: the same for column sums.
    """

    sites: tuple[str, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]


def composite_gain(matrices: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Return the forward and the backward gain of every prefix of a product of mixing matrices.

    Args:
        matrices: one [*, n, n] tensor per site, `res[out, in]`, in the order in which the stream passes
            them. The leading shapes may differ between sites (a view of the stream), the number of tokens
            may not.

    Returns:
        two lists of `len(matrices)` floats, computed in float64: for the product res_k · … · res_1 of each
        token, the largest absolute row sum (forward) and column sum (backward), averaged over tokens.

    Raises:
        MHCError: the sites see different numbers of tokens or streams, so that there is no product per token.
    """
    forward: list[float] = []
    backward: list[float] = []
    product: Tensor | None = None
    for res in matrices:
        step = res.detach().double().reshape(-1, *res.shape[-2:])
        if product is not None and product.shape != step.shape:
            raise MHCError(
                f"the sites of this chain mix {tuple(product.shape)} and {tuple(step.shape)} (tokens, n, "
                "n): their product per token does not exist. Give composite_gain the matrices of a run of "
                "sites with one resolution."
            )
        product = step if product is None else step @ product
        magnitude = product.abs()
        forward.append(float(magnitude.sum(-1).amax(-1).mean()))
        backward.append(float(magnitude.sum(-2).amax(-1).mean()))
    return forward, backward


def mixing_matrices(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Run a model once and return every site's mixing matrix; args, errors and order are those of `observe`.

    Returns:
        by site name: res [*, n, n], `res[out, in]`, float32 (float64 for float64 streams).
    """
    return {name: seen.res for name, seen in observe(model, *args, **kwargs).items()}


def observe(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, SiteObservation]:
    """Run a model once and return what every site did.

    The rewritten graph is interpreted node by node, without autograd, in the mode (train or eval) that the
    model is in. The model's report, its compiled code and its parameters stay as they are.

    Args:
        model: a model with mHC parameters, or `torch.compile(model)`.
        *args: an input.
        **kwargs: the input's keyword arguments.

    Returns:
        by site name, in the order of execution.

    Raises:
        NotAttachedError: the model has no mHC parameters.
    """
    root = unwrap(model)
    named = {id(parameter): name for name, parameter in parameters(root).items()}
    if not named:
        raise NotAttachedError("the model has no mHC parameters: call mhc_compile.attach(model, example_input).")
    # "site" keeps `pre` one node of the graph, whatever the model is compiled with otherwise.
    options: dict[str, Any] = {"inner": _INNER, "fusion": "site"}
    # `forward`, not `__call__`: a module that was compiled in place would run that compilation.
    compiled = torch.compile(root.forward, backend="mhc", options=options)
    shown = report_of(root)
    with _recording() as calls, torch.no_grad():
        compiled(*args, **kwargs)
    if shown is not None:
        keep_report(root, shown)
    return {named[id(phi)].removesuffix(".phi"): seen for phi, seen in calls}


def chain_gains(model: nn.Module, *args: Any, **kwargs: Any) -> list[ChainGain]:
    """Return the composite gain over depth of each of a model's chains, for one input.

    Args and errors are those of `mixing_matrices` and `composite_gain`.
    """
    matrices = mixing_matrices(model, *args, **kwargs)
    gains = []
    for chain in explain(model, *args, **kwargs).chains:
        names = tuple(site.name for site in chain.sites)
        forward, backward = composite_gain([matrices[name] for name in names])
        gains.append(ChainGain(names, tuple(forward), tuple(backward)))
    return gains


@contextmanager
def _recording() -> Iterator[list[tuple[Tensor, SiteObservation]]]:
    calls: list[tuple[Tensor, SiteObservation]] = []
    token = _RECORD.set(calls)
    try:
        yield calls
    finally:
        _RECORD.reset(token)


def _note(phi: Tensor, res: Tensor, streams: Tensor) -> None:
    calls = _RECORD.get()
    if calls is not None:
        calls.append((phi, SiteObservation(res, _similarity(streams))))


def _similarity(streams: Tensor) -> float:
    n = streams.shape[-2]
    if n == 1:
        return 1.0
    unit = nn.functional.normalize(streams.float(), dim=-1)
    cosines = unit @ unit.mT
    return float(((cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))).mean())


@register_backend(name=_INNER)
def _record_mixing(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    return MixingRecorder(graph_module, _note).run
