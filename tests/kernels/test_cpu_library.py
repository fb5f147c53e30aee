"""Building the CPU kernels: without a compiler, with a failing one, and the second time.

The compilers here are fake.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.helpers import CPU

from int8run.backends.base import has_cpu_feature
from int8run.backends.cpu import Cpu
from int8run.errors import BackendError, ConfigError
from int8run.kernels.cpu import features as features_module
from int8run.kernels.cpu import library as module
from int8run.kernels.cpu.instructions import (
    ALL_SETS,
    AUTO,
    AVX512_FEATURES,
    INSTRUCTION_SETS,
    list_instruction_sets,
)
from int8run.kernels.cpu.library import (
    BuildError,
    CompileError,
    InstructionSetError,
    build_library,
    load_linear_library,
    load_rows_library,
)
from int8run.quant.weight import quantize_weight

SOURCE = INSTRUCTION_SETS["avx2"].source
ANY_X86 = dict.fromkeys((name for each in ALL_SETS for name in each.features), True)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the fake compilers are shell scripts")


@pytest.fixture
def compiler_path(tmp_path, monkeypatch):
    """An empty folder that is the whole PATH; the library loaded by other tests stays theirs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    remembered = (load_linear_library, module.try_to_load, load_rows_library)
    for function in remembered:
        function.cache_clear()
    yield folder
    for function in remembered:
        function.cache_clear()


WRITE = 'for last; do :; done; echo "whole" > "$last"'


def write_fake_compiler(path, run=WRITE, name="g++", version="g++ 12"):
    """Write a script that answers --version, records each call and runs `run`.

    It uses only what the shell has built in: the PATH is empty.
    """
    script = path / name
    calls = path.parent / f"{name}.calls"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}" && exit\necho "$@" >> "{calls}"\n{run}\n'
    )
    script.chmod(0o755)
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def test_missing_compiler_raises(compiler_path, tmp_path):
    words = r"^no C\+\+ compiler on the PATH \(g\+\+, clang\+\+, c\+\+\); install one$"

    with pytest.raises(BuildError, match=words):
        build_library(tmp_path / "cache", SOURCE)
    with pytest.raises(BuildError, match=words):
        load_linear_library()
    assert Cpu().limits.unsupported_reasons(CPU)[-1] == "needs a C++ compiler on the PATH (g++, clang++, c++)"


@pytest.mark.parametrize("name", module.COMPILERS)
def test_each_known_compiler_builds_the_library(compiler_path, tmp_path, name):
    calls = write_fake_compiler(compiler_path, name=name)
    assert build_library(tmp_path / "cache", SOURCE).read_text() == "whole\n"
    assert len(calls()) == 1


def test_first_known_compiler_is_used(compiler_path, tmp_path):
    calls = {name: write_fake_compiler(compiler_path, name=name) for name in module.COMPILERS}
    build_library(tmp_path / "cache", SOURCE)

    assert {name: len(of()) for name, of in calls.items()} == {"g++": 1, "clang++": 0, "c++": 0}


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "v.cpp:1: note: x\nv.cpp:9: fatal error: immintrin.h: No such file\ncompilation ended.",
            "v.cpp:9: fatal error",
        ),
        (
            "/usr/bin/ld: cannot find -lgomp: No such file\ncollect2: error: ld returned 1 exit status",
            "/usr/bin/ld: cannot find -lgomp",
        ),
        ("Killed", "Killed$"),
    ],
    ids=["source", "linker", "no word of an error"],
)
def test_error_quotes_a_compiler_that_fails(compiler_path, tmp_path, stderr, reason):
    write_fake_compiler(compiler_path, f"echo '{stderr}' >&2; exit 1")
    with pytest.raises(
        BuildError, match=rf"^{re.escape(str(compiler_path))}/g\+\+ could not build linear_avx2.cpp: {reason}"
    ):
        build_library(tmp_path / "cache", SOURCE)


def test_backend_error_says_what_to_do(compiler_path):
    write_fake_compiler(compiler_path, "echo 'linear.h:1: error: no such flag' >&2; exit 1")
    weight = quantize_weight(torch.ones(2, 4))

    with pytest.raises(
        BackendError,
        match=r"^backend cpu: .*: linear\.h:1: error: no such flag; backend=auto takes the next best$",
    ):
        Cpu().pack_weight(weight)


