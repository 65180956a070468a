"""Models of all sorts, written by hand: what stands on the stream, in the branches and at the exits."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mhc_compile

from .models import QUICK, WIDTH, Block, Stack, features
from .preserving import assert_preserved


class Variant(Stack):
    """A stack whose blocks are one given function of (block, stream)."""

    def __init__(self, step, depth=2):
        super().__init__(depth)
        self.step = step
        self.layer_scale = nn.Parameter(torch.full((WIDTH,), 0.1))
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.register_buffer("permutation", torch.arange(WIDTH).flip(0))

    def forward(self, inputs):
        hidden = self.stem(inputs)
        for block in self.blocks:
            hidden = self.step(self, block, hidden)
        return self.readout(hidden.float())


def _two(block, hidden):
    return block.mixer(block.norm1(hidden)), lambda value: torch.tanh(block.mlp(block.norm2(value)))


def _layer_scale(model, block, hidden):
    first, second = _two(block, hidden)
    hidden = hidden + model.layer_scale * first
    return hidden + second(hidden) * model.layer_scale


def _deep_norm(model, block, hidden):
    hidden = block.norm1(hidden * 1.7 + block.mixer(hidden))
    return block.norm2(1.7 * hidden + torch.tanh(block.mlp(hidden)))


def _float32_residual(model, block, hidden):
    residual = hidden.float()
    residual = block.mixer(block.norm1(residual)).bfloat16().float() + residual
    return residual + torch.tanh(block.mlp(block.norm2(residual))).bfloat16()


def _clamped(model, block, hidden):
    first, second = _two(block, hidden)
    hidden = torch.clamp(hidden + first, -50, 50)
    return torch.clamp(hidden + second(hidden), -50, 50)


def _scaled_both(model, block, hidden):
    first, second = _two(block, hidden)
    hidden = 0.9 * hidden + 0.4 * first
    return 0.9 * hidden + 0.4 * second(hidden)


def _with_buffers(model, block, hidden):
    first, second = _two(block, hidden)
    hidden = hidden + first * model.shift
    return hidden + second(hidden)[..., model.permutation]


def _complex_side_path(model, block, hidden):
    spectrum = torch.fft.rfft(block.norm1(hidden), dim=-1)
    hidden = hidden + torch.fft.irfft(spectrum * torch.polar(torch.ones(17), torch.arange(17.0)), n=WIDTH, dim=-1)
    return hidden + torch.tanh(block.mlp(hidden))


def _integer_side_path(model, block, hidden):
    first, second = _two(block, hidden)
    chosen = hidden.detach().argsort(-1)
    hidden = hidden + first.gather(-1, chosen)
    return hidden + second(hidden) * (chosen % 2).to(hidden.dtype)


STEPS = {
    "LayerScale": _layer_scale,
    "DeepNorm": _deep_norm,
    "float32 residual": _float32_residual,
    "clamp behind the add": _clamped,
    "scaled skip and branch": _scaled_both,
    "buffers": _with_buffers,
    "complex side path": _complex_side_path,
    "integer side path": _integer_side_path,
}


@pytest.mark.parametrize("kind", sorted(STEPS))
def test_what_stands_on_the_stream_or_in_a_branch(kind):
    assert_preserved(Variant(STEPS[kind]), features(), chains=[4])


@pytest.mark.parametrize("per_row", [True, False])
def test_stochastic_depth_draws_what_the_plain_model_draws(per_row):
    def dropped(model, block, hidden):
        first, second = _two(block, hidden)
        rows = (hidden.shape[0], 1) if per_row else (1, 1)
        hidden = hidden + first * torch.empty(rows).bernoulli_(0.5) / 0.5
        return hidden + second(hidden) * torch.empty(rows).bernoulli_(0.5) / 0.5

    model = Variant(dropped).train()
    torch.manual_seed(5)
    plain = model(features())
    report = mhc_compile.attach(model, features())
    assert len(report.sites) == 4
    torch.manual_seed(5)
    # Eager draws as plain PyTorch does; AOTAutograd may not.
    rewritten = torch.compile(model, backend="mhc", options={"inner": "eager"})(features())
    torch.testing.assert_close(rewritten, plain, rtol=1e-5, atol=1e-6)


def test_frozen_and_shared_parameters():
    model = Stack(depth=3)
    model.blocks[0].requires_grad_(False)
    model.blocks[2].mlp.weight = model.blocks[1].mlp.weight
    before = sum(1 for _ in model.parameters())
    assert_preserved(model, features(), chains=[6])
    assert all(p.grad is None for p in model.blocks[0].mixer.parameters())
    assert sum(1 for _ in model.parameters()) == before + 3 * 6
    assert all(p.requires_grad for p in mhc_compile.parameters(model).values())


@dataclasses.dataclass
class Result:
    """What a model may return."""

    hidden: torch.Tensor
    logits: torch.Tensor
    steps: int


EXITS = {
    "dataclass": lambda hidden, logits: Result(hidden, logits, 2),
    "tuple": lambda hidden, logits: (hidden, (logits, None), 3),
    "dict": lambda hidden, logits: {"hidden": hidden, "logits": [logits], "name": "x"},
}


@pytest.mark.parametrize("kind", sorted(EXITS))
def test_models_return_what_they_like(kind):
    class Exit(Stack):
        def forward(self, inputs):
            hidden = self.stem(inputs)
            for block in self.blocks:
                hidden = block(hidden)
            return EXITS[kind](hidden, self.readout(hidden))

    model = Exit()
    expected = type(model(features()))
    assert_preserved(model, features(), chains=[4])
    assert type(torch.compile(model, backend="mhc", options=QUICK)(features())) is expected


@torch.library.custom_op("mhc_tests::quantized_linear", mutates_args=())
def quantized_linear(values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply by an int8 weight; opaque to the finder."""
    return values @ (weight.to(values.dtype) * scale[:, None]).T


