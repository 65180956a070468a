"""What nobody should feed a model, and somebody will: it gives what the plain model gives, or a clear error."""

import copy

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import MHCConfig, MHCError

from .models import WIDTH, Stack, features

EAGER = {"inner": "eager"}


class Bare(nn.Module):
    """No norm and no readout: an infinite feature stays one feature of one token."""

    def __init__(self):
        super().__init__()
        self.mixers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden):
        for mixer in self.mixers:
            hidden = hidden + torch.tanh(mixer(hidden))
        return hidden


def _run(call, model, values):
    model.zero_grad()
    out = call(values)
    out.nan_to_num(posinf=0.0, neginf=0.0).square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _attached(model, values, **options):
    mhc_compile.attach(model, values)
    return torch.compile(model, backend="mhc", options={**EAGER, **options})


def _assert_as_plain(model, values, **options):
    """Tokens and gradients are finite where the plain model's are, and finite tokens equal to the last bit.

    Inside a token that is not finite, the coefficients spread what the plain model may keep to one feature.
    """
    plain = copy.deepcopy(model)
    # A layer's input is contiguous in the rewritten model; from another layout a matrix product sums in another order.
    wanted, gradients = _run(plain, plain, values.contiguous())
    got, after = _run(_attached(model, values, **options), model, values)
    finite = wanted.isfinite().all(-1)
    assert torch.equal(finite, got.isfinite().all(-1))
    assert torch.equal(wanted[finite], got[finite])
    for name, gradient in gradients.items():
        assert gradient.isfinite().all() == after[name].isfinite().all(), name
    return wanted


@pytest.mark.parametrize(("build", "fusion"), [(Stack, "site"), (Bare, "boundary"), (Bare, "inductor")])
def test_an_input_that_is_not_finite(build, fusion):
    values = features()
    values[1, 3], values[2, 0], values[4, -1] = float("nan"), float("inf"), -float("inf")
    wanted = _assert_as_plain(build(), values, fusion=fusion)
    assert wanted.isfinite().all(-1).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(bad):
    model = Bare()
    with torch.no_grad():
        model.mixers[1].weight[0, 0] = bad
    _assert_as_plain(model, features(), fusion="boundary")


def test_an_mhc_parameter_that_is_not_finite_shows():
    model = Stack()
    compiled = _attached(model, features())
    with torch.no_grad():
        model.blocks[0].mhc.mixer.bias[0] = float("nan")
    assert compiled(features()).isnan().all()


@pytest.mark.parametrize("fusion", ["site", "boundary", "inductor"])
def test_zero_tokens(fusion):
    model, shape = Stack(), (2, 0, WIDTH)
    compiled = _attached(model, torch.empty(shape), fusion=fusion)
    out, gradients = _run(compiled, model, torch.empty(shape))
    assert out.shape == (*shape[:-1], 3)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())


def test_zero_tokens_behind_some():
    compiled = _attached(Stack(), features())
    assert [len(compiled(features(tokens))) for tokens in (5, 0, 7, 1, 0)] == [5, 0, 7, 1, 0]


