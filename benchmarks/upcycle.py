"""Continue SmolLM2-135M on real text, plain and with mHC on the same batches: what makes the mixing learn?

    python -m benchmarks.upcycle [--steps 200] [--seeds 1] [--only NAME …] [--out FILE]

Each run of the table changes one thing: the learning rate of phi, scale and bias beside the model's own, the start of
scale, the lean of pre, identity mixing, a warm-up of the mixing alone. Held-out loss is what counts; cosine between
streams, distance from the start and gain say why. CPU; two threads take about 12 s a step of 1024 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.demo.pretrained import Tokens, load_model, load_tokens
from mhc_compile.demo.text import even_batches, random_batch

from .environment import environment

_MODEL_RATE = 1e-4


@dataclass(frozen=True)
class Recipe:
    """One run: how the mHC parameters start and learn.

    Attributes:
        name: what the table calls it.
        rates: learning rates of phi, scale and bias, as multiples of the model's; None is the plain model.
        scale: where scale starts; None leaves `init="preserve"`'s 0.01.
        lean: what the branch reads of its own stream at the start; None leaves .625.
        manifold: the option.
        warm_up: share of the steps in which the mixing alone learns.
    """

    name: str
    rates: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    scale: float | None = None
    lean: float | None = None
    manifold: str = "sinkhorn"
    warm_up: float = 0.0


RECIPES = (
    Recipe("plain", None),
    Recipe("mhc, one rate"),
    Recipe("all x10", (10.0, 10.0, 10.0)),
    Recipe("all x100", (100.0, 100.0, 100.0)),
    Recipe("bias x100", (1.0, 1.0, 100.0)),
    Recipe("phi x100", (100.0, 1.0, 1.0)),
    Recipe("all x100, scale 0.1", (100.0, 100.0, 100.0), scale=0.1),
    Recipe("all x100, scale 1", (100.0, 100.0, 100.0), scale=1.0),
    Recipe("all x100, lean .85", (100.0, 100.0, 100.0), lean=0.85),
    Recipe("all x100, identity", (100.0, 100.0, 100.0), manifold="identity"),
    Recipe("all x100, warm-up", (100.0, 100.0, 100.0), warm_up=0.1),
)


def prepare(recipe: Recipe, model: nn.Module, ids: Tensor) -> torch.optim.Optimizer:
    """Attach what a recipe asks for, and return the optimizer of all parameters."""
    if recipe.rates is None:
        return torch.optim.AdamW(model.parameters(), lr=_MODEL_RATE, weight_decay=0.0)
    mhc_compile.attach(model, input_ids=ids, labels=ids, manifold=recipe.manifold)
    ours = mhc_compile.parameters(model)
    with torch.no_grad():
        for name, parameter in ours.items():
            if recipe.scale is not None and name.endswith(".scale"):
                parameter.fill_(recipe.scale)
            if recipe.lean is not None and name.endswith(".bias"):
                # The other streams share the rest, so that pre still sums to one.
                own, others = parameter[:4].argmax(), torch.tensor((1.0 - recipe.lean) / 3.0)
                parameter[:4] = torch.logit(others)
                parameter[own] = torch.logit(torch.tensor(recipe.lean))
    mine = {id(parameter) for parameter in ours.values()}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in mine], "lr": _MODEL_RATE}]
    for ending, rate in zip((".phi", ".scale", ".bias"), recipe.rates, strict=True):
        groups.append({"params": [p for n, p in ours.items() if n.endswith(ending)], "lr": rate * _MODEL_RATE})
    return torch.optim.AdamW(groups, weight_decay=0.0)


def run(recipe: Recipe, tokens: Tokens, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one recipe, and return its row."""
    model = load_model(seed)
    generator = torch.Generator().manual_seed(seed)
    batches = [random_batch(tokens.train, options.batch, options.length, generator) for _ in range(options.steps)]
    held_out = even_batches(tokens.held_out, options.batch, options.length, options.held_out)
    optimizer = prepare(recipe, model, batches[0])
    compiled: Any = torch.compile(model, backend="inductor" if recipe.rates is None else "mhc")
    torch._dynamo.reset()
    losses, began = [], time.perf_counter()
    rate = optimizer.param_groups[0]["lr"]
    for step, ids in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.0 if step < recipe.warm_up * options.steps else rate
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    seconds = time.perf_counter() - began
    model.eval()
    with torch.no_grad():
        heard = [float(compiled(input_ids=ids, labels=ids).loss) for ids in held_out]
    row = {
        **asdict(recipe), "seed": seed, "losses": losses, "held_out": statistics.fmean(heard),
        "seconds_per_step": seconds / options.steps,
    }  # fmt: skip
    if recipe.rates is not None:
        found = mhc_compile.inspect(model, input_ids=held_out[0], labels=held_out[0])
        row |= found.scalars() | {"similarity_over_depth": [site.similarity for site in found.sites]}
    return row


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows that were asked for, seed by seed."""
    tokens = load_tokens()
    wanted = [recipe for recipe in RECIPES if not options.only or recipe.name in options.only]
    for seed in range(options.seeds):
        for recipe in wanted:
            yield run(recipe, tokens, seed, options)


def main() -> None:
    """Run, print a line for each run, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=8, help="batches")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of recipes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/upcycle.json"))
    options = parser.parse_args()
    done: list[dict[str, Any]] = []
    for row in rows(options):
        done.append(row)
        more = "".join(f"  {k.removeprefix('mhc_')} {row[k]:.4g}" for k in row if k.startswith("mhc_"))
        print(f"{row['name']:<22} seed {row['seed']}  held out {row['held_out']:.4f}{more}", flush=True)
        content = {"environment": environment("cpu"), "steps": options.steps, "rows": done}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
