"""The composite gain, against products worked out by hand."""

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile.gain import chain_gains, composite_gain, mixing_matrices

_OPTIONS = {"n_streams": 2, "inner": "eager"}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    def __init__(self, width=6, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def attached(**options):
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(2, 5, 6)
    mhc_compile.attach(model, x, config=mhc_compile.MHCConfig(**_OPTIONS, **options))
    return model, x


def test_gain_of_a_hand_multiplied_product():
    first = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    second = torch.tensor([[0.0, -1.0], [3.0, 1.0]])
    # second @ first = [[0, -1], [3, 7]]: row sums 1 and 10, column sums 3 and 8.
    forward, backward = composite_gain([first, second])
    assert forward == [3.0, 10.0]
    assert backward == [3.0, 8.0]


def test_gain_is_the_mean_over_tokens_of_each_tokens_largest_sum():
    tokens = torch.stack([torch.eye(2), torch.tensor([[4.0, 0.0], [1.0, 1.0]])])
    # Largest row sums 1 and 4, largest column sums 1 and 5; of the mean matrix they would be 2.5 and 3.
    assert composite_gain([tokens]) == ([2.5], [3.0])


def test_leading_shapes_may_differ_but_not_the_number_of_tokens():
    wide = torch.eye(3).expand(2, 4, 3, 3)
    flat = 2.0 * torch.eye(3).expand(8, 3, 3)
    assert composite_gain([wide, flat]) == ([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(mhc_compile.MHCError, match="product per token"):
        composite_gain([wide, flat[:3]])


def test_mixing_matrices_are_those_of_the_parameters():
    """With phi = 0 a site's matrix depends on its bias alone, so every site can be told by its own."""
    model, x = attached(manifold="none")
    wanted = {}
    for index, layer in enumerate(model.layers):
        bias = torch.tensor([[1.0 + index, -2.0], [0.5, 3.0 * index]])
        with torch.no_grad():
            layer.mhc.linear.bias[4:] = bias.flatten()
        wanted[f"layers.{index}.mhc.linear"] = bias
    found = mixing_matrices(model, x)
    assert list(found) == list(wanted)
    for name, bias in wanted.items():
        torch.testing.assert_close(found[name], bias.expand(2, 5, 2, 2))

    (gains,) = chain_gains(model, x)
    product = wanted["layers.2.mhc.linear"] @ wanted["layers.1.mhc.linear"] @ wanted["layers.0.mhc.linear"]
    assert gains.sites == tuple(wanted)
    assert gains.forward[-1] == pytest.approx(product.abs().sum(1).max().item(), rel=1e-5)
    assert gains.backward[-1] == pytest.approx(product.abs().sum(0).max().item(), rel=1e-5)


def test_matrices_follow_the_tokens_once_phi_has_learned():
    model, x = attached(init="paper")
    with torch.no_grad():
        for name, parameter in mhc_compile.parameters(model).items():
            if name.endswith("scale"):
                parameter.fill_(1.0)
    res = mixing_matrices(model, x)["layers.0.mhc.linear"]
    torch.testing.assert_close(res.sum(-1), torch.ones(2, 5, 2))
    streams = x.unsqueeze(-2).expand(2, 5, 2, 6).contiguous()
    mapping = model.layers[0].mhc.linear
    expected = mhc_compile.functional.pre(streams, mapping.phi, mapping.scale, mapping.bias).res
    torch.testing.assert_close(res, expected)
    assert not torch.equal(res[0, 0], res[1, 3])


def test_gain_is_one_at_the_preserving_start():
    model, x = attached()
    (gains,) = chain_gains(model, x)
    assert len(gains.forward) == len(gains.backward) == 3
    assert gains.forward == pytest.approx([1.0] * 3, abs=1e-5)
    assert gains.backward == pytest.approx([1.0] * 3, abs=1e-5)


def test_looking_leaves_report_and_compiled_model_alone():
    model, x = attached()
    compiled = torch.compile(model, backend="mhc", options={"inner": "eager"})
    before = compiled(x)
    shown = mhc_compile.report(model)
    for _ in range(12):
        # More often than Dynamo's recompile limit: a look must not count as another compilation each time.
        mixing_matrices(compiled, x)
    assert mhc_compile.report(model) is shown
    assert torch.equal(compiled(x), before)


def test_plain_model_is_refused():
    with pytest.raises(mhc_compile.NotAttachedError, match="attach"):
        mixing_matrices(Model(), torch.randn(1, 2, 6))