def test_failed_build_leaves_nothing_in_the_cache(compiler_path, tmp_path):
    write_fake_compiler(compiler_path, "exit 1")
    with pytest.raises(CompileError):
        build_library(tmp_path / "cache", SOURCE)

    calls = write_fake_compiler(compiler_path)

    assert build_library(tmp_path / "cache", SOURCE).exists()
    assert len(calls()) == 2


def test_a_compiler_that_knows_no_set_is_asked_once_for_each(compiler_path, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ANY_X86)
    calls = write_fake_compiler(compiler_path, "echo 'error: unrecognized option' >&2; exit 1")
    names = ["avx512_vnni", "avx2"]
    monkeypatch.setattr(module, "list_instruction_sets", lambda: names)

    for arguments in ((AUTO, tmp_path), (AUTO, tmp_path), (AUTO,), ()):
        with pytest.raises(CompileError, match=r"could not build linear_avx2\.cpp: error: unrecognized"):
            load_linear_library(*arguments)

    assert len(calls()) == 2 * len(names)  # in each of two folders
    assert len(caplog.messages) == 2
    assert all(message.startswith("kernels with avx512_vnni cannot") for message in caplog.messages)


def test_a_compiler_that_is_installed_meanwhile_is_found(compiler_path, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_library", lambda path: FakeFunctions())
    with pytest.raises(BuildError, match="no C"):
        load_linear_library(AUTO, tmp_path)

    write_fake_compiler(compiler_path)

    assert load_linear_library(AUTO, tmp_path).instructions in INSTRUCTION_SETS


def test_built_library_is_reused(compiler_path, tmp_path):
    calls = write_fake_compiler(compiler_path)
    first = build_library(tmp_path / "cache", SOURCE)

    assert build_library(tmp_path / "cache", SOURCE) == first
    assert len(calls()) == 1
    hash_path = first.with_suffix(".blake2b")
    assert sorted(f.name for f in (tmp_path / "cache").iterdir()) == [hash_path.name, first.name]


def test_library_with_a_flipped_bit_is_built_again(compiler_path, tmp_path, caplog):
    calls = write_fake_compiler(compiler_path)
    library = build_library(tmp_path / "cache", SOURCE)
    library.write_text("whale\n")

    assert build_library(tmp_path / "cache", SOURCE) == library
    assert library.read_text() == "whole\n"
    assert len(calls()) == 2
    assert f"{library} is damaged and is built again" in caplog.text


def test_library_without_a_hash_is_built_again(compiler_path, tmp_path):
    calls = write_fake_compiler(compiler_path)
    library = build_library(tmp_path / "cache", SOURCE)
    library.with_suffix(".blake2b").unlink()

    assert build_library(tmp_path / "cache", SOURCE) == library
    assert len(calls()) == 2


def test_library_name_depends_on_compiler_source_and_runtime(compiler_path, tmp_path, monkeypatch):
    calls = write_fake_compiler(compiler_path)
    names = [build_library(tmp_path / "cache", SOURCE)]
    write_fake_compiler(compiler_path, version="g++ 13")
    names.append(build_library(tmp_path / "cache", SOURCE))
    source = tmp_path / "other.cpp"
    for text in ("int a;", "int b;"):
        source.write_text(text)
        names.append(build_library(tmp_path / "cache", source))
    names.append(build_library(tmp_path / "cache", source, ("-O1",)))
    monkeypatch.setattr(module, "find_openmp_runtime", lambda: ("/elsewhere/libgomp.so.1",))
    names.append(build_library(tmp_path / "cache", source))

    assert len(set(names)) == len(calls()) == 6
    assert [name.name.split("-")[0] for name in names] == ["linear_avx2"] * 2 + ["other"] * 4
    assert "/elsewhere/libgomp.so.1" in calls()[-1]
    assert str(source) in calls()[-1]


def test_a_torch_without_openmp_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    module.find_openmp_runtime.cache_clear()
    caplog.set_level("INFO")

    found = [module.find_openmp_runtime() for _ in range(2)]
    module.find_openmp_runtime.cache_clear()

    assert found == [(), ()]
    (message,) = caplog.messages
    assert message.startswith("torch brings no lib")
    assert message.endswith("; the CPU kernels have a pool of threads of their own")


def test_instructions_are_listed_explicitly(compiler_path, tmp_path, monkeypatch):
    # a cache may be shared by machines that differ
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ANY_X86)
    calls = write_fake_compiler(compiler_path)
    with pytest.raises(BuildError, match="cannot be loaded"):  # what the fake compiler writes is no library
        load_linear_library("avx512_vnni", tmp_path / "cache")

    assert "-mavx512vnni" in calls()[0]
    assert "-ffp-contract=off" in calls()[0]
    assert "-march=native" not in calls()[0]
    assert "-ffast-math" not in calls()[0]


