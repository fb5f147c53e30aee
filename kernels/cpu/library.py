"""Builds the C++ files of this folder into the user's cache on first use and loads them.

No torch headers are involved, so any g++ or clang++ does it in seconds. The libraries use the OpenMP runtime that torch has
loaded: two of them would be two pools of threads that fight for the same cores.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

import torch

log = logging.getLogger(__name__)
VNNI, ROWS = (Path(__file__).with_name(name) for name in ("vnni.cpp", "rows.cpp"))
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-w")
# instructions are named one by one and not -march=native: a cache may be shared by machines that differ
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
VNNI_FLAGS = (*AVX512, "-mavx512vnni")
# what rows.cpp promises, equal bits everywhere, holds only where products and sums stay apart
ROWS_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# what torch says of the CPU -> how far loops are vectorized; other CPUs get what their compiler takes for granted
VECTORS = {"AVX512": (*AVX512, "-mprefer-vector-width=512"), "AVX2": ("-mavx2",)}


class BuildError(RuntimeError):
    """A library could not be built; the message says what was missing."""


def find_compiler() -> str | None:
    """The C++ compiler on the PATH, or None."""
    return next((path for path in map(shutil.which, COMPILERS) if path), None)


def find_openmp_runtime() -> list[str]:
    """The GNU OpenMP library that torch brought, if it did: linked by its file name, the two share one pool of threads.

    Other packages bring copies of their own, so a library that is merely loaded may be the wrong one.
    """
    return sorted(str(path) for path in Path(torch.__file__).parent.rglob("libgomp*.so*"))[:1]


@functools.lru_cache(maxsize=1)
def load_vnni_library(cache: Path | None = None) -> ctypes.CDLL:
    """The loaded VNNI kernels; built if the cache has none for this source, compiler and runtime.

    Args:
        cache: folder for the built library; None: `~/.cache/int8run`.

    Raises:
        BuildError: no compiler, or it failed.
    """
    lib = ctypes.CDLL(str(build_library(cache or get_default_cache(), VNNI, VNNI_FLAGS)))
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.int8run_quantize.argtypes = [p, i, n, n, n, p, n, i, n, p, p, i]
    lib.int8run_linear.argtypes = [p, p, n, n, n, p, p, p, n, p, p, p, p, p, i, i]
    lib.int8run_quantize.restype = lib.int8run_linear.restype = None
    return lib


@functools.lru_cache(maxsize=1)
def load_rows_library(cache: Path | None = None) -> ctypes.CDLL:
    """The loaded `rows.cpp`, which any CPU can run; built for the vector instructions of this one.

    Args:
        cache: as for `library`.

    Raises:
        BuildError: no compiler, it failed, or what it built cannot be loaded.
    """
    path = build_library(
        cache or get_default_cache(),
        ROWS,
        (*ROWS_FLAGS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), ())),
    )
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.int8run_quantize_weight_rows.argtypes = [p, i, n, n, p, n, p, n, ctypes.c_float, p, p, p, i]
    lib.int8run_quantize_weight_rows.restype = n
    return lib


def get_default_cache() -> Path:
    """The user's folder for built libraries."""
    return Path.home() / ".cache" / "int8run"


def build_library(cache: Path, source: Path = VNNI, flags: tuple[str, ...] = VNNI_FLAGS) -> Path:
    """A source's library, compiled if it is not there yet; the name holds a hash of all that it depends on."""
    found = find_compiler()
    if found is None:
        raise BuildError(f"no C++ compiler on the PATH ({', '.join(COMPILERS)}); install one")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    command = [found, *FLAGS, *flags, str(source), *find_openmp_runtime(), "-Wl,--as-needed"]
    digest = hashlib.sha256("\0".join([source.read_text(), version, *command]).encode()).hexdigest()[:16]
    target = cache / f"{source.stem}-{digest}.so"
    if target.exists():
        return target
    fresh = (
        cache / f"{source.stem}-{digest}.{os.getpid()}"
    )  # renamed when whole: another process may build at the same time
    try:
        cache.mkdir(parents=True, exist_ok=True)
        fresh.touch()
    except OSError as error:
        raise BuildError(f"cannot write the built library to {cache}: {error.strerror}") from error
    log.info("building %s with %s into %s, once", source.name, found, cache)
    done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, check=False)
    if done.returncode:
        fresh.unlink(missing_ok=True)
        # the linker says "cannot find ...", and only then that there was an error
        telling = (line for line in done.stderr.splitlines() if "error" in line or "cannot" in line)
        reason = next(telling, done.stderr.strip()[-300:])
        raise BuildError(f"{found} could not build {source.name}: {reason}")
    fresh.replace(target)
    return target
