"""Compile the operators for the machine at hand, once, and load them.

One shared library for each number of streams and dtype of the streams, in the folder of PyTorch's own extensions
(`TORCH_EXTENSIONS_DIR`, by default `~/.cache/torch_extensions`), named by a hash of the source, the compiler, its
options and the processor. The compiler is `$CXX`, or the first of c++, g++ and clang++ that is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from ..epsilons import Epsilons

_HERE = Path(__file__).parent
SOURCES = (
    "operators.cpp", "site.h", "mixing.h", "projection.h", "chunks.h", "tiles.h", "coefficients.h",
    "manifolds.h", "vectors.h",
)  # fmt: skip
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Sums may be contracted to fused multiply-adds; nothing else may be reordered, and NaN and infinity keep their meaning.
_OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
_THREADS = "-fopenmp"

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class HeldEpsilons(ctypes.Structure):
    """`Epsilons`, as coefficients.h has them."""

    _fields_ = [(name, _FLOAT) for name in Epsilons._fields]


_SITE = [_LONG, _LONG, _INT, _FLOAT, HeldEpsilons, _INT, _INT]
_SIGNATURES = {
    "mhc_sinkhorn": [_POINTER] * 2 + [_LONG, _INT, HeldEpsilons, _INT],
    "mhc_sinkhorn_backward": [_POINTER] * 3 + [_LONG, _INT, HeldEpsilons, _INT],
    "mhc_pre": [_POINTER] * 8 + _SITE,
    "mhc_collapse": [_POINTER] * 5 + _SITE,
    "mhc_pre_backward": [_POINTER] * 12 + _SITE,
    "mhc_post": [_POINTER] * 5 + [_LONG, _LONG, _INT],
    "mhc_post_backward": [_POINTER] * 9 + [_LONG, _LONG, _INT],
    "mhc_post_pre": [_POINTER] * 12 + _SITE,
    "mhc_post_collapse": [_POINTER] * 9 + _SITE,
    "mhc_post_pre_backward": [_POINTER] * 20 + _SITE,
}


class BuildError(RuntimeError):
    """The operators cannot be compiled here; the message says why."""


@functools.cache
def library(n_streams: int, dtype: torch.dtype) -> ctypes.CDLL | BuildError:
    """Return the compiled operators for a number of streams and their dtype, or why there are none."""
    try:
        loaded = _loaded(n_streams, dtype)
    except (BuildError, OSError) as error:
        return error if isinstance(error, BuildError) else BuildError(str(error))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _INT
    return loaded


def _loaded(n_streams: int, dtype: torch.dtype) -> ctypes.CDLL:
    path = _compiled(n_streams, dtype)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # What lies there is no library: a folder that was copied or restored in part.
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_compiled(n_streams, dtype)))


def why_not(n_streams: int, dtype: torch.dtype) -> str | None:
    """Return why there are no compiled operators here, None if there are; compiles them where that was not done."""
    found = library(n_streams, dtype)
    return str(found) if isinstance(found, BuildError) else None


def compiler() -> str | None:
    """Return the path of the C++ compiler, None if there is none."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def _compiled(n_streams: int, dtype: torch.dtype) -> Path:
    path = compiler()
    if path is None:
        raise BuildError("no C++ compiler found (c++, g++, clang++, or what CXX names)")
    options = (*_OPTIONS, _native(), f"-DMHC_STREAMS={n_streams}", f"-DMHC_DTYPE={DTYPES[dtype]}")
    folder = _folder()
    target = folder / f"mhc_{n_streams}_{str(dtype).removeprefix('torch.')}_{_key(path, options)}.so"
    if target.exists():
        return target
    with _locked(folder / "lock"):
        if not target.exists():
            _compile(path, options, target)
    return target


def _compile(path: str, options: tuple[str, ...], target: Path) -> None:
    # Renamed when it is whole: a reader without the lock finds all of it or nothing.
    unfinished = target.with_suffix(f".{os.getpid()}")
    # Without OpenMP, as with Apple's clang, one thread does the work.
    for threads in ((_THREADS,), ()):
        command = [path, *options, *threads, str(_HERE / SOURCES[0]), "-o", str(unfinished)]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise BuildError(f"{path} does not run: {error}") from error
        if result.returncode == 0:
            os.replace(unfinished, target)
            return
        unfinished.unlink(missing_ok=True)
    first = (result.stderr.strip() or "no message").splitlines()[0]
    raise BuildError(f"{path} does not compile the operators: {first}")


def _native() -> str:
    return "-mcpu=native" if platform.machine().lower() in ("aarch64", "arm64") else "-march=native"


def _key(path: str, options: tuple[str, ...]) -> str:
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256("\n".join((path, version, *options, _processor())).encode())
    for name in SOURCES:
        digest.update((_HERE / name).read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """What decides which instructions the machine has: a home directory may be shared by several machines."""
    about = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        about += sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return "\n".join(about)


def _folder() -> Path:
    """Return a folder that can be written: PyTorch's for extensions, else one that lasts as long as the process."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (Path(chosen) if chosen else cache / "torch_extensions") / "mhc_compile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="mhc_compile_"))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process: of several that start together, one compiles."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
