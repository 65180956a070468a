"""The GPUs that predictions are made for: datasheet figures, and the share of them that programs reach."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ...errors import MHCOptionError


@dataclass(frozen=True)
class GPU:
    """What a prediction needs to know about a GPU.

    Attributes:
        name: as in the option `--gpu`.
        bandwidth: bytes a second between its memory and its processors, by the datasheet.
        matmul_flops: dense bfloat16 flops a second, by the datasheet.
        copy_share: share of the bandwidth that a large copy reaches.
        matmul_share: share of the flops that matrix products reach within a training step.
        network: bytes a second that it sends to a GPU of another node, by the datasheet of the usual node.
    """

    name: str
    bandwidth: float
    matmul_flops: float
    copy_share: float
    matmul_share: float
    network: float

    @property
    def copy_rate(self) -> float:
        """Bytes a second that a kernel bound by memory can hope for."""
        return self.bandwidth * self.copy_share

    @property
    def kernel_rate(self) -> float:
        """Bytes a second of these kernels' counted traffic."""
        return self.copy_rate * KERNEL_SHARE

    def matmul_rate(self, element_size: int) -> float:
        """Flops a second of matrix products: float32 ones run as TF32, at half the rate of 16-bit ones."""
        return self.matmul_flops * self.matmul_share / (2 if element_size > 2 else 1)


# Bandwidth and dense bfloat16 flops: NVIDIA's datasheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 (per GPU),
# AMD's of MI300X.
# Copies: H100 about 3.0 TB/s and H200 about 4.3 TB/s, 90 %, in public copy benchmarks; A100 and B200 are assumed to
# reach the same; MI300X about 4.3 TB/s in BabelStream.
# Matrix products: about 600 TFLOP/s on H100 and H200 and 200 on A100 within training steps, less than the 80-87 % of
# the best shape alone (stas00/ml-engineering, maximum achievable matmul FLOPS); B200 is assumed to reach the share of
# H200; MI300X is nearer half (AMD's ROCm blog, max-achievable FLOPs).
# Network: one adapter a GPU, of 200 Gb/s in a DGX A100, of 400 Gb/s in a DGX H100, H200 or B200 and with MI300X.
# None of these was measured here: benchmarks/kernels.py measures the copy of the device it runs on.
GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 2.039e12, 312e12, 0.90, 0.64, 25e9),
        GPU("h100", 3.35e12, 989e12, 0.90, 0.61, 50e9),
        GPU("h200", 4.8e12, 989e12, 0.90, 0.61, 50e9),
        GPU("b200", 8.0e12, 2250e12, 0.90, 0.61, 50e9),
        GPU("mi300x", 5.3e12, 1307e12, 0.81, 0.50, 50e9),
    )
}

# Share of a copy's rate at which these kernels move the bytes that are counted: read off their machine code, the wide
# streaming ones near nine tenths, those that also multiply below eight. Assumed, not measured; benchmarks/kernels.py
# measures what they reach.
KERNEL_SHARE = 0.8

# Between the end of one small kernel and the end of the next: about 2 µs replayed from a CUDA graph, several times
# that when launched from Python. Assumed, not measured.
LAUNCH_SECONDS = 4e-6


def find_gpu(name: str) -> GPU:
    """Return a GPU of the table by its name, in upper or lower case.

    Raises:
        MHCOptionError: it is not in the table; the message lists those that are.
    """
    found = GPUS.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise MHCOptionError(f"the GPU {name!r} is not known; known are {', '.join(GPUS)}.{hint}")
    return found


def gpu_of_device(device_name: str) -> GPU | None:
    """Return the GPU that a driver calls by `device_name` ("NVIDIA H200"), or None if the table has none."""
    words = device_name.lower().replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if gpu.name in words), None)
