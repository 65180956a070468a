"""Several threads, workers of data loaders, and nothing that grows; `python -m tests.soak` runs longer."""

import copy
import gc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, Dataset

import mhc_compile
from mhc_compile.carried_streams import STREAMS
from mhc_compile.memory import MEMORY

from .models import WIDTH, BreaksBetween, Stack, assert_same_function, features

EAGER = {"inner": "eager"}


def _attached(seed):
    """Return a model and an input; nothing is drawn from the random stream that threads share."""
    generator = torch.Generator().manual_seed(seed)
    model = BreaksBetween()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    values = torch.randn(5, WIDTH, generator=generator)
    mhc_compile.attach(model, values)
    return model, values


def _trained(model, values, steps=3):
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(steps):
        loss = compiled(values).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_two_models_trained_in_two_threads():
    # Attached here: torch 2.13 frees the frames of old tracebacks under a lock, and the thread that frees the last
    # reference to code that `attach` has let go of then waits for the GIL, which the other holds, waiting for the lock.
    models, inputs = zip(*map(_attached, (1, 2)), strict=True)
    wanted = list(map(_trained, copy.deepcopy(models), inputs))
    torch._dynamo.reset()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(_trained, models, inputs)) == wanted


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
@pytest.mark.parametrize(("build", "attached"), [(Stack, True), (Stack, False), (BreaksBetween, True)])
def test_one_compiled_model_called_from_two_threads(build, attached):
    model = build()
    inputs = [torch.randn(tokens, WIDTH) for tokens in (5, 7)]
    wanted = [model(values) for values in inputs]
    if attached:
        mhc_compile.attach(model, features())
    compiled = torch.compile(model, backend="mhc", options=EAGER)

    def call(values):
        outputs = [compiled(values) for _ in range(4)]
        torch.autograd.grad(sum(output.sum() for output in outputs), model.stem.weight)
        return outputs

    with ThreadPoolExecutor(2) as pool:
        for outputs, plain in zip(pool.map(call, inputs), wanted, strict=True):
            assert all(torch.equal(output, plain) for output in outputs)


class Embedded(Dataset):
    """Rows that a rewritten model has computed, in whichever process asks for them."""

    def __init__(self, model):
        self.model = model
        self.compiled = None

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if self.compiled is None:
            self.compiled = torch.compile(self.model, backend="mhc", options=EAGER)
        with torch.no_grad():
            return self.compiled(features())[index]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_rewritten_model_in_the_worker_of_a_data_loader(method):
    model = Stack()
    wanted = model(features())
    mhc_compile.attach(model, features())
    # The operators have threads before the fork, which their child does not inherit.
    torch.compile(model, backend="mhc", options=EAGER)(features(700))
    loader = DataLoader(Embedded(model), batch_size=5, num_workers=1, multiprocessing_context=method, timeout=120)
    (batch,) = list(loader)
    assert_same_function([wanted], [batch], 1e-5)


@pytest.fixture
def _earlier_objects_left_out():
    """What earlier tests left alive is neither collected nor counted: it grows no more, and there is a lot of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _alive():
    """Count what compilations and steps leave behind."""
    gc.collect()
    kinds = (torch.Tensor, nn.Module, GraphModule)
    counts = Counter(type(value).__name__ for value in gc.get_objects() if issubclass(type(value), kinds))
    counts.update({name: len(value) for name, value in vars(MEMORY).items()})
    counts["streams"] = len(STREAMS)
    return counts


@pytest.mark.usefixtures("_earlier_objects_left_out")
def test_training_steps_leave_nothing_behind():
    model = BreaksBetween()
    mhc_compile.attach(model, features())
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    optimizer = torch.optim.AdamW(model.parameters())
    alive = []
    for step in range(12):
        compiled(features()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (3, 11):
            alive.append(_alive())
    assert not alive[1] - alive[0]


@pytest.mark.usefixtures("_earlier_objects_left_out")
@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
@pytest.mark.parametrize("ahead", [True, False])
def test_compilations_leave_nothing_behind(ahead):
    alive = []
    for _ in range(4):
        torch._dynamo.reset()
        model = Stack(depth=1)
        if ahead:
            mhc_compile.attach(model, features())
        torch.compile(model, backend="mhc", options=EAGER)(features()).sum().backward()
        del model
        torch._dynamo.reset()
        alive.append(_alive())
    assert not alive[3] - alive[1]
