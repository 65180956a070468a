"""Cases of Hugging Face's Trainer and of accelerate in two processes, against a plain training loop in one."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments

import mhc_compile
from mhc_compile import distributed

from .launch import run
from .models import INNER, average, gap, llama, loss_of, small_first_bucket, tokens
from .models import attached as attached_of

STEPS, BATCH, LR = 3, 4, 0.5
# A block has 13 KiB of mHC parameters and 36 KiB of its own.
BUCKET_MB = 0.03


def attached() -> Any:
    """Return a Llama with perturbed mHC parameters."""
    return attached_of(build=llama)


def batches() -> list[Tensor]:
    """Return each step's whole batch."""
    return list(tokens(STEPS * BATCH).split(BATCH))


@functools.cache
def in_one_process() -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of a plain loop over one graph, and the parameters behind it."""
    model = attached()
    call = torch.compile(model, backend="mhc", options=INNER)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for batch in batches():
        loss = loss_of(call, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    torch._dynamo.reset()
    return losses, values(model)


def values(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a model's whole parameters under the names that they have without wrappers."""
    found = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name.replace("_orig_mod.", "").replace("module.", "")] = whole.detach().clone()
    return found


def differences(losses: list[float], model: torch.nn.Module) -> dict[str, Any]:
    """Return how far losses (of this rank's share) and parameters are from one process, and how far these moved."""
    wanted_losses, wanted = in_one_process()
    apart = [abs(average(loss) - one) for loss, one in zip(losses, wanted_losses, strict=True)]
    return {"loss": max(apart), "apart": gap(wanted, values(model)), "moved": gap(values(attached()), wanted)}


def buckets(model: Any) -> int:
    """Return the number of buckets that DDP reduces gradients in."""
    data = model._get_ddp_logging_data()
    return len(data.get("rebuilt_bucket_sizes", data["bucket_sizes"]).split(","))


class _Recording(Trainer):
    """A Trainer that takes the rows in order, and remembers its own losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin with no losses."""
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Remember the mean loss of this rank's rows."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append(float(result.detach()))
        return result


@small_first_bucket()
def trainer() -> dict[str, Any]:
    """The Trainer as a user starts it with torchrun: compiled in place, with the callback."""
    model = attached()
    model.compile(backend="mhc", options=INNER)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH // 2, report_to=[], use_cpu=True,
            ddp_backend="gloo", ddp_bucket_cap_mb=BUCKET_MB, save_strategy="no", optim="sgd", learning_rate=LR,
            lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in tokens(STEPS * BATCH)]
        training = _Recording(model=model, args=arguments, train_dataset=rows, callbacks=[mhc_compile.MHCCallback()])
        training.train()
    return differences(training.losses, model) | {"buckets": buckets(training.model_wrapped)}


def loop(accelerator: Accelerator, model: Any) -> tuple[Any, list[float]]:
    """Train with accelerate; return the prepared model and this rank's losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = DataLoader(tokens(STEPS * BATCH), batch_size=BATCH // 2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return model, losses


@small_first_bucket()
def accelerated() -> dict[str, Any]:
    """Accelerate with DDP."""
    handler = DistributedDataParallelKwargs(bucket_cap_mb=BUCKET_MB)
    model = attached()
    model.compile(backend="mhc", options=INNER)
    prepared, losses = loop(Accelerator(cpu=True, kwargs_handlers=[handler]), model)
    return differences(losses, prepared) | {"buckets": buckets(prepared)}


def accelerated_fsdp() -> dict[str, Any]:
    """Accelerate with FSDP2, our parameters sharded first.

    Accelerate takes FSDP for GPUs alone (1.15.0, `AcceleratorState.__init__`): with several processes on a CPU it falls
    back to DDP and says nothing. So its state is told here, and what it does then is its own.
    """
    model = attached()
    distributed.shard_parameters(model)
    for block in model.model.layers:
        block.compile(backend="mhc", options=INNER)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    state = accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    prepared, losses = loop(accelerator, model)
    sharded = all(isinstance(parameter, DTensor) for parameter in prepared.parameters())
    return differences(losses, prepared) | {"sharded": sharded}


CASES = {"Trainer": trainer, "accelerate": accelerated, "accelerate, FSDP2": accelerated_fsdp}

if __name__ == "__main__":
    run(trained=CASES)