def test_meta_tensors():
    with torch.device("meta"):
        model = Stack()
        compiled = _attached(model, features().to("meta"))
    out = compiled(features().to("meta"))
    out.sum().backward()
    assert out.is_meta
    assert all(parameter.grad.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("init", ["preserve", "paper"])
def test_memory_for_a_meta_model_is_filled_with_the_start(init):
    config = MHCConfig(init=init, readout="learned")
    torch.manual_seed(7)
    with torch.device("meta"):
        model = Stack()
    mhc_compile.attach(model, torch.empty(5, WIDTH, device="meta"), config=config)
    model.to_empty(device="cpu")
    torch.manual_seed(7)
    other = Stack()
    mhc_compile.attach(other, features(), config=config)
    for (name, got), wanted in zip(
        mhc_compile.parameters(model).items(), mhc_compile.parameters(other).values(), strict=True
    ):
        assert torch.equal(got, wanted), name


def test_parameters_begin_anew():
    model = Stack()
    mhc_compile.attach(model, features())
    start = {name: value.clone() for name, value in mhc_compile.parameters(model).items()}
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter.add_(1.0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(value, start[name]) for name, value in mhc_compile.parameters(model).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mhc_parameters_in_half_precision(dtype):
    model = Stack()
    compiled = _attached(model, features())
    model.blocks[0].mhc.to(dtype)
    assert {value.dtype for value in mhc_compile.parameters(model).values()} == {torch.float32}
    site = model.blocks[0].mhc.mlp
    site.bias.data = site.bias.data.to(dtype)
    with pytest.raises(MHCError, match=r"blocks\.0\.mhc\.mlp\.bias is torch\.\w*float16"):
        compiled(features())
    site.bias.data = site.bias.data.float()
    compiled(features())


def test_an_input_on_another_device():
    model = Stack()
    mhc_compile.attach(model, features())
    with pytest.raises(RuntimeError, match="device"):
        torch.compile(model, backend="mhc", options=EAGER)(features().to("meta"))
    with pytest.raises(RuntimeError, match="device"):
        mhc_compile.attach(Stack(), features().to("meta"))


class TwoDevices(Stack):
    def forward(self, values):
        hidden = self.blocks[0](self.stem(values)).to("meta")
        return self.readout(self.blocks[1](hidden))


def test_a_stream_over_two_devices():
    model = TwoDevices()
    model.blocks[1].to("meta")
    model.readout.to("meta")
    compiled = _attached(model, features())
    assert len(mhc_compile.report(model).chains) == 1
    devices = {name.split(".mhc")[0]: value.device.type for name, value in mhc_compile.parameters(model).items()}
    assert devices == {"blocks.0": "cpu", "blocks.1": "meta"}
    assert compiled(features()).is_meta


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_in_half_precision(assign):
    model = Stack()
    compiled = _attached(model, features())
    saved = {name: value.half() for name, value in model.state_dict().items()}
    model.half().load_state_dict(saved, assign=assign)
    assert {value.dtype for value in mhc_compile.parameters(model).values()} == {torch.float32}
    assert compiled(features().half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"n_streams": 3}, "size mismatch for blocks.0.mhc.mixer.phi|n_streams=3"),
        ({"manifold": "identity"}, "size mismatch for blocks.1.mhc.mlp.bias|manifold='identity'"),
        ({"sites": "*.mlp"}, "Missing key.*blocks.0.mhc.mixer.phi"),
        ({"readout": "learned"}, "Unexpected key.*blocks.1.mhc.mlp_readout.phi|readout='learned'"),
    ],
)
def test_a_checkpoint_with_other_options(other, words):
    saved, model = Stack(), Stack()
    mhc_compile.attach(saved, features(), config=MHCConfig(**other))
    mhc_compile.attach(model, features())
    with pytest.raises(RuntimeError, match=words):
        model.load_state_dict(saved.state_dict())


def test_a_checkpoint_of_another_width():
    saved, model = Stack(width=16), Stack()
    mhc_compile.attach(saved, features(width=16))
    mhc_compile.attach(model, features())
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.0.mhc.mixer.phi: .*\[24, 64\].*\[24, 128\]"):
        model.load_state_dict(saved.state_dict(), strict=False)


def _overlapping():
    return torch.randn(64).as_strided((5, WIDTH), (4, 1))


LAYOUTS = {
    "transposed": lambda: torch.randn(WIDTH, 5).t(),
    "expanded": lambda: torch.randn(1, WIDTH).expand(5, WIDTH),
    "expanded features": lambda: torch.randn(5, 1).expand(5, WIDTH),
    "every other": lambda: torch.randn(10, 2 * WIDTH)[::2, ::2],
    "overlapping": _overlapping,
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts_of_the_input(layout):
    values = LAYOUTS[layout]()
    before = values.clone()
    _assert_as_plain(Bare(), values, fusion="boundary")
    assert torch.equal(values, before)
