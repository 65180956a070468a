"""In which dimension the features of a residual add lie: streams of another would mix rows of an image, or a batch."""

import pytest
import torch
from torch import nn

import mhc_compile

WIDTH = 6


def _scaled(m, image):
    return (m.gain * m.linear(m.conv(image).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def _gated(m, image):
    gate = torch.sigmoid(m.linear(image.mean((2, 3)))).unsqueeze(-1).unsqueeze(-1)
    return gate * m.linear(m.conv(image).movedim(1, -1)).movedim(-1, 1)


def _tokens(m, image):
    batch, width, height, length = image.shape
    tokens = m.conv(image).flatten(2).transpose(1, 2)
    return m.linear(tokens).reshape(batch, height, length, width).permute(0, 3, 1, 2).contiguous()


def _tokens_turned(m, image):
    tokens = m.conv(image).flatten(2).mT
    return m.linear(tokens).transpose(-1, -2).reshape(image.shape)


def _merged(m, image):
    return torch.tanh(m.conv(image).flatten(1)).view(image.shape)


def _experts(m, tokens):
    chosen = tokens.unsqueeze(2).expand(-1, -1, 3, -1)
    return torch.tanh(m.linear(chosen)).sum(2)


def _without_batch(m, image):
    return m.conv(m.conv(image).relu())


def _attended(m, tokens):
    return torch.softmax(tokens @ tokens.mT, -1) @ m.linear(tokens)


def _attended_features_first(m, tokens):
    features = m.linear(tokens.mT).mT
    return features @ torch.softmax(features.mT @ features, -1)


def _attended_linearly(m, tokens):
    keys = m.linear(tokens)
    return keys @ (keys.mT @ m.linear(tokens))


def _contracted(m, tokens):
    scores = torch.softmax(torch.einsum("bci,bcj->bij", tokens, tokens), -1)
    return torch.einsum("bij,bcj->bci", scores, torch.einsum("bci,cd->bdi", tokens, m.linear.weight))


BRANCHES = {
    "a learned scale in front": (_scaled, (2, WIDTH, 4, 5)),
    "a gate in front": (_gated, (2, WIDTH, 4, 5)),
    "tokens put back to an image": (_tokens, (2, WIDTH, 4, 5)),
    "tokens turned, then put back": (_tokens_turned, (2, WIDTH, 4, 5)),
    "merged with the image, then split": (_merged, (2, WIDTH, 4, 5)),
    "a sum over experts": (_experts, (2, 4, WIDTH)),
    "attention": (_attended, (2, 5, WIDTH)),
    "attention, features first": (_attended_features_first, (2, WIDTH, 5)),
    "linear attention": (_attended_linearly, (2, 5, WIDTH)),
    "einsum, features first": (_contracted, (2, WIDTH, 5)),
    "no batch": (_without_batch, (WIDTH, 4, 5)),
}


class Branch(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run, self.gain = run, nn.Parameter(torch.rand(WIDTH))
        self.conv, self.linear = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH)

    def forward(self, value):
        return value + self.run(self, value)


@pytest.mark.parametrize("kind", sorted(BRANCHES))
def test_features_lie_where_the_branch_makes_them(kind):
    run, shape = BRANCHES[kind]
    report = mhc_compile.explain(Branch(run), torch.randn(shape), min_sites=1)
    assert [site.width for site in report.sites] == [WIDTH]


class Convolved(nn.Module):
    def forward(self, conv):
        scores = torch.softmax(torch.einsum("bic,bjc->bij", conv, conv), -1)
        return conv + torch.einsum("bij,bjc->bic", scores, conv)


def test_an_input_named_after_an_operation_is_none():
    report = mhc_compile.explain(Convolved(), torch.randn(2, 4, WIDTH), min_sites=1)
    assert [site.width for site in report.sites] == [WIDTH]
