"""What only looks like a residual add, and the reason that the report gives for each: one small model a kind."""

import pytest
import torch
from mhc_compile.passes.residual import Reason
from torch import nn
from torch.nn import functional as F

import mhc_compile
from mhc_compile import MHCConfig

from ..made import Made


def _gelu(m, x):
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3)))


def _snake(m, x):
    return x + torch.sin(m.gain * x) ** 2 / m.gain


def _grn(m, x):
    size = x.norm(dim=1, keepdim=True)
    return m.gain * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + x


def _rotary(m, x):
    queries = m.a(x)
    angles = torch.arange(5.0)[:, None] * torch.arange(16.0)
    rotated = torch.cat((-queries[..., 8:], queries[..., :8]), dim=-1)
    return queries * torch.cos(angles) + rotated * torch.sin(angles)


def _rotary_by_positions_of_the_input(m, x):
    """As Flux does: pairs of neighbors turn, by positions that come with the data, and attention takes keywords."""
    angles = x[..., :1] * torch.arange(16.0)
    turned = []
    for values in (m.a(x), m.b(x)):
        real, imaginary = values.reshape(3, 5, 8, 2).unbind(-1)
        rotated = torch.stack((-imaginary, real), -1).flatten(2)
        turned.append((values.float() * torch.cos(angles) + rotated.float() * torch.sin(angles)).to(x.dtype))
    return F.scaled_dot_product_attention(query=turned[0], key=turned[1], value=x)


def _token_shift(m, x):
    x = m.a(x)
    shifted = F.pad(x, (0, 0, 1, -1))
    return m.b(x * m.gain + shifted * (1 - m.gain))


def _token_and_position(m, x):
    return m.a(x + m.table(torch.arange(5).expand(3, 5)))


def _learned_positions(m, x):
    return m.b(m.a(x) + m.table.weight[:5])


def _bias_of_heads(m, x):
    heads = m.a(x).unflatten(-1, (4, 4))
    return m.b((heads + m.gain.view(4, 4)).flatten(-2))


def _positions_again_in_every_layer(m, x):
    positions = m.table(torch.arange(5).expand(3, 5))
    x = x + m.a(x + positions)
    return x + torch.tanh(m.b(x + positions))


def _scores(m, x):
    return m.a(x) @ m.b(x).transpose(1, 2)


def _attention_bias(m, x):
    bias = m.c(x) @ x.transpose(1, 2)
    return torch.softmax(_scores(m, x) + bias, -1) @ x


def _attention_mask(m, x):
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
    return torch.softmax(_scores(m, x) * 0.25 + mask, -1) @ x


def _bias_of_all_layers(m, x):
    bias = m.c(x) @ x.transpose(1, 2)
    hidden = torch.softmax(_scores(m, x) + bias, -1) @ x
    return torch.softmax(_scores(m, hidden) + bias, -1) @ hidden


def _lora(m, x):
    return m.a(x) + m.c(m.b(x)) * 0.5


def _parallel_convolutions(m, x):
    x = x.transpose(1, 2)
    return torch.relu(m.batch_norm(m.conv(x)) + m.short(x))


def _feed_through(m, x):
    y = m.a(x)
    scanned = torch.cumsum(m.b(y), 1) * torch.tanh(m.c(y))
    return scanned + y * m.gain


def _recurrent_state(m, x):
    state = torch.zeros(3, 16)
    for step in range(3):
        decay = torch.exp(-F.softplus(m.a(x[:, step])))
        state = state * decay + m.b(x[:, step])
    return m.c(state)


def _delta_rule_rows(m, x):
    matrix = m.a(x)[:, :, :5]
    row = matrix[:, 2, :2]
    return row + (row.unsqueeze(-1) * matrix[:, :2, :2]).sum(-2)


def _experts(m, x):
    weights, chosen = torch.softmax(m.small(x), -1).topk(2)
    mask = F.one_hot(chosen, 4).sum(-2).to(x.dtype)
    routed = (mask * weights.sum(-1, keepdim=True)).sum(-1, keepdim=True) * torch.tanh(m.a(x))
    return routed + m.c(torch.relu(m.b(x)))


def _two_branches(m, x):
    return torch.tanh(m.a(x)) + torch.relu(m.b(x))


def _gate(m, x):
    return x + x * torch.sigmoid(m.a(x))


def _embedding_again(m, x):
    embedded = m.a(x)
    x = embedded + m.b(embedded)
    x = x + torch.tanh(m.c(x))
    return x + embedded


