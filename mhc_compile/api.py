"""The public functions that act on a model, from `attach` to `detach`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .arguments import read_arguments
from .attachment.adapters import join_adapter
from .attachment.entrances import close_entrances, leave_in_place
from .attachment.sentinels import disarm
from .attachment.site_parameters import CHILD, SiteParameters, attached_config, named_parameters, owners_in
from .config import STRUCTURAL, MHCConfig
from .dynamo.frames import is_sharded
from .errors import ConfigMismatchError, MHCError, MHCOptionError, NoResidualError, NotAttachedError
from .look import Look, look
from .memory import MEMORY
from .planning.binding import attach_plan, take_back
from .planning.chain_sizes import ChainSize, chain_sizes
from .planning.graph_breaks import forget_breaks
from .planning.nothing_found import nothing_found
from .reports.pipeline_prediction import Pipeline, PipelinePrediction, predict_pipeline
from .reports.prediction import Workload, predict
from .reports.reporting import Report, forget_report, keep_report, report_of
from .signs_of_life import sign_of_life

# Of the mHC parameters, beside the rate of a checkpoint that is trained on.
MIXING_RATE = 10.0


def attach(model: nn.Module, *args: Any, config: MHCConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Create the mHC parameters of a model ahead of its first call.

    Do so before building the optimizer, loading a checkpoint, or wrapping the model in DDP. The model is traced with
    the example input; its arithmetic does not run.

    Args:
        model: the model, or `torch.compile(model)`.
        *args: one example input; left out, the model's own `dummy_inputs`.
        config: the options, or a dictionary of them; left out, those already attached, or the defaults.
        **kwargs: the example input's keyword arguments. What names an option, and no parameter of the model's
            forward, is one: `attach(model, input_ids=ids, n_streams=2)`.

    Returns:
        What was found. Attaching again with the same options adds only what is missing. A model that carries streams
        itself keeps its own parameters, and none are added for them.

    Raises:
        ConfigMismatchError: other options are attached.
        MHCOptionError: an unknown option, a bad value, or a keyword that the model does not take.
        NoResidualError: nothing was found, and `config.strict`.
        StreamCutError: a graph break lies inside a residual block, or Python code computes the hidden state anew
            between two graphs; with `on_graph_break="error"`, any graph break cuts the residual stream.
        MHCError: FSDP2 has sharded the model already.
    """
    root = unwrap(model)
    if is_sharded(root):
        raise MHCError(
            "this model is sharded by fully_shard already: its blocks hold pieces of their parameters, and nothing "
            "would synchronize new ones. Call mhc_compile.attach(model, example_input) first, then "
            "mhc_compile.distributed.shard_parameters(model), then fully_shard."
        )
    given = read_arguments(root, args, kwargs, config)
    attached = attached_config(root)
    if attached is not None and given.config is not None:
        _require_same(attached, given.config)
    config = given.config or attached or MHCConfig()
    with sign_of_life(f"tracing {type(root).__name__}"):
        found = look(root, given.args, given.kwargs, config)
    if config.strict and not (found.report.sites or found.report.native):
        raise NoResidualError(nothing_found(found.merged(), config))
    frames = [frame for _, frame in found.links.plans]
    created: list[tuple[nn.Module, str]] = []
    try:
        for plan, frame in zip(found.plans, frames, strict=True):
            created += attach_plan(plan, frame, config)
        join_adapter(root)
        if any(module in MEMORY.plain for module in root.modules()):
            MEMORY.plain.clear()
            torch._dynamo.reset()
        keep_report(root, found.report)
    except BaseException:
        take_back(created, root)
        raise
    finally:
        found.forget()
    return found.report


def explain(
    model: nn.Module,
    *args: Any,
    config: MHCConfig | Mapping[str, Any] | None = None,
    predict_for: Workload | None = None,
    **kwargs: Any,
) -> Report:
    """Look at a model as `attach` would, and change nothing. Works on the meta device.

    Args and errors are those of `attach`; nothing found is no error here: the report says so. With `predict_for`, a
    `mhc_compile.reports.prediction.Workload`, the report also predicts memory and step time of training on a GPU; it
    then raises MHCOptionError where nothing was found. A `mhc_compile.reports.pipeline_prediction.Pipeline` in it adds
    where to cut the model into pipeline stages, and what its sends cost.
    """
    root = unwrap(model)
    given = read_arguments(root, args, kwargs, config)
    config = given.config or attached_config(root) or MHCConfig()
    pipeline = predict_for.pipeline if predict_for is not None else None
    found = look(root, given.args, given.kwargs, config, predict_for is not None, pipeline is not None)
    if predict_for is not None:
        sizes = chain_sizes(found.merged(), config)
        found.report.prediction = predict(sizes, found.work, config.n_streams, predict_for, config.manifold)
        if pipeline is not None:
            found.report.pipeline = _piped(found, sizes, predict_for, pipeline)
    found.forget()
    return found.report


