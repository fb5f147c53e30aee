"""Builds `vnni.cpp` into the user's cache on first use and loads it.

No torch headers are involved, so any g++ or clang++ does it in seconds. The library uses the OpenMP runtime that torch has
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
SOURCE = Path(__file__).with_name("vnni.cpp")
COMPILERS = ("g++", "clang++", "c++")
# named one by one and not -march=native: a cache may be shared by machines that differ
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-w")


class BuildError(RuntimeError):
    """The library could not be built; the message says what was missing."""


def compiler() -> str | None:
    """The C++ compiler on the PATH, or None."""
    return next((path for path in map(shutil.which, COMPILERS) if path), None)


def openmp_runtime() -> list[str]:
    """The GNU OpenMP library that torch brought, if it did: linked by its file name, the two share one pool of threads.

    Other packages bring copies of their own, so a library that is merely loaded may be the wrong one.
    """
    return sorted(str(path) for path in Path(torch.__file__).parent.rglob("libgomp*.so*"))[:1]


@functools.lru_cache(maxsize=1)
def library(cache: Path | None = None) -> ctypes.CDLL:
    """The loaded library; built if the cache has none for this source, compiler and runtime.

    Args:
        cache: folder for the built library; None: `~/.cache/int8run`.

    Raises:
        BuildError: no compiler, or it failed.
    """
    path = built(cache or Path.home() / ".cache" / "int8run")
    lib = ctypes.CDLL(str(path))
    p, n, i = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.int8run_quantize.argtypes = [p, i, n, n, n, p, n, i, n, p, p, i]
    lib.int8run_linear.argtypes = [p, p, n, n, n, p, p, p, n, p, p, p, p, p, i, i]
    lib.int8run_quantize.restype = lib.int8run_linear.restype = None
    return lib


def built(cache: Path) -> Path:
    """The library's file, compiled if it is not there yet; the name holds a hash of all that it depends on."""
    found = compiler()
    if found is None:
        raise BuildError(f"no C++ compiler on the PATH ({', '.join(COMPILERS)}); install one")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    command = [found, *FLAGS, str(SOURCE), *openmp_runtime(), "-Wl,--as-needed"]
    digest = hashlib.sha256("\0".join([SOURCE.read_text(), version, *command]).encode()).hexdigest()[:16]
    target = cache / f"vnni-{digest}.so"
    if target.exists():
        return target
    fresh = cache / f"vnni-{digest}.{os.getpid()}"  # renamed when whole: another process may build at the same time
    try:
        cache.mkdir(parents=True, exist_ok=True)
        fresh.touch()
    except OSError as error:
        raise BuildError(f"cannot write the built library to {cache}: {error.strerror}") from error
    log.info("building the VNNI kernels with %s into %s, once", found, cache)
    done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, check=False)
    if done.returncode:
        fresh.unlink(missing_ok=True)
        # the linker says "cannot find ...", and only then that there was an error
        telling = (line for line in done.stderr.splitlines() if "error" in line or "cannot" in line)
        reason = next(telling, done.stderr.strip()[-300:])
        raise BuildError(f"{found} could not build the VNNI kernels: {reason}")
    fresh.replace(target)
    return target
