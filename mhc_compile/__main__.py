"""The command line: `mhc-compile explain MODEL` and `mhc-compile demo`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .errors import MHCError

# Before transformers is imported: nothing here needs the network, and a machine without one must not wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

app = typer.Typer(
    name="mhc-compile",
    help='Rewrite a model\'s residual stream into manifold-constrained hyper-connections: torch.compile(backend="mhc").',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED = 1
BAD_MODEL = 2


@app.callback()
def main() -> None:
    """Keep the commands' names, however many there are."""


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face model type such as llama, a folder with a config.json, or module:function returning "
            "(model, inputs)."
        ),
    ],
    streams: Annotated[int, typer.Option(help="Number of parallel residual streams, 1 to 8.")] = 4,
    manifold: Annotated[str, typer.Option(help="sinkhorn, none or identity.")] = "sinkhorn",
    readout: Annotated[str, typer.Option(help="How streams become one value at the end: mean or learned.")] = "mean",
    sites: Annotated[str | None, typer.Option(help="Glob over site names, such as '*.mlp'.")] = None,
    min_sites: Annotated[int, typer.Option(help="Leave shorter chains as they are.")] = 2,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what backend="mhc" would rewrite in a model, and what it would leave alone and why.

    The model is built on the meta device: no weights are allocated and nothing is downloaded.
    """
    from .cli_models import ModelNotFoundError, load_example

    try:
        example = load_example(model)
    except ModelNotFoundError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_MODEL) from error
    with _errors_are_messages():
        from . import api
        from .config import MHCConfig

        config = MHCConfig(
            n_streams=streams, manifold=manifold, readout=readout, sites=sites, min_sites=min_sites
        )
        try:
            report = api.explain(example.model, *example.args, config=config, **example.kwargs)
        except MHCError:
            raise
        except Exception as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MHCError(
                f"{model} could not be traced with example inputs ({', '.join(example.kwargs) or 'positional'}): "
                f"{message} Pass module:function with a function that returns (model, inputs) for a call that works."
            ) from error
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
        if html is not None:
            report.to_html(html)
            typer.echo(f"Saved {html}", err=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for loss.png, report.html and results.json.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each run.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in a batch.")] = None,
    length: Annotated[int | None, typer.Option(help="Characters in a sequence.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the Llama model.")] = None,
    width: Annotated[int | None, typer.Option(help="Its hidden size, a multiple of 8.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    streams: Annotated[int, typer.Option(help="Number of parallel residual streams, 1 to 8.")] = 4,
    manifold: Annotated[str, typer.Option(help="sinkhorn, none or identity.")] = "sinkhorn",
    backend: Annotated[str, typer.Option(help="What compiles both runs: inductor, aot_eager or eager.")] = "inductor",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; left out, cuda where there is one.")] = None,
) -> None:
    """Train a small Llama on Python's standard library, once plain and once with mHC, and compare."""
    with _errors_are_messages():
        import torch

        from .demo.runner import run_demo
        from .demo.training import DemoOptions

        sizes = {"steps": steps, "batch": batch, "length": length, "layers": layers, "width": width, "lr": lr}
        given = {name: value for name, value in sizes.items() if value is not None}
        options = DemoOptions(
            seed=seed,
            n_streams=streams,
            manifold=manifold,
            backend=backend,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            **given,  # type: ignore[arg-type]
        )
        run_demo(options, out)


@contextmanager
def _errors_are_messages() -> Iterator[None]:
    try:
        yield
    except MHCError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED) from error


if __name__ == "__main__":
    app()