def _piped(found: Look, sizes: tuple[ChainSize, ...], workload: Workload, pipeline: Pipeline) -> PipelinePrediction:
    if len(found.pieces) != 1 or len(sizes) != 1:
        raise MHCOptionError(
            f"a pipeline is proposed for a model of one stream in one graph; this one has {len(sizes)} streams in "
            f"{len(found.pieces)} graphs. Leave pipeline out."
        )
    config = found.report.config
    tokens = workload.tokens or sizes[0].tokens
    return predict_pipeline(
        found.pieces[0], sizes[0], tokens, config.n_streams, config.manifold, pipeline, workload.gpu
    )


def report(model: nn.Module) -> Report:
    """Return what the last compilation (or `attach`) did to a model.

    Raises:
        NotAttachedError: the model was neither attached nor compiled with backend="mhc".
    """
    found = report_of(unwrap(model))
    if found is None:
        raise NotAttachedError(
            "there is no report: the model was neither attached nor called through backend='mhc' yet. "
            "mhc_compile.explain(model, example_input) looks at it without changing it."
        )
    return found


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the mHC parameters by their names in `state_dict()`; empty for a plain model."""
    return named_parameters(unwrap(model))


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    model_lr: float | None = None,
    mixing_rate: float = MIXING_RATE,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Return optimizer groups of the mHC parameters alone: phi decays, scale and bias do not.

    Decay on `bias` would pull the streams' mixing away from the identity towards the plain mean.

    Where a checkpoint is trained on, the model's own learning rate hardly moves the mixing, and a hundred times it
    costs held-out loss; ten times it moves the mixing and costs nothing (`benchmarks.upcycle`, SmolLM2-135M).

    Args:
        model: a model with mHC parameters.
        weight_decay: for phi.
        model_lr: the learning rate of the model's own parameters; the groups then learn at `mixing_rate` times it. Left
            out, they learn at the optimizer's rate, or at the `lr` given here: what a model trained from scratch wants.
        mixing_rate: see `model_lr`.
        **kwargs: further options for both groups, such as `lr`.

    Raises:
        NotAttachedError: the model has no mHC parameters.
        MHCOptionError: both `lr` and `model_lr` are given.
    """
    if model_lr is not None:
        if "lr" in kwargs:
            raise MHCOptionError(
                "param_groups was given both lr, the learning rate of the mHC parameters, and model_lr, which they "
                "learn at a multiple of: leave out one."
            )
        kwargs["lr"] = mixing_rate * model_lr
    named = parameters(model)
    if not named:
        raise NotAttachedError("the model has no mHC parameters: call mhc_compile.attach(model, example_input).")
    decayed = [parameter for name, parameter in named.items() if name.endswith(".phi")]
    kept = [parameter for name, parameter in named.items() if not name.endswith(".phi")]
    return [
        {"params": decayed, "weight_decay": weight_decay, **kwargs},
        {"params": kept, "weight_decay": 0.0, **kwargs},
    ]


def reset_parameters(model: nn.Module) -> None:
    """Give a model's mHC parameters the values that they began with, sharded or not.

    For training code that allocates parameters and then initializes them (`to_empty`, `init_weights`). Parameters that
    leave the meta device are reset without it.

    Raises:
        NotAttachedError: the model has no mHC parameters.
    """
    sites = [module for module in unwrap(model).modules() if isinstance(module, SiteParameters)]
    if not sites:
        raise NotAttachedError("the model has no mHC parameters: call mhc_compile.attach(model, example_input).")
    for site in sites:
        site.reset_parameters()


def detach(model: nn.Module) -> None:
    """Take the mHC parameters off a model again; its plain forward runs as before.

    This also ends `model.compile(backend="mhc")`, of the model and of its blocks: called again it would attach anew.
    What `torch.compile(model)` has returned does so; call `model` itself. Trained mHC parameters are dropped: the plain
    model computes something else once they have moved.

    Raises:
        NotAttachedError: the model has no mHC parameters.
    """
    root = unwrap(model)
    owners = list(owners_in(root))
    if not owners:
        raise NotAttachedError("the model has no mHC parameters: there is nothing to detach.")
    disarm(root)
    close_entrances(root)
    leave_in_place(root)
    for _, owner, _ in owners:
        delattr(owner, CHILD)
    forget_breaks(root)
    forget_report(root)
    # Compiled graphs still hold the streams; without their parameters they could only raise.
    torch._dynamo.reset()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile(model)`, DataParallel and DistributedDataParallel."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return unwrap(inner)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrap(model.module)
    return model


def _require_same(attached: MHCConfig, config: MHCConfig) -> None:
    for name in STRUCTURAL:
        if getattr(attached, name) != getattr(config, name):
            raise ConfigMismatchError(
                f"this model's mHC parameters were made with {name}={getattr(attached, name)!r}, but "
                f"{name}={getattr(config, name)!r} is asked for now. Use the same, or call "
                "mhc_compile.detach(model) first (trained mHC parameters are dropped: save them before)."
            )