@pytest.mark.parametrize(
    ("features", "there", "not_there"),
    [
        (AVX512_FEATURES, "-mavx512f", "-mavx512vnni"),
        (("avx2", "avx512_f"), "-mavx2", "-mavx512f"),
        ((), "-O3", "-mavx"),
    ],
    ids=["AVX512", "AVX2", "neither"],
)
def test_rows_library_uses_the_instructions_of_the_cpu(
    compiler_path, tmp_path, monkeypatch, features, there, not_there
):
    calls = write_fake_compiler(compiler_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))
    # what an environment variable says is not what the CPU has
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")

    with pytest.raises(
        BuildError, match=r"rows-\w+\.so cannot be loaded: "
    ):  # what the fake compiler writes is no library
        load_rows_library(tmp_path / "cache")
    assert there in calls()[0]
    assert not_there not in calls()[0]
    assert "-ffp-contract=off" in calls()[0]
    assert "-ffast-math" not in calls()[0]
    assert "-march=native" not in calls()[0]
    assert [f.name[:5] for f in (tmp_path / "cache").glob("*.so")] == ["rows-"]


def test_unfinished_build_never_has_the_final_name(compiler_path, tmp_path):
    write_fake_compiler(
        compiler_path, 'for last; do :; done; echo "half" > "$last"; echo "error: disk full" >&2; exit 1'
    )

    with pytest.raises(BuildError, match="disk full"):
        build_library(tmp_path / "cache", SOURCE)
    assert list((tmp_path / "cache").iterdir()) == []

    # while it is being written it has another name, and a reader of the cache does not take it
    write_fake_compiler(compiler_path, f'for last; do :; done; echo "$last" > "{tmp_path}/written"; {WRITE}')
    target = build_library(tmp_path / "cache", SOURCE)

    written = Path((tmp_path / "written").read_text().strip())
    assert (written.parent, written.suffix) == (target.parent, ".unfinished")
    assert target.suffix == ".so"


