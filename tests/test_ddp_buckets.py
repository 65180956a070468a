"""Buckets of DDP, cut by DDPOptimizer wherever they are full: the model of one graph, under perturbed parameters."""

import pytest
import torch
from mhc_compile.passes.fx.cache_key import ATTRIBUTE
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mhc_compile import MHCConfig, NotAttachedError
from mhc_compile.dynamo import inner

from .carrying import gradients, largest_gap, one_process_group, twins
from .models import Block, BreaksInLoop, Stack, features

BLOCK_BYTES = 4 * sum(parameter.numel() for parameter in Block().parameters())


@pytest.fixture(autouse=True)
def _group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    with one_process_group(), torch._dynamo.config.patch(optimize_ddp="ddp_optimizer"):
        yield


def wrapped(model: nn.Module, blocks: float) -> DistributedDataParallel:
    return DistributedDataParallel(model, bucket_cap_mb=blocks * BLOCK_BYTES / 2**20)


def run(model: nn.Module, call) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = call(features()).square().mean()
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize(
    ("model", "bucket", "options"),
    [
        (Stack(2), 0.01, {"inner": "aot_eager", "fusion": "boundary"}),
        (Stack(2), 0.7, {"inner": "aot_eager", "fusion": "inductor", "recompute": 2}),
        (Stack(1), 0.7, {"inner": "inductor"}),
        (BreaksInLoop(2), 0.5, {"inner": "aot_eager"}),
    ],
)
def test_a_bucket_may_end_anywhere(model, bucket, options, monkeypatch):
    pieces = []

    def counted(graph_module, *args, **kwargs):
        pieces.append(graph_module)
        return compile_one(graph_module, *args, **kwargs)

    compile_one = inner._compile
    whole, model = twins(model, features(), config=MHCConfig(sinkhorn_iters=3))
    loss, wanted = run(whole, torch.compile(whole, backend="mhc", options={**options, "inner": "aot_eager"}))
    monkeypatch.setattr(inner, "_compile", counted)
    got_loss, got = run(model, torch.compile(wrapped(model, bucket), backend="mhc", options=options))
    assert len(pieces) >= 3
    # What the recompute policy adds to the key of the compilers' caches is in the key of every piece.
    assert all(hasattr(piece, ATTRIBUTE) for piece in pieces)
    torch.testing.assert_close(got_loss, loss, rtol=1e-6, atol=1e-6)
    assert largest_gap(wanted, got) < 1e-5


def test_another_backend_gets_its_pieces_as_ever():
    torch.manual_seed(0)
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    model = Stack(3)
    torch.testing.assert_close(torch.compile(wrapped(model, 0.5), backend=backend)(features()), model(features()))
    assert len(graphs) > 3


def test_a_model_is_attached_before_it_is_wrapped():
    with pytest.raises(NotAttachedError, match="before wrapping"):
        torch.compile(wrapped(Stack(3), 1.0), backend="mhc", options={"inner": "aot_eager"})(features())