@quantized_linear.register_fake
def _(values, weight, scale):
    return values.new_empty(*values.shape[:-1], weight.shape[0])


def _save_weight(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _through_quantized(ctx, grad):
    weight, scale = ctx.saved_tensors
    return grad @ (weight.to(grad.dtype) * scale[:, None]), None, None


quantized_linear.register_autograd(_through_quantized, setup_context=_save_weight)


class QuantizedLinear(nn.Module):
    """A linear map with int8 weights behind an operator that nothing can look into."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))

    def forward(self, values):
        return torch.ops.mhc_tests.quantized_linear(values, self.weight, self.scale)


def test_quantized_linears_behind_an_opaque_operator():
    model = Stack()
    for block in model.blocks:
        block.mixer, block.mlp = QuantizedLinear(block.mixer), QuantizedLinear(block.mlp)
    report = assert_preserved(model, features(), chains=[4])
    assert [site.name for site in report.sites][:2] == ["blocks.0.mhc.mixer", "blocks.0.mhc.mlp"]


def test_transformer_encoder_of_torch():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    # In eval mode each layer is one fused operator without an add.
    assert_preserved(model.train(), torch.randn(2, 6, WIDTH), chains=[4])


def test_post_norm_transformer_decoder_of_torch():
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerDecoder(layer, 2).train()
    assert_preserved(model, torch.randn(2, 6, WIDTH), torch.randn(2, 5, WIDTH), chains=[6])


class ConformerBlock(nn.Module):
    """Half a feed-forward, mixer, convolution, half a feed-forward, norm."""

    def __init__(self):
        super().__init__()
        self.before, self.body, self.after = Block(), Block(), Block()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden):
        hidden = hidden + 0.5 * torch.tanh(self.before.mlp(self.before.norm1(hidden)))
        hidden = hidden + self.body.mixer(self.body.norm1(hidden))
        convolved = self.conv(F.glu(torch.cat([hidden, hidden], -1), -1).transpose(1, 2))
        hidden = hidden + convolved.transpose(1, 2)
        hidden = hidden + 0.5 * torch.tanh(self.after.mlp(self.after.norm1(hidden)))
        return self.norm(hidden)


def test_conformer_blocks_are_one_stream():
    assert_preserved(nn.Sequential(ConformerBlock(), ConformerBlock()), torch.randn(2, 6, WIDTH), chains=[8])


def test_a_stream_inside_a_branch():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.inner, self.up = nn.Linear(WIDTH, 8), Block(8), nn.Linear(8, WIDTH)
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, hidden):
            return hidden + self.up(self.inner(self.down(self.norm(hidden))))

    assert_preserved(nn.Sequential(Nested(), Nested()), features(), chains=[2, 2, 2])
