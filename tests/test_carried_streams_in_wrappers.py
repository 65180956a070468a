"""Streams of blocks that FSDP2, DDP or activation checkpoints stand around: compared with one graph."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mhc_compile
from mhc_compile import NotAttachedError, StreamCutError

from .carrying import Looped, compile_blocks, one_process_group, run, same, stack, wanted
from .models import QUICK, Stack, features


def test_a_sharded_model_is_not_attached_at_its_first_call():
    from torch.distributed.fsdp import fully_shard

    with one_process_group():
        model = Stack(3)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        with pytest.raises((NotAttachedError, StreamCutError), match="attach"):
            torch.compile(model, backend="mhc", options=QUICK)(features())
        assert not mhc_compile.parameters(model)


@pytest.mark.parametrize("how", ["blocks, then sharded", "sharded, then blocks", "whole", "in place"])
def test_a_sharded_model_is_the_model_of_one_graph(how):
    """The hooks of FSDP2 break the graph at every block; here on one process, which shards and gathers all the same."""
    from torch.distributed.fsdp import fully_shard

    want, pieces = wanted(3)
    with one_process_group():
        if how == "blocks, then sharded":
            compile_blocks(pieces, backend="mhc", options=QUICK)
        for block in pieces.blocks:
            fully_shard(block)
        fully_shard(pieces)
        if how == "sharded, then blocks":
            compile_blocks(pieces, backend="mhc", options=QUICK)
        if how == "in place":
            pieces.compile(backend="mhc", options=QUICK)
        call = torch.compile(pieces, backend="mhc", options=QUICK) if how == "whole" else pieces
        loss, sharded = run(pieces, call)
        same(want, (loss, {name: grad.full_tensor() for name, grad in sharded.items()}))


def test_the_python_reducer_of_ddp():
    want, pieces = wanted(3)
    with one_process_group(), torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        wrapped = nn.parallel.DistributedDataParallel(pieces)
        same(want, run(pieces, torch.compile(wrapped, backend="mhc", options=QUICK)))


class Checkpointed(Looped):
    """Checkpoints its blocks by hand."""

    how = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(inputs)
        for block in self.blocks:
            hidden = block(hidden) if self.how is None else checkpoint(block, hidden, **self.how)
        return self.readout(hidden)


def _selective():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("how", [{"use_reentrant": False}, {"use_reentrant": False, "context_fn": _selective}])
def test_checkpoints_around_compiled_blocks(how):
    want, pieces = wanted(3, Checkpointed)
    compile_blocks(pieces, backend="mhc", options=QUICK)
    pieces.how = how
    same(want, run(pieces, pieces))


def test_a_checkpoint_over_several_blocks():
    want, pieces = wanted(4)
    compile_blocks(pieces, backend="mhc", options=QUICK)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        hidden = pieces.stem(inputs)
        for start in (0, 2):
            run_pair = lambda value, start=start: pieces.blocks[start + 1](pieces.blocks[start](value))  # noqa: E731
            hidden = checkpoint(run_pair, hidden, use_reentrant=False)
        return pieces.readout(hidden)

    same(want, run(pieces, forward))


@pytest.mark.parametrize("whole_model", [True, False])
def test_checkpoint_wrappers(whole_model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    want, pieces = wanted(3)
    apply_activation_checkpointing(pieces, check_fn=lambda module: type(module).__name__ == "Block")
    if whole_model:
        got = run(pieces, torch.compile(pieces, backend="mhc", options=QUICK))
    else:
        compile_blocks(pieces, backend="mhc", options=QUICK)
        got = run(pieces, pieces)
    plain = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in got[1].items()}
    same(want, (got[0], plain))


def test_a_reentrant_checkpoint_around_a_compiled_block_raises():
    pieces = stack(3, Checkpointed)
    compile_blocks(pieces, backend="mhc", options=QUICK)
    pieces.how = {"use_reentrant": True}
    with pytest.raises(StreamCutError, match="use_reentrant=False"):
        run(pieces, pieces)