def _straight_through(m, x):
    soft = m.a(x)
    return soft + (torch.round(soft) - soft).detach()


def _resolutions(m, x):
    fine = m.conv(x.transpose(1, 2))
    coarse = torch.relu(m.conv2(F.max_pool1d(fine, 2, ceil_mode=True)))
    return fine + F.interpolate(coarse, size=5)


def _reversible(m, x):
    first, second = m.a(x), m.b(x)
    for _ in range(2):
        first = first + torch.tanh(m.c(m.norm(second)))
        second = second + torch.relu(m.c(m.norm2(first)))
    return torch.cat((first, second), -1)


def _pyramid(m, x):
    fine = x.transpose(1, 2)
    coarse = torch.relu(m.conv2(F.max_pool1d(fine, 2, ceil_mode=True)))
    return m.conv(m.short(fine) + F.interpolate(coarse, size=5))


def _losses(m, x):
    return m.a(x).mean((1, 2)) + m.b(x).mean((1, 2))


def _bias(m, x):
    return F.linear(x, m.a.weight) + m.gain


def _norm_eps(m, x):
    return m.a(x) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _window(m, x):
    x = m.a(x)
    windows = F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1)
    return x + (windows * torch.softmax(windows, -1)).sum(-1)


def _parts(m, x):
    return m.a(x)[:, 0] + m.b(x)[:, 1] * 0 + x[:, 1]


def _pooled_parts(m, x):
    x = m.a(x)
    return x[:, 0] + x[:, 1]


def _broadcast(m, x):
    return m.a(x) + m.b(x.mean(1, keepdim=True))


def _separate(m, x):
    return m.a(x) + torch.rand(3, 5, 16)


ALONE = {
    "tanh-GELU": (_gelu, Reason.NO_MIXING),
    "Snake": (_snake, Reason.NO_MIXING),
    "GRN": (_grn, Reason.NO_MIXING),
    "rotary embedding": (_rotary, Reason.ROTATION),
    "rotary embedding, positions from the input": (_rotary_by_positions_of_the_input, Reason.ROTATION),
    "token shift": (_token_shift, Reason.TOKEN_SHIFT),
    "token + position embedding": (_token_and_position, Reason.EMBEDDING),
    "learned positions": (_learned_positions, Reason.EMBEDDING),
    "a bias for each head": (_bias_of_heads, Reason.BIAS),
    "attention bias, one head": (_attention_bias, Reason.ATTENTION_SCORES),
    "attention mask": (_attention_mask, Reason.ATTENTION_SCORES),
    "attention bias of all layers": (_bias_of_all_layers, Reason.ATTENTION_SCORES),
    "LoRA": (_lora, Reason.LINEAR_MAPS),
    "parallel convolutions": (_parallel_convolutions, Reason.LINEAR_MAPS),
    "state-space y + D·x": (_feed_through, Reason.FEED_THROUGH),
    "recurrent state": (_recurrent_state, Reason.RECURRENCE),
    "delta-rule rows": (_delta_rule_rows, Reason.RECURRENCE),
    "routed + shared experts": (_experts, Reason.EXPERTS),
    "two branches": (_two_branches, Reason.PARALLEL),
    "gate": (_gate, Reason.GATE),
    "straight-through estimator": (_straight_through, Reason.STRAIGHT_THROUGH),
    "U-Net skip": (_resolutions, Reason.RESOLUTIONS),
    "feature pyramid": (_pyramid, Reason.SHORTCUT_UNUSED),
    "losses": (_losses, Reason.NO_FEATURES),
    "learned bias": (_bias, Reason.BIAS),
    "a norm's eps": (_norm_eps, Reason.NUMBER),
    "window sum": (_window, Reason.WINDOW_SUM),
    "parts of one value": (_pooled_parts, Reason.PARTS),
    "shapes that differ": (_broadcast, Reason.BROADCAST),
}


def _explained(run):
    return mhc_compile.explain(Made(run), torch.randn(3, 5, 16), config=MHCConfig(min_sites=1, strict=False))


@pytest.mark.parametrize("kind", sorted(ALONE))
def test_look_alikes_stay_alone(kind):
    run, reason = ALONE[kind]
    report = _explained(run)
    assert not report.sites
    assert reason in {entry.reason for entry in report.rejected}


def test_every_reason_has_a_phrase_of_its_own():
    assert len({reason.value for reason in Reason}) == len(Reason.__members__)


