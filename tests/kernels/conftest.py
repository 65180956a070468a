"""What the tests of the kernels share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(device: str) -> Iterator[None]:
    """Operators take the Triton kernels."""
    from mhc_compile.kernels.dispatch import choosing

    with choosing("triton"):
        yield


@pytest.fixture(params=["cpu", "triton"])
def choice(request: pytest.FixtureRequest) -> str:
    """Each implementation beside plain PyTorch that runs on a CPU: a name for `choosing`."""
    if request.param == "cpu":
        from mhc_compile.kernels.cpu import build

        why = build.why_not(4, torch.float32)
        if why is not None:
            pytest.skip(f"no C++ here: {why}")
    else:
        primitives = pytest.importorskip("mhc_compile.kernels.gpu.primitives")
        if not primitives.INTERPRETED.value:
            pytest.skip("needs Triton's interpreter")
    name: str = request.param
    return name
