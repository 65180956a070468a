"""What is a residual add: one small model a kind, by hand."""

import pytest
import torch
from mhc_compile.passes.residual import Reason
from torch.nn import functional as F

import mhc_compile
from mhc_compile import MHCConfig

from ..models import QUICK, assert_same_function
from .made import Made

LOOSE = {**QUICK, "min_sites": 1, "strict": False}


def _rms(m, x):
    return m.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _in_place(m, x):
    y = m.a(x)
    y += x
    return m.b(torch.tanh(y)).add_(y)


def _alpha(m, x):
    x = torch.add(x, m.a(x), alpha=0.5)
    x = x.add(m.b(x))
    return torch.addcmul(x, m.c(x), m.gain, value=2.0)


def _parallel(m, x):
    normed = m.norm(x)
    return (m.a(normed) + torch.tanh(m.b(normed))) + x


def _parallel_left(m, x):
    normed = m.norm(x)
    return (x + m.a(normed)) + m.b(normed)


def _post_norm(m, x):
    x = m.norm(x + m.a(x))
    return m.norm2(x + torch.tanh(m.b(x)))


def _post_rms(m, x):
    x = _rms(m, x + m.a(x))
    return _rms(m, x + torch.tanh(m.b(x)))


def _flattened(m, x):
    shape = x.shape
    x = x + m.a(x)
    flat = x.reshape(-1, shape[-1])
    flat = flat + torch.tanh(m.b(flat))
    x = flat.view(shape)
    return x + m.c(x)


def _channels_first(m, x):
    x = x.transpose(1, 2)
    x = torch.relu(x + m.conv(x))
    return x + torch.tanh(m.conv2(x))


def _casts(m, x):
    x = x.double() + m.a(x)
    return x + m.b(x.float())


def _scaled(m, x):
    x = 0.7 * x + 0.3 * m.a(x)
    return torch.clamp(0.7 * x + m.b(x), -50, 50)


def _nested(m, x):
    inner = m.a(x)
    inner = inner + torch.tanh(m.b(inner))
    x = x + m.c(inner)
    return x + torch.tanh(m.a(x))


def _tokens_mixed(m, x):
    x = x + torch.fft.fft(m.norm(x), dim=1).real
    return x + m.a(x)


def _shortcut(m, x):
    x = x.transpose(1, 2)
    x = torch.relu(m.short(x) + m.conv2(torch.relu(m.conv(x))))
    return x + m.conv(torch.relu(x))


def _two_chains(m, x):
    left = x + m.a(x)
    left = left + m.b(left)
    right = m.c(left)
    right = right + torch.tanh(m.a(right))
    return right + m.b(torch.tanh(left)) * 0 + m.c(torch.relu(right))


def _sliced(m, x):
    x = x + m.a(x)
    rest = x[:, 1:, :]
    rest = x[:, 1:, :] + torch.tanh(m.b(rest))
    return rest + m.c(rest)


def _sliced_channels_first(m, x):
    x = x.transpose(1, 2)
    x = x + m.conv(x)
    x = x[..., :-1]
    return x + torch.tanh(m.conv2(x))


def _nested_behind_a_norm(m, x):
    x = x + m.c(x)
    inner = m.norm(x)
    return x + torch.tanh(m.b(inner + m.a(inner)))


TRUE = {
    "in place": (_in_place, [2]),
    "torch.add, Tensor.add, addcmul": (_alpha, [3]),
    "parallel, branches first": (_parallel, [1]),
    "parallel, skip first": (_parallel_left, [2]),
    "post-norm": (_post_norm, [2]),
    "post-norm, written out": (_post_rms, [2]),
    "on a flattened view": (_flattened, [3]),
    "channels first, activation after": (_channels_first, [2]),
    "casts on the stream": (_casts, [2]),
    "scaled skip, clamp after": (_scaled, [2]),
    "nested": (_nested, [1, 2]),
    "branch without parameters": (_tokens_mixed, [2]),
    "on a slice of the tokens": (_sliced, [3]),
    "on a slice of the tokens, channels first": (_sliced_channels_first, [2]),
    "nested, begun by a norm": (_nested_behind_a_norm, [1, 2]),
    "projection shortcut": (_shortcut, [2]),
}


