"""Recomputation through Inductor, cold and from its caches."""

import torch
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.multiprocessing.reductions import StorageWeakRef

import mhc_compile
from mhc_compile import MHCConfig

from ..models import Stack, features


def _saved(out, model):
    """Return the shapes of what autograd holds for the backward at run time, parameters left out."""
    known = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
    saved = out.grad_fn.saved_tensors
    return sorted(tuple(value.shape) for value in saved if StorageWeakRef(value.untyped_storage()) not in known)


def test_inductor_saves_less_gives_the_same_and_its_caches_tell_policies_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Stack(1, dropout=0.3).train()
    mhc_compile.attach(model, features(), config=MHCConfig(init="paper"))
    saved, gradients, hits = [], [], []
    caches_on = (
        functorch_config.patch(enable_autograd_cache=True),
        # Caches do not care how fast the code is, and plain loops compile sooner than vectorized ones. (Not by
        # monkeypatch: it takes config.cpp for a class and undoes by deleting, which hides the option for good.)
        inductor_config.patch({"fx_graph_cache": True, "fx_graph_remote_cache": False, "cpp.simdlen": 1}),
    )
    with caches_on[0], caches_on[1]:
        for recompute in ("none", 2, "none", 2):
            torch._dynamo.reset()
            counters.clear()
            model.zero_grad()
            torch.manual_seed(1)
            out = torch.compile(model, backend="mhc", options={"recompute": recompute, "fusion": "site"})(features())
            saved.append(_saved(out, model))
            out.square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
            hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 0, 1, 1]
    assert saved[2:] == saved[:2]
    # Two sites: the expanded head and the output between them, both of which are replayed; coefficients in both.
    assert [shapes.count((5, 4, 32)) for shapes in saved[:2]] == [2, 0]
    assert [shapes.count((5, 4, 4)) for shapes in saved[:2]] == [2, 2]
    assert len(gradients[0]) == len(list(model.parameters()))
    for stored, replayed, *warm in zip(*gradients, strict=True):
        torch.testing.assert_close(replayed, stored, rtol=1e-5, atol=1e-6)
        assert torch.equal(warm[0], stored)
        assert torch.equal(warm[1], replayed)