def test_positions_added_in_every_layer_are_no_streams():
    report = _explained(_positions_again_in_every_layer)
    assert [len(chain.sites) for chain in report.chains] == [2]
    assert [entry.reason for entry in report.rejected] == [Reason.EMBEDDING] * 2


def test_an_embedding_added_again_is_no_site():
    report = _explained(_embedding_again)
    assert [len(chain.sites) for chain in report.chains] == [2]
    assert [entry.reason for entry in report.rejected] == [Reason.REINJECTION]


def test_reversible_coupling_stays_alone():
    report = _explained(_reversible)
    assert not report.sites
    assert Reason.REVERSIBLE in {entry.reason for entry in report.rejected}


def test_a_branch_local_add_with_the_same_skip():
    def zamba(m, x):
        helped = x + m.a(x)
        x = x + m.b(m.norm(helped))
        return x + m.c(x)

    report = _explained(zamba)
    assert [len(chain.sites) for chain in report.chains] == [2]
    assert Reason.BRANCH_LOCAL in {entry.reason for entry in report.rejected}


class ManyStreams(nn.Module):
    """Four streams mixed and written as in published models, by hand."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.coefficients, self.square = nn.Linear(64, 4), nn.Linear(64, 16)
        self.layer, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        streams = x.unsqueeze(-2).expand(*x.shape[:-1], 4, x.shape[-1]) * 1.0
        for _ in range(2):
            streams = getattr(self, self.kind)(streams)
        return streams.mean(-2)

    def _layer(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = streams.flatten(-2)
        coefficients = torch.sigmoid(self.coefficients(flat))
        return coefficients, torch.tanh(self.layer(self.norm((coefficients.unsqueeze(-1) * streams).sum(-2))))

    def mixed(self, streams: torch.Tensor) -> torch.Tensor:
        coefficients, branch = self._layer(streams)
        square = torch.softmax(self.square(streams.flatten(-2)).unflatten(-1, (4, 4)), -1)
        return coefficients.unsqueeze(-1) * branch.unsqueeze(-2) + torch.matmul(square.transpose(-1, -2), streams)

    def unmixed(self, streams: torch.Tensor) -> torch.Tensor:
        coefficients, branch = self._layer(streams)
        return coefficients.unsqueeze(-1) * branch.unsqueeze(-2) + streams

    def flattened(self, streams: torch.Tensor) -> torch.Tensor:
        coefficients, branch = self._layer(streams)
        written = (branch.unsqueeze(-2) * coefficients.unsqueeze(-1)).flatten(-2)
        return (streams.flatten(-2) + written).unflatten(-1, (4, 16))

    def alternating(self, streams: torch.Tensor) -> torch.Tensor:
        stacked = streams.movedim(-2, 0)
        square = self.square(streams.flatten(-2)).unflatten(-1, (4, 4))
        predicted = torch.matmul(stacked.permute(1, 2, 3, 0), square).permute(3, 0, 1, 2)
        predicted = predicted + stacked
        active = predicted[0]
        active = active + torch.tanh(self.layer(active))
        active = active + torch.relu(self.layer(active))
        innovation = (active - predicted[0]).repeat(4, 1, 1, 1)
        weights = self.coefficients(streams.flatten(-2)).permute(2, 0, 1).unsqueeze(-1)
        return (innovation * weights + predicted).movedim(0, -2)


@pytest.mark.parametrize("kind", ["mixed", "unmixed", "flattened", "alternating"])
def test_streams_that_the_model_carries_itself(kind):
    report = mhc_compile.explain(ManyStreams(kind), torch.randn(3, 5, 16), config=MHCConfig(min_sites=1, strict=False))
    assert not report.sites
    assert not report.native
    known = Reason.NATIVE_DIFFERS if kind in ("mixed", "unmixed") else Reason.NATIVE_STREAMS
    assert known in {entry.reason for entry in report.rejected}


def test_a_linear_attentions_outer_product_is_no_stream():
    def written(m, x):
        state = torch.zeros(3, 4, 16)
        for step in range(3):
            keys = m.small(x[:, step])
            state = state * torch.sigmoid(keys).unsqueeze(-1) + keys.unsqueeze(-1) * m.a(x[:, step]).unsqueeze(-2)
        x = x + m.b(state.sum(1)).unsqueeze(1).expand_as(x)
        return x + m.c(x)

    report = _explained(written)
    assert not {Reason.NATIVE_STREAMS, Reason.NATIVE_DIFFERS} & {entry.reason for entry in report.rejected}
    assert sum(len(chain.sites) for chain in report.chains) == 2