@pytest.mark.parametrize("kind", sorted(TRUE))
def test_residual_adds_are_found_and_preserved(kind):
    run, chains = TRUE[kind]
    model, x = Made(run), torch.randn(3, 5, 16)
    _check(model, x, chains)


def _check(model, x, chains):
    plain = model(x)
    plain.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    report = mhc_compile.attach(model, x, config=MHCConfig(min_sites=1))
    assert sorted(len(chain.sites) for chain in report.chains) == chains
    rewritten = torch.compile(model, backend="mhc", options=LOOSE)(x)
    rewritten.sum().backward()
    assert_same_function([plain], [rewritten], 1e-5)
    names = list(gradients)
    after = dict(model.named_parameters())
    top = max(float(g.abs().max()) for g in gradients.values())
    assert_same_function([gradients[n] for n in names], [after[n].grad for n in names], 1e-4, floor=1e-3 * top)


def test_an_in_place_add_on_an_aliased_value_stays():
    def aliased(m, x):
        y = x + m.a(x)
        y = y + m.b(y)
        view = y.view(-1, 16)
        y += m.c(y)
        return y + view.sum()

    # Without gradients: autograd itself refuses to change what a linear map has saved.
    model, x = Made(aliased).requires_grad_(False), torch.randn(3, 5, 16)
    plain = model(x)
    report = mhc_compile.attach(model, x)
    assert Reason.IN_PLACE_ALIAS in {entry.reason for entry in report.rejected}
    assert_same_function([plain], [torch.compile(model, backend="mhc", options=QUICK)(x)], 1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_on_the_stream(train):
    def normed(m, x):
        x = x.transpose(1, 2)
        x = m.batch_norm(x + m.conv(x))
        return m.batch_norm(x + m.conv2(x))

    model, x = Made(normed).train(train), torch.randn(3, 5, 16)
    plain = model(x)
    running = model.batch_norm.running_mean.clone()
    model.batch_norm.reset_running_stats()
    mhc_compile.attach(model, x)
    assert_same_function([plain], [torch.compile(model, backend="mhc", options=QUICK)(x)], 1e-5)
    torch.testing.assert_close(model.batch_norm.running_mean, running)


def test_dropout_on_the_stream_and_in_branches_draws_what_the_plain_model_draws():
    def dropped(m, x):
        x = F.dropout(x + F.dropout(m.a(x), 0.5, m.training), 0.5, m.training)
        return x + F.dropout(torch.tanh(m.b(x)), 0.5, m.training)

    model, x = Made(dropped).train(), torch.randn(3, 5, 16)
    torch.manual_seed(7)
    plain = model(x)
    mhc_compile.attach(model, x)
    torch.manual_seed(7)
    rewritten = torch.compile(model, backend="mhc", options={"inner": "eager"})(x)
    assert_same_function([plain], [rewritten], 1e-5)


def test_other_readers_get_the_collapsed_value():
    def middle(m, x):
        x = x + m.a(x)
        mid = x
        x = x + torch.tanh(m.b(x))
        return x.sum() + mid.square().mean(), mid, m.norm(x)

    model, x = Made(middle), torch.randn(3, 5, 16)
    plain = model(x)
    mhc_compile.attach(model, x)
    rewritten = torch.compile(model, backend="mhc", options=QUICK)(x)
    assert_same_function(list(plain), list(rewritten), 1e-5)


def test_the_graph_that_dynamo_holds_is_left_as_it_was(monkeypatch):
    from mhc_compile import backend

    seen = {}
    original = backend.analyze

    def spy(graph_module, *args):
        seen["module"], seen["code"] = graph_module, graph_module.code
        return original(graph_module, *args)

    monkeypatch.setattr(backend, "analyze", spy)
    torch.compile(Made(_in_place), backend="mhc", options=QUICK)(torch.randn(3, 5, 16))
    assert seen["module"].code == seen["code"]
