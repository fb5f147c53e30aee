"""Faults of what is kept below HOME: a build of the kernels is killed or done twice, nothing can be written.

Each one is a function of a sandbox; `run.py` lists them.
"""

import os
import signal
from collections import Counter
from pathlib import Path

from mounts import mount_with
from sandbox import SMALL, Sandbox, check_said, check_that

QUANTIZE = ("task=quantize", "save=out.safetensors")
WITHOUT_KERNELS = "weights are quantized by torch"  # what is said where there is no kernel
# answers --version as g++ does; otherwise writes half of its last argument, the output, and does not end
SLOW_COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "g++ 12" && exit
for last; do :; done
echo half > "$last"
touch {begun}
exec sleep 1000
"""


def write_slow_compiler(folder: Path, begun: Path) -> None:
    """Write a g++ that makes the file `begun`, writes half of its output and does not come to an end."""
    folder.mkdir()
    compiler = folder / "g++"
    compiler.write_text(SLOW_COMPILER.format(begun=begun))
    compiler.chmod(0o755)


def count_built_files(home: Path) -> Counter[str]:
    """How many files of each suffix are in the folder of built kernels."""
    folder = home / ".cache" / "int8run"
    return Counter(path.suffix for path in folder.glob("rows-*"))


def kernel_build_is_killed(sandbox: Sandbox) -> None:
    """kill -9 while the kernels are compiled; the next command builds them anew."""
    home = sandbox.folder / "home"
    begun = sandbox.folder / "begun"
    compilers = sandbox.folder / "bin"
    write_slow_compiler(compilers, begun)
    path = os.environ["PATH"]
    sandbox.environment = {"HOME": str(home), "PATH": f"{compilers}:{path}"}

    command = sandbox.start(*QUANTIZE, own_session=True)
    sandbox.wait_for_file(command, begun)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()

    left = count_built_files(home)
    check_that(left == {".unfinished": 1}, f"the killed build left {left}")
    sandbox.environment["PATH"] = path
    text = sandbox.run(*QUANTIZE)
    check_that(WITHOUT_KERNELS not in text, sandbox.read_log_end())
    built = count_built_files(home)
    check_that(built[".so"] == built[".blake2b"] == 1, f"the second build left {built}")
    sandbox.findings.append("half a file was left and not used; the next command built its own")


def two_first_builds(sandbox: Sandbox) -> None:
    """Two commands that find no kernels start at once."""
    home = sandbox.folder / "home"
    sandbox.environment["HOME"] = str(home)
    outputs = [sandbox.folder / "a.safetensors", sandbox.folder / "b.safetensors"]

    commands = [sandbox.start("task=quantize", f"save={output.name}") for output in outputs]
    for command in commands:
        sandbox.wait(command, 0)

    built = count_built_files(home)
    check_that(built == {".so": 1, ".blake2b": 1}, f"left: {built}")
    # the headers may differ: they say what wrote the file and when
    first, second = (output.read_bytes() for output in outputs)
    check_that(len(first) == len(second) and first[-1000:] == second[-1000:], "their files differ")
    sandbox.findings.append("both ended with 0, one library, equal files")


def home_is_read_only(sandbox: Sandbox) -> None:
    """Nothing can be written below HOME: a run and a quantization do without what is kept there."""
    home = sandbox.folder / "home"
    sandbox.environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    with mount_with(home, "ro"):
        check_works_without_home(sandbox, "Read-only file system")


def home_is_absent(sandbox: Sandbox) -> None:
    """HOME names a folder that is not there and cannot be made."""
    sandbox.environment |= {"HOME": "/proc/nobody", "XDG_CACHE_HOME": "/proc/nobody/.cache"}
    check_works_without_home(sandbox, "cannot write the built library to /proc/nobody/.cache/int8run")


def home_without_execution(sandbox: Sandbox) -> None:
    """HOME is on a disk from which nothing may be executed, so that a built kernel cannot be loaded."""
    home = sandbox.folder / "home"
    sandbox.environment["HOME"] = str(home)
    with mount_with(home, "noexec"):
        check_works_without_home(sandbox, "cannot be loaded")


def check_works_without_home(sandbox: Sandbox, reason: str) -> None:
    """A quantization and a run end with 0, and say what they do without and why."""
    text = sandbox.run(*QUANTIZE)
    check_said(text, WITHOUT_KERNELS, reason)
    sandbox.run("seed=0", *SMALL, "hydra.run.dir=run")
    check_that((sandbox.folder / "run" / "metrics.json").is_file(), "the run left no metrics")
    sandbox.findings.append("quantized by torch, said why; the run finished")
