"""Options are options, inputs are inputs, and what is neither is refused."""

import pytest
from torch import nn

import mhc_compile
from mhc_compile import MHCConfig, MHCOptionError

from .models import Stack, features, llama, token_ids


@pytest.mark.parametrize(
    "given",
    [
        {"n_streams": 2, "manifold": "none"},
        {"config": {"n_streams": 2, "manifold": "none"}},
        {"options": {"n_streams": 2, "manifold": "none"}},
        {"config": MHCConfig(n_streams=2, manifold="none")},
    ],
)
def test_options_may_be_given_by_name_or_as_one(given):
    for call in (mhc_compile.explain, mhc_compile.attach):
        config = call(llama(), input_ids=token_ids(), **given).config
        assert (config.n_streams, config.manifold) == (2, "none")


def test_a_config_among_the_inputs_is_the_config():
    assert mhc_compile.attach(llama(), token_ids(), MHCConfig(n_streams=3)).config.n_streams == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n_streams": 9}, "n_streams=9: must be between 1 and 8"),
        ({"n_stream": 2}, "Did you mean 'n_streams', an option"),
        (
            {"input_id": token_ids()},
            "'input_id' is neither an input of Llama.* nor an option.*'input_ids', an",
        ),
        ({"config": "none"}, "config='none': must be an MHCConfig"),
        ({"options": {"manifold": "nine"}}, "manifold='nine': must be one of"),
        ({"manifold": "none", "config": MHCConfig()}, "given twice"),
    ],
)
def test_what_is_neither_is_refused_in_one_message(given, said):
    inputs = {} if "input_id" in given else {"input_ids": token_ids()}
    for call in (mhc_compile.explain, mhc_compile.attach):
        model = llama()
        with pytest.raises(MHCOptionError, match=said):
            call(model, **inputs, **given)
        assert not mhc_compile.parameters(model)


def test_a_model_without_such_an_input_lists_what_it_takes():
    with pytest.raises(MHCOptionError, match=r"'mask' is neither .* Its inputs: features"):
        mhc_compile.attach(Stack(), features(), mask=None)


def test_a_keyword_that_the_model_takes_silently_still_reaches_it():
    assert mhc_compile.explain(llama(), input_ids=token_ids(), num_items_in_batch=3).sites


class Named(nn.Module):
    """A forward whose own parameter is called as an option is."""

    def __init__(self):
        super().__init__()
        self.stack = Stack()

    def forward(self, features, sites=1.0):
        return self.stack(features * sites)


def test_a_parameter_of_the_forward_comes_before_an_option():
    report = mhc_compile.explain(Named(), features(), sites=2.0)
    assert report.config.sites is None


def test_an_unknown_name_in_the_constructor_is_an_option_error():
    with pytest.raises(MHCOptionError, match=r"unknown option 'n_stream'. Did you mean 'n_streams'"):
        MHCConfig(n_stream=4)
