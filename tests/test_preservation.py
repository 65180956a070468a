"""With init="preserve" the rewritten model is the plain one; trained, it is not: models nobody here wrote."""

import pytest
import torch
from mhc_compile.kernels.anchored import release

import mhc_compile

from .models import CASES, QUICK, assert_same_function


def _outputs(result):
    return result.logits if "logits" in result else result.logits_per_image


def _run(call, model, inputs):
    result = call(**inputs)
    result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return _outputs(result).detach(), gradients


def _in_dtype(value, dtype):
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


@pytest.fixture(autouse=True)
def _traceable(request):
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if "mixtral" in request.node.name and version < (2, 12):
        pytest.skip("before torch 2.12 AOTAutograd cannot trace the plain Mixtral on a CPU either: grouped_mm")


@pytest.mark.parametrize("name", sorted(CASES))
def test_outputs_and_gradients_are_the_plain_ones(name):
    case = CASES[name]()
    model, inputs = case.build().eval(), case.inputs()
    logits, gradients = _run(model, model, inputs)
    report = mhc_compile.attach(model, **inputs)
    assert sorted(len(chain.sites) for chain in report.chains) == sorted(case.chains)
    assert {site.norm for site in report.sites} == {case.norm}

    rewritten_logits, rewritten = _run(torch.compile(model, backend="mhc", options={"inner": "eager"}), model, inputs)
    assert torch.equal(logits, rewritten_logits)
    top = max(float(gradient.abs().max()) for gradient in gradients.values())
    names = list(gradients)
    assert_same_function([gradients[n] for n in names], [rewritten[n] for n in names], 1e-4, floor=1e-3 * top)


# Where the plain model adds up a stream's gradient from as many terms as the rewritten one: one branch a site, parallel
# branches, an encoder with a decoder. In others, such as a float32 RMSNorm written out, the same terms are added in
# another order.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", "bfloat16"), ("vit", "float32"), ("falcon", "float32"), ("falcon", "bfloat16"), ("whisper", "float32")],
)
def test_gradients_are_the_plain_ones_bit_for_bit(name, dtype):
    case = CASES[name]()
    model = case.build().eval().to(getattr(torch, dtype))
    inputs = {key: _in_dtype(value, model.dtype) for key, value in case.inputs().items()}
    logits, gradients = _run(model, model, inputs)
    mhc_compile.attach(model, **inputs)
    rewritten_logits, rewritten = _run(torch.compile(model, backend="mhc", options=QUICK), model, inputs)
    assert torch.equal(logits, rewritten_logits)
    assert [name for name, gradient in gradients.items() if not torch.equal(gradient, rewritten[name])] == []


# Pre-norm, parallel branches, post-norm with an encoder and a decoder, images.
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bart", "vit"])
def test_training_moves_streams_apart(name):
    case = CASES[name]()
    model, inputs = case.build().train(), case.inputs()
    report = mhc_compile.attach(model, **inputs)
    compiled = torch.compile(model, backend="mhc", options=QUICK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = compiled(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    n = 4
    # At a chain's first site all streams are one value, which no row-stochastic res can change.
    firsts = {chain.sites[0].name for chain in report.chains}
    for name, parameter in mhc_compile.parameters(model).items():
        if name.endswith(".bias"):
            learns = bool(parameter.grad[2 * n :].abs().max() > 0)
            assert learns == (name.removesuffix(".bias") not in firsts), f"{name}: res learns: {learns}"

    torch._dynamo.reset()
    seen = _streams_at_sites(model, inputs)
    # Behind the middle of the last chain: at its head the streams are equal by construction.
    middle = len(report.sites) - len(report.chains[-1].sites) // 2
    streams = seen[middle]
    spread = (streams - streams.mean(-2, keepdim=True)).abs().max() / streams.abs().max()
    assert spread > 1e-5, "the streams of a middle layer are still equal"


def _streams_at_sites(model, inputs):
    """Run the rewritten graph through an inner backend that collects what each `pre` reads."""
    seen = []

    class Collect(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            result = super().call_function(target, args, kwargs)
            if target is torch.ops.mhc.pre.default:
                seen.append(release(args[0].detach()))
            if target is torch.ops.mhc.post_pre.default:
                seen.append(release(result[0].detach()))
            return result

    name = f"collect_{id(seen)}"
    torch._dynamo.register_backend(lambda graph_module, examples: Collect(graph_module).run, name=name)
    with torch.no_grad():
        torch.compile(model.eval(), backend="mhc", options={"inner": name})(**inputs)
    return seen