def test_a_killed_compiler_is_named_and_leaves_nothing(compiler_path, tmp_path):
    """As a machine that is out of memory kills one."""
    write_fake_compiler(compiler_path, 'for last; do :; done; echo "half" > "$last"; kill -9 $$')

    with pytest.raises(
        BuildError, match=r"g\+\+ was killed by SIGKILL while it built linear_avx2\.cpp; start again$"
    ):
        build_library(tmp_path / "cache", SOURCE)
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_build_left_is_not_used_and_is_removed_a_day_later(compiler_path, tmp_path):
    write_fake_compiler(compiler_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    old, new = (cache / f"linear_avx2-{name}.1-ab.unfinished" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("half")
    two_days_ago = time.time() - 2 * 86400
    os.utime(old, (two_days_ago, two_days_ago))

    target = build_library(cache, SOURCE)

    assert target.read_text() == "whole\n"
    assert (old.exists(), new.exists()) == (False, True)


def test_first_builds_at_once_do_not_touch_each_other(compiler_path, tmp_path):
    """Each of them writes a file of its own, also in containers whose processes have the same number."""
    calls = write_fake_compiler(compiler_path)
    cache = tmp_path / "cache"

    with ThreadPoolExecutor(4) as threads:
        targets = list(threads.map(lambda _: build_library(cache, SOURCE), range(4)))

    outputs = {line.split()[-1] for line in calls()}
    assert len(set(targets)) == 1
    assert len(outputs) == len(calls())
    assert {path.suffix for path in cache.iterdir()} == {".so", ".blake2b"}


LOAD_AND_MULTIPLY = """
import sys
from pathlib import Path
import torch
from int8run.kernels.cpu.library import load_instruction_set
library = load_instruction_set(sys.argv[1], Path(sys.argv[2]))
x, q, scale = torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1)
pointers = x.data_ptr(), q.data_ptr(), scale.data_ptr()
status = library.int8run_quantize(pointers[0], 0, 1, 4, 4, None, 0, 0, -1, *pointers[1:], 1)
print(status, q.tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(not list_instruction_sets(), reason="this CPU has none of the instruction sets")
def test_two_processes_that_build_at_once_both_run(tmp_path):
    command = [sys.executable, "-c", LOAD_AND_MULTIPLY, list_instruction_sets()[-1], str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]

    assert printed == ["0 [[255, 255, 255, 255]]\n"] * 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".blake2b", ".so"]


def test_without_a_home_the_build_is_refused(compiler_path, monkeypatch):
    def find_no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", find_no_home)
    with pytest.raises(BuildError, match=r"no home folder to keep the built library in; set HOME$"):
        load_linear_library()


def test_cache_that_is_a_file_raises(compiler_path, tmp_path):
    calls = write_fake_compiler(compiler_path)
    (tmp_path / "file").write_text("")

    for cache, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(
            BuildError, match=rf"^cannot write the built library to {re.escape(str(cache))}: {why}$"
        ):
            build_library(cache, SOURCE)
    assert calls() == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self is a folder that even root cannot write to")
def test_cache_that_cannot_be_written_to_raises(compiler_path):
    calls = write_fake_compiler(compiler_path)
    with pytest.raises(BuildError, match=r"^cannot write the built library to /proc/self: "):
        build_library(Path("/proc/self"), SOURCE)
    assert calls() == []


def test_default_cache_is_in_the_users_home(compiler_path, tmp_path):
    write_fake_compiler(compiler_path)
    # the fake library cannot be loaded
    with pytest.raises(BuildError, match=r"linear_\w+-\w+\.so cannot be loaded: .*too short$"):
        load_linear_library()
    files = (tmp_path / "home" / ".cache" / "int8run").iterdir()
    assert sorted(file.suffix for file in files) == [".blake2b", ".so"]


def test_a_compiler_too_old_for_a_set_builds_the_next_best_and_says_so_once(
    compiler_path, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ANY_X86)
    refuse = "echo \"g++: error: unrecognized option '-mavx512vnni'\" >&2; exit 1"
    calls = write_fake_compiler(compiler_path, f'case "$*" in *-mavx512vnni*) {refuse};; esac\n{WRITE}')
    monkeypatch.setattr(module, "list_instruction_sets", lambda: ["avx512_vnni", "avx2"])
    monkeypatch.setattr(module, "open_library", lambda path: FakeFunctions())

    for _ in range(2):
        loaded = load_linear_library(AUTO, tmp_path / "cache")

    assert loaded.instructions == "avx2"
    assert len(calls()) == 2
    (warning,) = caplog.messages
    assert warning.startswith("kernels with avx512_vnni cannot be used, avx2 takes their place: ")
    assert warning.endswith("error: unrecognized option '-mavx512vnni'")


class FakeFunctions:
    """What ctypes has of the functions of linear.h."""

    def __init__(self):
        self.int8run_quantize, self.int8run_linear = SimpleNamespace(), SimpleNamespace()
        self.int8run_grouped_linear = SimpleNamespace()
        self.int8run_rms_norm, self.int8run_rotary = SimpleNamespace(), SimpleNamespace()


def test_an_instruction_set_that_is_asked_for_is_not_replaced(compiler_path, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ANY_X86)
    calls = write_fake_compiler(compiler_path, "exit 1")

    with pytest.raises(BuildError, match=r"could not build linear_avx_vnni\.cpp"):
        load_linear_library("avx_vnni", tmp_path / "cache")
    assert len(calls()) == 1


def test_a_disk_that_is_full_is_no_reason_for_slower_instructions(compiler_path, tmp_path, monkeypatch):
    calls = write_fake_compiler(compiler_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ANY_X86)
    monkeypatch.setattr(module, "list_instruction_sets", lambda: ["avx512_vnni", "avx2"])
    (tmp_path / "file").write_text("")

    with pytest.raises(BuildError, match="cannot write the built library"):
        load_linear_library(AUTO, tmp_path / "file")
    assert calls() == []


def test_each_instruction_set_has_a_library_of_its_own(compiler_path, tmp_path):
    write_fake_compiler(compiler_path)
    built = {build_library(tmp_path / "cache", each.source, each.flags) for each in ALL_SETS}

    assert {path.name.rpartition("-")[0] for path in built} == {f"linear_{each.name}" for each in ALL_SETS}


def test_a_header_is_part_of_the_source(compiler_path, tmp_path):
    write_fake_compiler(compiler_path)
    (tmp_path / "a.cpp").write_text('#include "b.h"\n')
    (tmp_path / "b.h").write_text('#include "c.h"\n#include "b.h"\n')
    built = []
    for text in ("int a;", "int b;"):
        (tmp_path / "c.h").write_text(text)
        built.append(build_library(tmp_path / "cache", tmp_path / "a.cpp"))

    assert built[0] != built[1]


# -- which instruction set -------------------------------------------------------------------------

AVX2_ONLY = {"avx2": True, "fma3": True, "f16c": True, "avx512_vnni": False, "cpu_name": "a CPU"}


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({}, []),
        (AVX2_ONLY, ["avx2"]),
        (AVX2_ONLY | {"avx_vnni": True}, ["avx_vnni", "avx2"]),
        ({"avx512_vnni": True, "avx512_f": True}, []),  # a machine that hides a part
        (AVX2_ONLY | {"avx_vnni": True, "fma3": False}, []),  # the kernels are compiled with FMA and F16C
        (AVX2_ONLY | {"avx_vnni": True, "f16c": False}, []),
    ],
    ids=["none", "AVX2", "AVX-VNNI", "part of AVX512", "no FMA", "no F16C"],
)
def test_the_best_of_what_the_cpu_has_comes_first(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)

    assert list_instruction_sets() == expected


def test_a_set_that_the_cpu_lacks_is_refused_with_what_there_is(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX2_ONLY)

    assert Cpu(instructions="avx_vnni").limits.unsupported_reasons(CPU)[:1] == [
        "needs a CPU with avx_vnni; this one has avx2"
    ]
    assert not [reason for reason in Cpu().limits.unsupported_reasons(CPU) if "needs a CPU" in reason]

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)

    (reason, *_) = Cpu().limits.unsupported_reasons(CPU)
    assert reason.startswith("needs a CPU with ") and reason.endswith("; this one has none of them")


def test_an_unknown_set_is_refused():
    with pytest.raises(ConfigError, match=r"backend.instructions is 'avx3'; did you mean 'avx2'\?"):
        Cpu(instructions="avx3")


def test_a_set_that_would_end_the_process_is_not_loaded(monkeypatch):
    """A library with instructions that the CPU lacks can be loaded; its first call ends the process."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AVX2_ONLY)
    module.try_to_load.cache_clear()
    for name in ("amx", "avx512_vnni", "i8mm"):
        with pytest.raises(InstructionSetError, match=f"^needs a CPU with {name}; this one has avx2$"):
            load_linear_library.__wrapped__(name)
    with pytest.raises(
        BackendError, match=r"^backend cpu: needs a CPU with i8mm; this one has avx2; backend=auto"
    ):
        Cpu(instructions="i8mm").pack_weight(quantize_weight(torch.ones(2, 4)))
    with pytest.raises(InstructionSetError, match=r"^no instruction set is called avx3; there are amx, "):
        load_linear_library("avx3")
    module.try_to_load.cache_clear()


# -- before torch 2.13 -----------------------------------------------------------------------------

X86_TEXT = (
    "processor\t: 0\nflags\t\t: fpu avx2 fma f16c avx_vnni avx512f amx_tile\n\nprocessor\t: 1\nflags\t\t:\n"
)
ARM_TEXT = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\n"


@pytest.fixture
def older_torch(monkeypatch, tmp_path):
    """A torch that does not list the CPU's features, on Linux; returns where the system lists them."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(features_module, "CPUINFO", tmp_path / "cpuinfo")
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(X86_TEXT, ["avx_vnni", "avx2"]), (ARM_TEXT, ["i8mm", "dotprod"]), ("model name : a CPU\n", [])],
    ids=["x86", "Arm", "no features"],
)
def test_an_older_torch_leaves_the_question_to_linux(older_torch, text, expected):
    older_torch.write_text(text)

    assert list_instruction_sets() == expected
    assert has_cpu_feature(["avx_vnni", "i8mm"]) == bool(expected)  # what other backends ask


@pytest.mark.parametrize(("level", "expected"), [("AVX512", ["avx2"]), ("AVX2", ["avx2"]), ("DEFAULT", [])])
def test_an_older_torch_elsewhere_tells_its_level_of_vectors(older_torch, monkeypatch, level, expected):
    assert not older_torch.exists()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)

    assert list_instruction_sets() == expected
