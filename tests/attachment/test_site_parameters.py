"""Where the parameters live, what they are called, and who steps them."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import MHCConfig, MHCWarning

from ..models import QUICK, WIDTH, Stack, features, llama, token_ids


def _rewritten(model, *args, **kwargs):
    return torch.compile(model, backend="mhc", options=QUICK)(*args, **kwargs)


def test_names_follow_the_owning_modules():
    model = llama()
    mhc_compile.attach(model, input_ids=token_ids())
    names = [
        f"model.layers.{layer}.mhc.{branch}.{role}"
        for layer in range(2)
        for branch in ("self_attn", "mlp")
        for role in ("phi", "scale", "bias")
    ]
    assert list(mhc_compile.parameters(model)) == names
    assert set(names) <= set(model.state_dict())
    assert set(names) <= {name for name, _ in model.named_parameters()}


def test_names_do_not_depend_on_mode_shape_or_kind_of_call():
    seen = set()
    for train, length, cache in ((True, 8, False), (False, 5, False), (False, 1, True)):
        model = llama().train(train)
        mhc_compile.attach(model, input_ids=token_ids(2, length), use_cache=cache)
        seen.add(tuple(mhc_compile.parameters(model)))
    assert len(seen) == 1


def test_attach_runs_no_arithmetic_of_the_model():
    model = Stack().to("meta")
    report = mhc_compile.attach(model, features().to("meta"))
    assert len(report.sites) == 4
    assert all(parameter.is_meta for parameter in mhc_compile.parameters(model).values())


def test_attach_uses_dummy_inputs():
    assert len(mhc_compile.attach(llama()).sites) == 4


def test_attach_without_an_example_says_so():
    with pytest.raises(mhc_compile.MHCError, match="example input"):
        mhc_compile.attach(Stack())


def test_attaching_twice_changes_nothing():
    model = Stack()
    mhc_compile.attach(model, features())
    before = {name: id(p) for name, p in mhc_compile.parameters(model).items()}
    mhc_compile.attach(model, features())
    assert {name: id(p) for name, p in mhc_compile.parameters(model).items()} == before


def test_shared_blocks_are_sites_of_their_own():
    class Shared(Stack):
        def forward(self, values):
            hidden = self.stem(values)
            hidden = self.blocks[0](self.blocks[0](hidden))
            return self.readout(hidden)

    model = Shared(depth=1)
    plain = model(features())
    report = mhc_compile.attach(model, features())
    assert [site.name for site in report.sites] == [
        f"blocks.0.mhc.{label}" for label in ("mixer", "mlp", "mixer_1", "mlp_1")
    ]
    torch.testing.assert_close(_rewritten(model, features()), plain, rtol=1e-5, atol=1e-6)


def test_first_call_attaches_with_one_warning():
    model = Stack()
    compiled = torch.compile(model, backend="mhc", options=QUICK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in (5, 3, 2):
            compiled(features(batch))
    ours = [entry for entry in caught if issubclass(entry.category, MHCWarning)]
    assert len(ours) == 1
    assert "attach" in str(ours[0].message)


def test_an_optimizer_without_them_is_reported_once():
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(MHCWarning, match="first call"):
        torch.compile(model, backend="mhc", options=QUICK)(features()).sum().backward()
    with pytest.warns(MHCWarning, match="12 of its mHC parameters"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    with pytest.raises(mhc_compile.OptimizerError):
        mhc_compile.check_optimizer(model, optimizer)
    for group in mhc_compile.param_groups(model, weight_decay=0.1, lr=1e-4):
        optimizer.add_param_group(group)
    mhc_compile.check_optimizer(model, optimizer)


def test_param_groups_decay_phi_alone():
    model = Stack()
    mhc_compile.attach(model, features())
    decayed, kept = mhc_compile.param_groups(model, weight_decay=0.1, lr=3e-4)
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert decayed["lr"] == kept["lr"] == 3e-4
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(mhc_compile.parameters(model))


def test_param_groups_beside_the_rate_of_a_checkpoint():
    model = Stack()
    mhc_compile.attach(model, features())
    assert [group["lr"] for group in mhc_compile.param_groups(model, weight_decay=0.1, model_lr=1e-4)] == [1e-3, 1e-3]
    slower = mhc_compile.param_groups(model, weight_decay=0.1, model_lr=1e-4, mixing_rate=2)
    assert [group["lr"] for group in slower] == [2e-4, 2e-4]
    assert all("lr" not in group for group in mhc_compile.param_groups(model, weight_decay=0.1))
    with pytest.raises(mhc_compile.MHCOptionError, match="leave out one"):
        mhc_compile.param_groups(model, weight_decay=0.1, model_lr=1e-4, lr=1e-3)


def _perturbed(seed=3):
    torch.manual_seed(0)
    model = Stack()
    mhc_compile.attach(model, features())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter += torch.randn(parameter.shape, generator=generator)
    return model


def test_save_load_gives_the_same_outputs():
    model = _perturbed()
    wanted = _rewritten(model, features())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = Stack()
    mhc_compile.attach(fresh, features())
    # assign=True replaces the Parameter objects: they are looked up at every call.
    compiled = torch.compile(fresh, backend="mhc", options=QUICK)
    before = compiled(features())
    fresh.load_state_dict(torch.load(file), assign=True)
    assert torch.equal(compiled(features()), wanted)
    assert not torch.allclose(before, wanted, atol=1e-3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_carry_their_own_parameters(duplicate):
    model = _perturbed()
    wanted = _rewritten(model, features())
    copied = duplicate(model)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter.zero_()
    assert torch.equal(_rewritten(copied, features()), wanted)


def test_casting_the_model_keeps_the_mappings_in_float32():
    model = Stack()
    mhc_compile.attach(model, features())
    model.to(torch.bfloat16)
    assert {p.dtype for p in mhc_compile.parameters(model).values()} == {torch.float32}
    assert _rewritten(model, features().bfloat16()).dtype == torch.bfloat16
    model.double()
    assert {p.dtype for p in mhc_compile.parameters(model).values()} == {torch.float64}


def test_the_paper_init_is_reproducible_and_draws_nothing_from_the_random_stream():
    def phi(seed):
        torch.manual_seed(seed)
        model = Stack()
        state = torch.get_rng_state()
        mhc_compile.attach(model, features(), config=MHCConfig(init="paper"))
        assert torch.equal(torch.get_rng_state(), state)
        return mhc_compile.parameters(model)["blocks.1.mhc.mlp.phi"]

    assert torch.equal(phi(5), phi(5))
    assert not torch.equal(phi(5), phi(6))
    assert phi(5).abs().max() > 0


def test_an_owner_with_an_attribute_of_that_name_is_refused():
    class Taken(Stack):
        def __init__(self):
            super().__init__()
            for block in self.blocks:
                block.mhc = nn.Linear(1, 1)

    with pytest.raises(mhc_compile.OwnerError, match="already has an attribute"):
        mhc_compile.attach(Taken(), features())


@pytest.mark.parametrize(
    ("n_streams", "manifold", "readout"),
    [
        (n_streams, manifold, ("mean", "learned")[(row + column) % 2])
        for row, n_streams in enumerate((1, 2, 3, 5, 8))
        for column, manifold in enumerate(("sinkhorn", "none", "identity"))
    ],
)
def test_every_manifold_readout_and_stream_count_preserves(n_streams, manifold, readout):
    model = Stack()
    plain = model(features())
    config = MHCConfig(n_streams=n_streams, manifold=manifold, readout=readout)
    report = mhc_compile.attach(model, features(), config=config)
    torch.testing.assert_close(_rewritten(model, features()), plain, rtol=1e-5, atol=1e-6)
    elements = sum(parameter.numel() for parameter in mhc_compile.parameters(model).values())
    assert report.parameters_added == elements
    assert any(name.endswith("_readout.phi") for name in mhc_compile.parameters(model)) == (readout == "learned")


def test_unselected_sites_stay_plain_adds_on_every_stream():
    model = Stack(depth=3)
    plain = model(features())
    report = mhc_compile.attach(model, features(), config=MHCConfig(sites="*.mlp"))
    assert [site.name for site in report.sites] == [f"blocks.{index}.mhc.mlp" for index in range(3)]
    torch.testing.assert_close(_rewritten(model, features()), plain, rtol=1e-5, atol=1e-6)
    assert mhc_compile.parameters(model)["blocks.0.mhc.mlp.phi"].shape == (24, 4 * WIDTH)
