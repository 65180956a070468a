"""Cases of torchtitan's own parallelize and pipelining functions, through the adapter, against one process."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

import mhc_compile
from mhc_compile.attachment.entrances import compiled_by
from mhc_compile.distributed.torchtitan import adopt, with_mhc

from ..carrying import perturb
from .launch import run
from .models import average, gap, gradients, mine

LENGTH, BATCH, LAYERS = 16, 8, 4
COMPILE = CompileConfig(enable=True, backend="aot_eager")
TRAINING = TrainingConfig(local_batch_size=BATCH, seq_len=LENGTH, mixed_precision_param="float32")


@functools.cache
def described() -> Any:
    """Return torchtitan's description of its smallest Llama, with mHC and fewer layers."""
    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:LAYERS]
    for layer in spec.model.layers:
        # Flex attention does not train on a CPU.
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return with_mhc(spec)


def llama() -> Any:
    """Return an attached Llama with torchtitan's weights and perturbed mHC parameters."""
    torch.manual_seed(0)
    model = described().model.build()
    model.init_weights(buffer_device=torch.device("cpu"))
    mhc_compile.attach(model, tokens()[:1])
    perturb(model)
    adopt(model)
    return model


def tokens() -> Tensor:
    """Return token ids, the same on every rank."""
    return torch.randint(0, 2048, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the loss of predicting the next token."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@functools.cache
def in_one_graph() -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the Llama, compiled whole in this process."""
    model = llama()
    loss = loss_of(torch.compile(model, backend="mhc", options={"inner": "aot_eager"})(tokens()), tokens())
    loss.backward()
    torch._dynamo.reset()
    return float(loss.detach()), gradients(model)


def settings(**degrees: int) -> dict[str, Any]:
    """Return what the trainer hands to a spec's functions."""
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor", pipeline_parallel_schedule="1F1B", **degrees)
    dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    dims.build_mesh()
    return {
        "parallel_dims": dims, "training": TRAINING, "parallelism": parallelism, "compile_config": COMPILE,
        "ac_config": None, "dump_folder": "",
    }  # fmt: skip


def sharded(checkpoint: bool = False) -> dict[str, Any]:
    """`parallelize_llama` with FSDP2 over two ranks."""
    wanted = in_one_graph()
    model = llama()
    ac = FullAC.Config() if checkpoint else None
    model = described().parallelize_fn(model, **{**settings(data_parallel_shard_degree=2), "ac_config": ac})
    on_gloo(model)
    loss = loss_of(model(mine(tokens())), mine(tokens()))
    (loss / dist.get_world_size()).backward()
    apart = abs(average(float(loss.detach())) / wanted[0] - 1)
    return {"loss": apart, "gradient": gap(wanted[1], gradients(model))}


def on_gloo(model: nn.Module) -> None:
    """Have FSDP2 sum gradients plainly: torchtitan has it multiply by 1 on the way, which gloo cannot."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def piped() -> dict[str, Any]:
    """`pipeline_llm` with two stages."""
    wanted_loss, wanted = in_one_graph()
    given = settings(pipeline_parallel_degree=2, data_parallel_shard_degree=1)
    schedule, parts, first, last = described().pipelining_fn(
        llama(), **given, device=torch.device("cpu"), model_config=described().model,
        parallelize_fn=described().parallelize_fn, loss_fn=lambda logits, ids: (loss_of(logits, ids) / BATCH, {}),
    )  # fmt: skip
    losses: list[Tensor] = []
    schedule.step(*((tokens(),) if first else ()), **({"target": tokens(), "losses": losses} if last else {}))
    loss = torch.stack(losses).sum().detach() if last else torch.zeros(())
    dist.all_reduce(loss)
    got = {name: value for part in parts for name, value in gradients(part).items()}
    return {
        "loss": abs(float(loss) / wanted_loss - 1),
        "gradient": gap({name: wanted[name] for name in got}, got),
        "parameters": len(got),
    }


def from_meta() -> dict[str, Any]:
    """As the trainer does it: built on meta, parallelized, materialized, initialized."""
    wanted = described().model.build()
    mhc_compile.attach(wanted, tokens()[:1])
    with torch.device("meta"):
        model = described().model.build()
    model = described().parallelize_fn(model, **settings(data_parallel_shard_degree=2))
    on_gloo(model)
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter.fill_(7.0)
    model.init_weights(buffer_device=torch.device("cpu"))
    names = mhc_compile.parameters(wanted)
    got = {name: parameter.full_tensor() for name, parameter in mhc_compile.parameters(model).items()}
    loss = loss_of(model(mine(tokens())), mine(tokens()))
    loss.backward()
    return {"equal": all(torch.equal(names[name], got[name]) for name in names), "finite": bool(loss.isfinite())}


def flex() -> dict[str, Any]:
    """Flex attention, beside which torchtitan takes no backend's name but its own; it does not run on a CPU."""
    spec = with_mhc(model_registry("debugmodel"))
    with torch.device("meta"):
        model = spec.model.build()
    inductor = CompileConfig(enable=True)
    model = spec.parallelize_fn(model, **{**settings(data_parallel_shard_degree=2), "compile_config": inductor})
    model.verify_module_protocol()
    kinds = {type(block.attention.inner_attention).__name__ for block in model.layers.values()}
    compiled = {compiled_by(block) for block in model.layers.values()}
    return {
        "sites": len(mhc_compile.parameters(model)) // 3,
        "blocks": len(model.layers),
        "attention": sorted(kinds),
        "compiled by": sorted(map(str, compiled)),
    }


def refused() -> dict[str, Any]:
    """Settings under which mHC would not run, or not as it should."""
    said = {}
    for name, changes in {
        "off": {"compile_config": CompileConfig()},
        "named": {"compile_config": CompileConfig(enable=True, backend="mhc")},
        "layouts": {"parallelism": ParallelismConfig(spmd_backend="spmd_types")},
    }.items():
        try:
            described().parallelize_fn(llama(), **{**settings(data_parallel_shard_degree=2), **changes})
        except mhc_compile.MHCOptionError as error:
            said[name] = str(error)
    return said


EXACT = {
    "FSDP2": sharded,
    "FSDP2, checkpointed": functools.partial(sharded, checkpoint=True),
    "pipeline": piped,
}
CASES = EXACT | {"from meta": from_meta, "flex attention": flex, "refused": refused}

if __name__ == "__main__":
    # torchtitan 0.3.0 takes "cuda" where it finds no accelerator (tools/utils.py, `get_device_info`).
    parallel_dims.device_type = "cpu"
    run(titan=CASES)
