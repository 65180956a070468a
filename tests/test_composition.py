"""What must not break the rewrite: caches, autocast, modes, dynamic shapes, other readers, Hugging Face Trainer."""

import json
import subprocess
import sys

import pytest
import torch

import mhc_compile
from mhc_compile import MHCConfig

from .counting import unused_name
from .models import QUICK, Stack, assert_same_function, features, llama, token_ids


def _perturb(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def test_hidden_states_and_a_loss_on_a_middle_layer():
    model, ids = llama(), token_ids()
    plain = model(ids, output_hidden_states=True)
    plain.hidden_states[1].square().sum().backward()
    wanted = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    mhc_compile.attach(model, input_ids=ids, output_hidden_states=True)
    out = torch.compile(model, backend="mhc", options=QUICK)(ids, output_hidden_states=True)
    assert_same_function(list(plain.hidden_states), list(out.hidden_states), 1e-5)
    out.hidden_states[1].square().sum().backward()
    assert_same_function([wanted], [model.model.layers[0].mlp.up_proj.weight.grad], 1e-4)


def test_dynamic_shapes_compile_once():
    model = Stack()
    values = [features(batch * length).unflatten(0, (batch, length)) for batch, length in ((2, 8), (3, 11), (4, 5))]
    mhc_compile.attach(model, values[0])
    compiled = torch.compile(model, backend="mhc", options=QUICK, dynamic=True)
    rewritten = [compiled(value) for value in values]
    assert len(mhc_compile.report(model).graphs) <= 2
    mhc_compile.detach(model)
    assert_same_function([model(value) for value in values], rewritten, 1e-5)


def test_trained_parameters_compute_the_same_in_every_lowering_and_inner_backend():
    model = Stack(depth=1)
    mhc_compile.attach(model, features(), config=MHCConfig(init="paper", sinkhorn_iters=3))
    _perturb(model)
    results, gradients = [], []
    for options in (
        {"inner": "eager"},
        {"inner": "aot_eager"},
        {"inner": "inductor", "fusion": "inductor"},
        {"inner": "eager", "fusion": "site"},
    ):
        out = torch.compile(model, backend="mhc", options=options)(features())
        model.zero_grad()
        out.square().sum().backward()
        results.append(out.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    for out, grads in zip(results[1:], gradients[1:], strict=True):
        assert_same_function([results[0]], [out], 1e-5)
        assert_same_function(gradients[0], grads, 1e-4, floor=1e-3 * max(float(g.abs().max()) for g in gradients[0]))


def test_the_mathematics_of_a_rewritten_stack():
    """The rewritten graph equals a hand-written hyper-connected forward with the same parameters."""
    from mhc_compile import functional

    model = Stack(depth=2)
    mhc_compile.attach(model, features())
    _perturb(model)
    rewritten = torch.compile(model, backend="mhc", options=QUICK)(features())
    named = mhc_compile.parameters(model)

    def mapping(name):
        return [named[f"{name}.{role}"] for role in ("phi", "scale", "bias")]

    streams = model.stem(features()).unsqueeze(-2).expand(-1, 4, -1)
    for index, block in enumerate(model.blocks):
        layer_input, post, res = functional.pre(streams, *mapping(f"blocks.{index}.mhc.mixer"))
        streams = functional.post(streams, block.mixer(block.norm1(layer_input)), post, res)
        layer_input, post, res = functional.pre(streams, *mapping(f"blocks.{index}.mhc.mlp"))
        streams = functional.post(streams, torch.tanh(block.mlp(block.norm2(layer_input))), post, res)
    assert_same_function([model.readout(streams.mean(-2))], [rewritten], 1e-5)


def test_autocast():
    model, ids = llama(), token_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(ids).logits
    mhc_compile.attach(model, input_ids=ids)
    compiled = torch.compile(model, backend="mhc", options=QUICK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rewritten = compiled(ids)
        rewritten.logits.float().sum().backward()
    assert rewritten.logits.dtype == plain.dtype
    assert_same_function([plain], [rewritten.logits], 3e-2)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mhc_compile.parameters(model).values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    model = Stack().to(dtype)
    plain = model(features().to(dtype))
    mhc_compile.attach(model, features().to(dtype))
    rewritten = torch.compile(model, backend="mhc", options=QUICK)(features().to(dtype))
    assert rewritten.dtype == dtype
    assert_same_function([plain], [rewritten], 3e-2)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_go_to_inductor(mode, monkeypatch):
    from torch._inductor import compile_fx

    seen = {}
    original = compile_fx.compile_fx

    def spy(*args, **kwargs):
        seen.update(kwargs.get("config_patches") or {})
        return original(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", spy)
    model = Stack()
    plain = model(features())
    mhc_compile.attach(model, features())
    assert_same_function([plain], [torch.compile(model, backend="mhc", mode=mode)(features())], 1e-5)
    assert seen == torch._inductor.list_mode_options(mode)


def test_two_models_in_one_process():
    first, second = Stack(), Stack()
    plain = second(features())
    compiled_first = torch.compile(first, backend="mhc", options=QUICK)
    compiled_second = torch.compile(second, backend="mhc", options=QUICK)
    compiled_first(features())
    compiled_second(features())
    _perturb(first)
    assert_same_function([plain], [compiled_second(features())], 1e-5)
    assert not torch.allclose(compiled_first(features()), plain, atol=1e-3)


def test_the_same_model_with_different_options():
    model = Stack()
    mhc_compile.attach(model, features(), config=MHCConfig(init="paper"))
    _perturb(model)
    twenty = torch.compile(model, backend="mhc", options=QUICK)
    one = torch.compile(model, backend="mhc", options={**QUICK, "sinkhorn_iters": 1})
    assert not torch.allclose(twenty(features()), one(features()), atol=1e-6)
    assert torch.equal(twenty(features()), torch.compile(model, backend="mhc", options=QUICK)(features()))


def test_models_do_not_outlive_their_last_reference():
    import gc
    import weakref

    model = Stack()
    mhc_compile.attach(model, features())
    torch.compile(model, backend="mhc", options=QUICK)(features())
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_many_models_of_one_class():
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model = Stack()
        mhc_compile.attach(model, features())
        torch.compile(model, backend="mhc", options={"inner": "eager"})(features())


WARM = """
import json, warnings
import torch, torch._inductor.config, mhc_compile
from torch._dynamo.utils import counters
from tests.models import Stack, features
warnings.simplefilter("ignore")
# Caches do not care how fast the code is, and plain loops compile sooner than vectorized ones.
torch._inductor.config.cpp.simdlen = 1
torch.manual_seed(0)
model = Stack(1)
mhc_compile.attach(model, features(), config=mhc_compile.MHCConfig(n_streams=2, sinkhorn_iters=1))
generator = torch.Generator().manual_seed(3)
with torch.no_grad():
    for p in mhc_compile.parameters(model).values():
        p += 0.3 * torch.randn(p.shape, generator=generator)
said = {}
for fusion in ("auto", "inductor"):
    torch._dynamo.reset()
    counters.clear()
    model.zero_grad()
    out = torch.compile(model, backend="mhc", options={"fusion": fusion})(features())
    out.sum().backward()
    said[fusion] = {
        "out": out.tolist(), "grad": model.blocks[0].mixer.weight.grad.tolist(),
        "sites": len(mhc_compile.report(model).sites), "hits": counters["aot_autograd"]["autograd_cache_hit"],
    }
print(json.dumps(said))
"""


def test_a_warm_second_process_gives_the_report_and_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_AUTOGRAD_CACHE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")

    def run():
        done = subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    cold, warm = run(), run()
    for fusion in ("auto", "inductor"):
        assert (cold[fusion].pop("hits"), warm[fusion].pop("hits")) == (0, 1)
        assert warm[fusion] == cold[fusion]
        assert warm[fusion]["sites"] == 2


def test_hugging_face_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = llama().train()
    mhc_compile.attach(model, input_ids=token_ids(), labels=token_ids())
    model.compile(backend="mhc", options=QUICK)
    before = mhc_compile.parameters(model)["model.layers.0.mhc.mlp.bias"].detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.train().training_loss > 0
    mhc_compile.check_optimizer(model, trainer.optimizer.optimizer)
    assert not torch.equal(before, mhc_compile.parameters(model)["model.layers.0.mhc.mlp.bias"])


class _Targets:
    """An inner backend that runs the rewritten graph as it is and remembers its operators."""

    def __init__(self):
        self.seen = []
        self.name = unused_name("targets")
        torch._dynamo.register_backend(self, name=self.name)

    def __call__(self, graph_module, inputs):
        from torch._dynamo.backends.registry import lookup_backend

        self.seen += [str(node.target) for node in graph_module.graph.nodes]
        return lookup_backend("aot_eager")(graph_module, inputs)


def test_boundary_fusion_is_the_same_to_the_bit():
    model = Stack()
    mhc_compile.attach(model, features())
    _perturb(model)
    results = {}
    for fusion in ("site", "boundary"):
        inner = _Targets()
        options = {"inner": inner.name, "fusion": fusion}
        out = torch.compile(model, backend="mhc", options=options)(features())
        model.zero_grad()
        out.square().sum().backward()
        counts = [inner.seen.count(f"mhc.{name}.default") for name in ("collapse", "post_pre", "post_collapse", "post")]
        results[fusion] = (out.detach(), [p.grad.clone() for p in model.parameters()], counts)
    # Sites that are replayed run as halves; the streams behind the second of four are stored.
    assert results["site"][2] == [4, 0, 0, 4]
    assert results["boundary"][2] == [1, 1, 2, 1]
    assert torch.equal(results["site"][0], results["boundary"][0])
    for left, right in zip(results["site"][1], results["boundary"][1], strict=True):
        assert torch.equal(left, right)
