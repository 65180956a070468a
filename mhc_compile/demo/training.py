"""Runs of one small model over the same batches: plain, and rewritten by backend="mhc" on and off a manifold."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mhc_compile

from .text import VOCABULARY

_HEADS = 4
_WARMUP = 20
_WEIGHT_DECAY = 0.1
# What "the last steps" are when the train loss is quoted: one batch alone is noisy.
_TAIL = 20


@dataclass(frozen=True)
class DemoOptions:
    """The sizes of the demo.

    Attributes:
        seed: of the weights and the batches.
        steps: optimizer steps of each run.
        batch: sequences in a batch.
        length: characters in a sequence.
        layers: of the Llama model; two residual adds each.
        width: its hidden size, a multiple of 8 (four attention heads of an even size).
        lr: peak learning rate of AdamW.
        n_streams: streams of the mHC run.
        manifold: of the mHC run.
        backend: what compiles both runs: "inductor", or "aot_eager" where Inductor has no compiler.
        device: "cpu" or "cuda".
        threads: of PyTorch on the CPU. The model is so small that a second one gains nothing, and with one
            the losses of a seed are the same to the last bit: no sum is split.
    """

    seed: int = 0
    steps: int = 300
    batch: int = 8
    length: int = 128
    layers: int = 4
    width: int = 64
    lr: float = 4e-3
    n_streams: int = 4
    manifold: str = "sinkhorn"
    backend: str = "inductor"
    device: str = "cpu"
    threads: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as plain JSON types."""
        return asdict(self)


@dataclass
class Run:
    """One model on its way.

    Attributes:
        name: "plain", "mHC", or "hyper-connections" where nothing constrains the mixing matrices.
        model: the model; with mHC parameters attached in all runs but the plain one.
        compiled: what is called.
        optimizer: AdamW over all parameters of `model`.
        losses: training loss of every step so far, in nats per character.
        seconds: wall time of every step so far; the first one compiles.
    """

    name: str
    model: nn.Module
    compiled: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: Tensor, lr: float) -> None:
        """Train on one batch, int64 [batch, length]."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Reading the loss waits for the device, so that the time is that of the whole step.
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - started)

    def held_out(self, batches: list[Tensor]) -> list[float]:
        """Return the loss of each batch, without training on it.

        The model has no dropout, so the graph of the training step serves: under `no_grad` or in eval mode
        there would be another one to compile.
        """
        return [self.compiled(input_ids=batch, labels=batch).loss.item() for batch in batches]

    @property
    def parameters(self) -> int:
        """Number of parameters, mHC's included, in elements."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def step_seconds(self) -> float:
        """Median time of a step, without the first two (the first compiles)."""
        return statistics.median(self.seconds[2:] or self.seconds)

    @property
    def compile_seconds(self) -> float:
        """What the first step took beyond a usual one."""
        return max(self.seconds[0] - self.step_seconds, 0.0)

    @property
    def train_loss(self) -> float:
        """Mean training loss of the last steps."""
        return statistics.fmean(self.losses[-_TAIL:])


def learning_rate(step: int, options: DemoOptions) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to a tenth."""
    warmup = min(_WARMUP, options.steps // 4)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(options.steps - warmup, 1)
    return options.lr * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def plain_run(options: DemoOptions) -> Run:
    """Set up the run of the model as its authors wrote it."""
    model = _llama(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=_WEIGHT_DECAY)
    compiled = torch.compile(model, backend=options.backend, dynamic=False)
    return Run("plain", model, compiled, optimizer)


def mhc_run(options: DemoOptions, example: Tensor, constrained: bool = True) -> Run:
    """Set up the run of the same model with mHC: attach, then the optimizer, then compile.

    Args:
        options: the sizes.
        example: one batch, int64 [batch, length].
        constrained: to the options' manifold; if not, the run is one of plain hyper-connections.
    """
    model = _llama(options)
    own = list(model.parameters())
    manifold = options.manifold if constrained else "none"
    config = mhc_compile.MHCConfig(n_streams=options.n_streams, manifold=manifold, inner=options.backend)
    mhc_compile.attach(model, input_ids=example, labels=example, config=config)
    groups = [
        {"params": own, "weight_decay": _WEIGHT_DECAY},
        *mhc_compile.param_groups(model, weight_decay=_WEIGHT_DECAY),
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    compiled = torch.compile(model, backend="mhc", options={"inner": options.backend}, dynamic=False)
    return Run("mHC" if constrained else "hyper-connections", model, compiled, optimizer)


def arithmetic_ratio(plain: Run, options: DemoOptions, sites: int) -> float:
    """Return the multiply-adds of a forward with mHC, relative to the plain model's.

    Counted are matrix products: the plain model's by PyTorch's own counter, and of mHC, for each token and site, the
    projection of n·C values onto n² + 2n coefficients and the n² + 2n multiples of C values that mixing, collapse and
    write add up. In the backward both double.
    """
    batch = torch.zeros(options.batch, options.length, dtype=torch.int64, device=options.device)
    # The counter knows no fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        plain.model(input_ids=batch)
    n = options.n_streams
    ours = 2 * sites * batch.numel() * (n * n + 2 * n) * (n + 1) * options.width
    return 1.0 + ours / counter.get_total_flops()


def _llama(options: DemoOptions) -> nn.Module:
    """Build the model; the same seed gives both runs the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        max_position_embeddings=options.length,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(options.device)


def why_no_inductor(device: str) -> str | None:
    """Try Inductor on one small function; return why it fails here, or None if it works.

    Only a trial tells: besides a compiler, Inductor needs Python's headers and a folder it may load
    libraries from.
    """

    def probe(value: Tensor) -> Tensor:
        return torch.sin(value) + 1.0

    try:
        torch.compile(probe, backend="inductor")(torch.ones(8, device=device))
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
    return None
