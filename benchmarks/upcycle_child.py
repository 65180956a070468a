"""One run of `benchmarks.upcycle`: train a recipe with one seed, and print one line of JSON."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.demo.pretrained import load_model, load_tokens
from mhc_compile.demo.text import even_batches, random_batch

_MODEL_RATE = 1e-4


@dataclass(frozen=True)
class Recipe:
    """How the mHC parameters start and learn.

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


PLAIN = "plain"
# Each changes one thing of the recipe that all rates × 100 make.
RECIPES = (
    Recipe(PLAIN, None),
    Recipe("all × 100", (100.0, 100.0, 100.0)),
    Recipe("all × 10", (10.0, 10.0, 10.0)),
    Recipe("bias × 100", (1.0, 1.0, 100.0)),
    Recipe("phi × 100", (100.0, 1.0, 1.0)),
    Recipe("all × 100, scale 0.1", (100.0, 100.0, 100.0), scale=0.1),
    Recipe("all × 100, scale 1", (100.0, 100.0, 100.0), scale=1.0),
    Recipe("all × 100, lean .85", (100.0, 100.0, 100.0), lean=0.85),
    Recipe("all × 100, identity", (100.0, 100.0, 100.0), manifold="identity"),
    Recipe("all × 100, warm-up", (100.0, 100.0, 100.0), warm_up=0.1),
    Recipe("all × 1", (1.0, 1.0, 1.0)),
)


@dataclass(frozen=True)
class Lengths:
    """How much is trained and listened to.

    Attributes:
        steps: of training, with a constant learning rate.
        batch: windows in a step.
        length: tokens in a window.
        held_out: windows of other files.
    """

    steps: int
    batch: int
    length: int
    held_out: int


def prepare(recipe: Recipe, model: nn.Module, ids: Tensor) -> torch.optim.Optimizer:
    """Attach what a recipe asks for, and return the optimizer of all parameters."""
    if recipe.rates is None:
        return torch.optim.AdamW(model.parameters(), lr=_MODEL_RATE, weight_decay=0.0, fused=True)
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
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def train(recipe: Recipe, seed: int, lengths: Lengths) -> dict[str, Any]:
    """Train one recipe and return its row: losses of training and of each held-out window, and what the mixing does."""
    tokens, model = load_tokens(), load_model(seed)
    generator = torch.Generator().manual_seed(seed)
    size = lengths.batch, lengths.length
    batches = [random_batch(tokens.train, *size, generator) for _ in range(lengths.steps)]
    held_out = even_batches(tokens.held_out, *size, lengths.held_out)
    optimizer = prepare(recipe, model, batches[0])
    compiled: Any = torch.compile(model, backend="inductor" if recipe.rates is None else "mhc")
    losses, seconds = [], []
    rate = optimizer.param_groups[0]["lr"]
    for step, ids in enumerate(batches):
        begin = time.perf_counter()
        optimizer.param_groups[0]["lr"] = 0.0 if step < recipe.warm_up * lengths.steps else rate
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - begin)
    # The graph of training, without its backward: the model has no dropout, and another one would compile for a minute.
    heard = [float(compiled(input_ids=ids, labels=ids).loss.detach()) for ids in held_out]
    row = {**asdict(recipe), "seed": seed, "losses": losses, "held_out": heard, "seconds": seconds[1:]}
    if recipe.rates is not None:
        found = mhc_compile.inspect(model, input_ids=held_out[0], labels=held_out[0])
        row |= found.scalars() | {
            "similarity_over_depth": [site.similarity for site in found.sites],
            "moved_over_depth": [site.moved for site in found.sites],
        }
    return row


def main() -> None:
    """Read what to run, run it, print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--lengths", type=json.loads, required=True)
    given = parser.parse_args()
    # Runs share the cores among them: a step is quicker than one whose threads wait for each other.
    torch.set_num_threads(1)
    recipe = next(recipe for recipe in RECIPES if recipe.name == given.recipe)
    print(json.dumps(train(recipe, given.seed, Lengths(**given.lengths))))


if __name__ == "__main__":
    main()
