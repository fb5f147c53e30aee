"""Build the C++ files of this folder into the user's cache on first use, and load them.

`linear.py` and `rows.py` call the loaded libraries; `backends` asks whether there is a compiler. No torch
headers are involved, so any g++ or clang++ builds a file in seconds. The libraries use the OpenMP runtime
that torch has loaded: two of them would be two pools of threads that compete for the same cores.
"""

import ctypes
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from int8run.kernels.cpu.features import read_cpu_features
from int8run.kernels.cpu.instructions import (
    AUTO,
    AVX512_FEATURES,
    AVX512_FLAGS,
    INSTRUCTION_SETS,
    find_unusable_reason,
    list_instruction_sets,
)
from int8run.kernels.cpu.signatures import FLOAT, INT, INT64, POINTER, declare_functions

log = logging.getLogger(__name__)
ROWS = Path(__file__).with_name("rows.cpp")
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
UNFINISHED_SUFFIX = ".unfinished"  # of the name of a library that is being written
ABANDONED_AFTER_SECONDS = 86400
COMPILERS = ("g++", "clang++", "c++")
# equal bits on all CPUs hold only where products and sums are not fused unless the source says so
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w", "-ffp-contract=off")
# Apple's clang has OpenMP, and its driver says that it has not
OPENMP_FLAGS = ("-Xclang", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
# a library that no function is taken from is not loaded; Apple's linker does not know this
LINKER_FLAGS = () if sys.platform == "darwin" else ("-Wl,--as-needed",)
ROWS_FLAGS = ("-fno-math-errno", "-fno-trapping-math")
# what the C functions return where memory ran out, as in common.h
OUT_OF_MEMORY = -1


class Vectors(NamedTuple):
    """Vector instructions of a kind of CPUs."""

    features: tuple[str, ...]  # what the CPU must have
    flags: tuple[str, ...]  # of the compiler


# how far the loops of rows.cpp are vectorized, the best first; other CPUs get what their compiler takes for
# granted
VECTORS = {
    "AVX512": Vectors(AVX512_FEATURES, (*AVX512_FLAGS, "-mprefer-vector-width=512")),
    "AVX2": Vectors(("avx2",), ("-mavx2",)),
}


class BuildError(RuntimeError):
    """A library could not be built; the message says what was missing."""


class InstructionSetError(BuildError):
    """An instruction set cannot be had: the CPU lacks it, or the system or the compiler refuses it."""


class CompileError(InstructionSetError):
    """The compiler refused a source or a flag, as one does that is older than the instruction set."""


class Library(NamedTuple):
    """The kernels of a kind of layers, loaded."""

    instructions: str  # name of the instruction set
    functions: ctypes.CDLL


def find_compiler() -> str | None:
    """The C++ compiler on the PATH, or None."""
    return next((path for path in map(shutil.which, COMPILERS) if path), None)


@functools.cache
def find_openmp_runtime() -> tuple[str, ...]:
    """The OpenMP library that torch ships, if it does: GNU's, on a Mac LLVM's.

    Linked by its file name, the library and torch share one pool of threads. Other packages ship copies as
    well, so a library that is merely loaded may be the wrong one.
    """
    pattern = "libomp*.dylib" if sys.platform == "darwin" else "libgomp*.so*"
    found = sorted(str(path) for path in Path(torch.__file__).parent.rglob(pattern))
    if not found:
        log.info("torch brings no %s; the CPU kernels have a pool of threads of their own", pattern)
    return tuple(found[:1])


@functools.cache
def load_linear_library(instructions: str = AUTO, cache: Path | None = None) -> Library:
    """Load the kernels of a linear layer; build them if the cache has none for this source and compiler.

    Args:
        instructions: name of an instruction set; `auto`: the best that this CPU has and the compiler knows.
        cache: folder for the built library; None: `~/.cache/int8run`.

    Raises:
        InstructionSetError: this machine cannot run the set, or the compiler does not know it.
        BuildError: no compiler, or what it built cannot be written or loaded.
    """
    return raise_or_return(try_to_load(instructions, cache))


@functools.cache
def load_conv_library(instructions: str = AUTO, cache: Path | None = None) -> Library:
    """Load the kernels of a convolution; all else is as for `load_linear_library`."""
    return raise_or_return(try_to_load(instructions, cache, "conv"))


@functools.cache
def load_attention_library(instructions: str = AUTO, cache: Path | None = None) -> Library:
    """Load the kernels of attention; all else is as for `load_linear_library`."""
    return raise_or_return(try_to_load(instructions, cache, "attention"))


def raise_or_return(outcome: Library | InstructionSetError) -> Library:
    """Raise a remembered refusal, as a new exception each time."""
    if isinstance(outcome, InstructionSetError):
        raise type(outcome)(str(outcome))
    return outcome


@functools.cache
def try_to_load(
    instructions: str, cache: Path | None, layer: str = "linear"
) -> Library | InstructionSetError:
    """As `load_linear_library`, and a refusal is remembered as well: it will be the same at every try.

    Args:
        instructions: name of an instruction set, or `auto`.
        cache: folder for the built library, or None.
        layer: `linear`, `conv` or `attention`.

    Raises:
        BuildError: for what may pass, such as a disk that is full.
    """
    folder = cache or get_default_cache()
    names = list_instruction_sets() if instructions == AUTO else [instructions]
    failure = InstructionSetError("this CPU has none of the instruction sets of the kernels")
    for i, name in enumerate(names):
        try:
            functions = load_instruction_set(name, folder, layer)
        except InstructionSetError as error:
            failure = error
            if i + 1 < len(names):
                next_best = names[i + 1]
                log.warning(
                    "kernels with %s cannot be used, %s takes their place: %s", name, next_best, error
                )
            continue
        log.debug("%s layers run with %s", layer, name)
        return Library(name, functions)
    return failure


def load_instruction_set(name: str, folder: Path, layer: str = "linear") -> ctypes.CDLL:
    """Build and load the kernels for one instruction set, after asking the system for what it needs.

    Args:
        name: of the instruction set.
        folder: for the built library.
        layer: `linear`, `conv` or `attention`.

    Raises:
        InstructionSetError: there is no such set, this machine cannot run it, or the compiler refuses it.
        BuildError: as for `build_library` and `open_library`.
    """
    if name not in INSTRUCTION_SETS:
        raise InstructionSetError(
            f"no instruction set is called {name}; there are {', '.join(INSTRUCTION_SETS)}"
        )
    # a library with instructions that the CPU lacks can be loaded, and ends the process at its first call
    reason = find_unusable_reason((name,))
    if reason is not None:
        raise InstructionSetError(reason)
    chosen = INSTRUCTION_SETS[name]
    functions = open_library(build_library(folder, chosen.get_source(layer), chosen.flags))
    declare_functions(layer, functions)
    return functions


def check_status(status: int) -> None:
    """Check what a C function returned.

    Raises:
        MemoryError: it had no memory for copies of its operands.
    """
    if status == OUT_OF_MEMORY:
        raise MemoryError("the CPU kernels ran out of memory; a smaller batch needs less")


@functools.lru_cache(maxsize=1)
def load_rows_library(cache: Path | None = None) -> ctypes.CDLL:
    """Load `rows.cpp`, which any CPU can run; built for the vector instructions of this one.

    Args:
        cache: as for `load_linear_library`.

    Raises:
        BuildError: no compiler, it failed, or what it built cannot be loaded.
    """
    flags = (*ROWS_FLAGS, *choose_vector_flags())
    lib = open_library(build_library(cache or get_default_cache(), ROWS, flags))
    lib.int8run_quantize_weight_rows.argtypes = [
        *(POINTER, INT, INT64, INT64),  # x, dtype, M, K
        *(POINTER, INT64, POINTER, INT64, FLOAT),  # factor, group, signs, radix, norm
        *(POINTER, POINTER, POINTER, INT),  # q, scale, sums, threads
    ]
    lib.int8run_quantize_weight_rows.restype = INT64
    return lib


def choose_vector_flags() -> tuple[str, ...]:
    """The compiler's flags for the best vector instructions that this CPU has."""
    features = read_cpu_features()
    for vectors in VECTORS.values():
        if features.issuperset(vectors.features):
            return vectors.flags
    return ()


def open_library(path: Path) -> ctypes.CDLL:
    """Load a built library.

    Raises:
        BuildError: when the system does not load it, such as from a disk on which nothing may be executed.
    """
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error


def get_default_cache() -> Path:
    """The user's folder for built libraries.

    Raises:
        BuildError: the user has none; a folder that others share could hold a library of theirs.
    """
    try:
        return Path.home() / ".cache" / "int8run"
    except RuntimeError as error:  # pathlib's: no HOME, and the system does not know the user
        raise BuildError("there is no home folder to keep the built library in; set HOME") from error


def build_library(cache: Path, source: Path, flags: tuple[str, ...] = ()) -> Path:
    """Compile a source if its library is not in the cache; the name holds a hash of all that it depends on.

    Args:
        cache: folder for the built library.
        source: C++ file; the headers beside it count as parts of it.
        flags: of the compiler, besides FLAGS.

    Returns:
        The library.

    Raises:
        BuildError: no compiler, it failed, or the folder cannot be written to.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler on the PATH ({', '.join(COMPILERS)}); install one")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    command = [compiler, *FLAGS, *OPENMP_FLAGS, *flags, str(source), *find_openmp_runtime(), *LINKER_FLAGS]
    digest = hashlib.sha256("\0".join([*read_sources(source), version, *command]).encode()).hexdigest()[:16]
    target = cache / f"{source.stem}-{digest}.so"
    if target.exists() and is_as_built(target):
        return target

    # Renamed when it is complete: another process may build at the same time. Its number alone would not do:
    # containers that share a cache all have a process 1.
    unfinished = cache / f"{target.stem}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED_SUFFIX}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_abandoned_builds(cache)
        unfinished.touch()
        log.info("building %s with %s into %s, once", source.name, compiler, cache)
        run_compiler([*command, "-o", str(unfinished)], source)
        write_hash(unfinished, target)
        unfinished.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write the built library to {cache}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return target


def read_sources(source: Path) -> list[str]:
    """The text of a source and of the headers that it includes from its own folder, directly or not."""
    texts: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in texts:
            continue
        texts[path] = path.read_text()
        included = [(path.parent / name).resolve() for name in INCLUDE.findall(texts[path])]
        waiting += [header for header in included if header.exists()]
    return list(texts.values())


def run_compiler(command: list[str], source: Path) -> None:
    """Compile a source.

    Raises:
        CompileError: the compiler failed.
        BuildError: it was killed, as a machine that is out of memory does.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise BuildError(f"{command[0]} was killed by {name} while it built {source.name}; start again")
    if done.returncode:
        raise CompileError(f"{command[0]} could not build {source.name}: {find_reason(done.stderr)}")


def remove_abandoned_builds(cache: Path) -> None:
    """Remove what processes left that were killed while they built."""
    for path in cache.glob(f"*{UNFINISHED_SUFFIX}"):
        with suppress(OSError):  # another process may clear up at the same time
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER_SECONDS:
                path.unlink()


def is_as_built(library: Path) -> bool:
    """Whether a library holds what the compiler wrote; with a flipped bit it would compute anything."""
    try:
        expected = library.with_suffix(".blake2b").read_text(errors="replace")
        is_same = hash_file(library) == expected
    except OSError:
        return False
    if not is_same:
        log.warning("%s is damaged and is built again", library)
    return is_same


def write_hash(built: Path, target: Path) -> None:
    """Write the hash of a library beside its place, before it gets there.

    Args:
        built: the library under its temporary name.
        target: its place.
    """
    unfinished = built.with_name(f"{built.name}-blake2b{UNFINISHED_SUFFIX}")
    try:
        unfinished.write_text(hash_file(built))
        unfinished.replace(target.with_suffix(".blake2b"))
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """BLAKE2b of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def find_reason(output: str) -> str:
    """The line of a compiler's output that says what was wrong."""
    for line in output.splitlines():
        # the linker says "cannot find ...", and only then that there was an error
        if "error" in line or "cannot" in line:
            return line
    return output.strip()[-300:]
