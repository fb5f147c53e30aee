"""Paths that no file can have, or that name something else, in every setting that takes a path.

    python experiments/faults/paths.py [--settings NAME ...] [--kinds NAME ...] [--all]

Every pair is the command in a process of its own, forked from one that has imported everything. Started by
root, these processes become another user (`--user`, else `nobody`): for root nothing is unreadable, and some
of the paths name `/` and devices, which root may replace. A pair passes when the command ends in time with 0,
or with an exit code of a setting or file that cannot work and one line that says so. Prints the pairs that do
not pass (`--all`: each pair and its line) and ends with 1 when there are any.
"""

import argparse
import importlib
import io
import os
import pwd
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from path_kinds import KINDS, PACKAGE, SHIPPED_LORA

PATIENCE_S = 60.0  # for one command, on a machine that is busy
SHOWN_CHARS = 230
LOG = "log.txt"
EXPECTED_CODES = (0, 2, 3)  # fine, a setting, a file
TINY_DENOISER = PACKAGE / "assets" / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors"
LITTLE = (
    "sampler.steps=1",
    "sampler.width=16",
    "sampler.height=16",
    "metrics.baseline=none",
    "metrics.system_s=0",
    "backend=reference",
    "progress=false",
)
PROMPT = ("prompts.prompts=[fox]",)
UNCACHED = ("cache.limit_gb=0",)
UNTRACKED = ("tracker=none",)
RUN = (*LITTLE, *PROMPT, *UNCACHED, *UNTRACKED)
TRACKED_RUN = (*LITTLE, *PROMPT, *UNCACHED)
# what every command needs and imports late; the commands are forked from this process
IMPORTED_BEFORE = (
    "diffusers",
    "int8run.cli",
    "int8run.config.compose",
    "int8run.tasks.inspect_file",
    "int8run.tasks.quantize_checkpoint",
    "int8run.tasks.report",
    "int8run.tasks.run",
    "int8run.tracking.mlflow_tracker",
    "mlflow.tracking",
)


@dataclass(frozen=True)
class Attempt:
    """How one command ended."""

    setting: str
    kind: str
    code: int | None  # None: it did not end in time
    text: str
    seconds: float

    @property
    def problem(self) -> str | None:
        """What is wrong with it; None: nothing."""
        if self.code is None:
            return f"did not end within {PATIENCE_S:g} s"
        if "Traceback" in self.text:
            return "a traceback: " + self.text.strip().splitlines()[-1]
        if self.code not in EXPECTED_CODES:
            return f"exit code {self.code}"
        if self.code != 0 and len(self.lines) != 1:
            return f"{len(self.lines)} lines of the error"
        return None

    def describe(self) -> str:
        """A line about it."""
        verdict = "FAIL" if self.problem else "pass"
        said = " / ".join(self.lines)[:SHOWN_CHARS]
        line = (
            f"{verdict}  {self.setting:<26} {self.kind:<24} {self.seconds:5.1f} s  [{self.code}] "
            f"{self.problem or ''} {said}"
        )
        return line.encode("utf-8", "backslashreplace").decode()

    @property
    def lines(self) -> list[str]:
        """The message: what follows `int8run: `, to the end."""
        found = re.findall(r"(?:\A|\n)int8run: (.*)\Z", self.text, flags=re.DOTALL)
        return found[0].strip().splitlines() if found else []


# -- where a path can stand --------------------------------------------------------------------------


def quote(text: str) -> str:
    """A text as a value of hydra's grammar."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


SETTINGS: Mapping[str, Callable[[str], list[str]]] = {
    "model.location": lambda path: [f"model.location={quote(path)}", *RUN],
    "model.location, quantize": lambda path: [
        "task=quantize",
        f"model.location={quote(path)}",
        "save=out.safetensors",
        *UNCACHED,
    ],
    "model.base": lambda path: [f"model.location={TINY_DENOISER}", f"model.base={quote(path)}", *RUN],
    "model.parts": lambda path: [f"+model.parts.vae={quote(path)}", *RUN],
    "model.sdnq": lambda path: [f"model.location={TINY_DENOISER}", f"model.sdnq={quote(path)}", *RUN],
    "int8.checkpoint": lambda path: [f"int8.checkpoint={quote(path)}", *RUN],
    "save": lambda path: [f"save={quote(path)}", *RUN],
    "save, quantize": lambda path: ["task=quantize", f"save={quote(path)}", *UNCACHED],
    "save, text encoder": lambda path: [
        "task=quantize",
        "task.component=text_encoder",
        "clip=int8_rowwise",
        f"save={quote(path)}",
        *UNCACHED,
    ],
    "lora path": lambda path: ["lora=file", f"lora.adapters.0.path={quote(path)}", *RUN],
    "lora path with weight_name": lambda path: [
        "lora=file",
        f"lora.adapters.0.path={quote(path)}",
        "lora.adapters.0.weight_name=a.safetensors",
        *RUN,
    ],
    "lora weight_name": lambda path: [
        "lora=file",
        "lora.adapters.0.path=.",
        f"lora.adapters.0.weight_name={quote(path)}",
        *RUN,
    ],
    "lora_dir": lambda path: [
        "lora=file",
        "lora.adapters.0.path=style",
        f"lora_dir={quote(path)}",
        *RUN,
    ],
    "prompts.path": lambda path: [
        "prompts=file",
        f"prompts.path={quote(path)}",
        *LITTLE,
        *UNCACHED,
        *UNTRACKED,
    ],
    "clip.path": lambda path: ["clip=auto", f"clip.path={{text_encoder: {quote(path)}}}", *RUN],
    "clip.path, both": lambda path: ["clip=auto", f"clip.path={quote(path)}", *RUN],
    "cache.folder": lambda path: [f"cache.folder={quote(path)}", *LITTLE, *PROMPT, *UNTRACKED],
    "cache.folder, inspect": lambda path: ["task=inspect", f"cache.folder={quote(path)}"],
    "backend.table": lambda path: [
        *[word for word in RUN if not word.startswith("backend=")],
        "backend=auto",
        "backend.rounds=1",
        f"backend.table={quote(path)}",
    ],
    "task.path, inspect": lambda path: ["task=inspect", f"task.path={quote(path)}"],
    "task.path, report": lambda path: ["task=report", f"task.path={quote(path)}", *UNTRACKED],
    "sync": lambda path: ["task=report", f"sync={quote(path)}"],
    "hydra.run.dir": lambda path: [f"hydra.run.dir={quote(path)}", *RUN],
    "hydra.sweep.dir": lambda path: ["-m", "seed=0,1", f"hydra.sweep.dir={quote(path)}", *RUN],
    "hydra.sweep.subdir": lambda path: ["-m", "seed=0,1", f"hydra.sweep.subdir={quote(path)}", *RUN],
    "tracker.uri": lambda path: [f"tracker.uri={quote(path)}", *TRACKED_RUN],
    "tracker.uri, sqlite": lambda path: [f"tracker.uri={quote('sqlite:///' + path)}", *TRACKED_RUN],
    "tracker.uri, file": lambda path: [f"tracker.uri={quote('file://' + path)}", *TRACKED_RUN],
    "tracker.folder": lambda path: [f"tracker.folder={quote(path)}", *TRACKED_RUN],
    "config-dir": lambda path: ["--config-dir", path, *RUN],
    "config-name": lambda path: ["--config-name", path, *RUN],
}


# -- one pair ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class User:
    """Who the commands are run by.

    Args:
        name: as `pwd` knows it; None: whoever started this script.
    """

    name: str | None

    @property
    def numbers(self) -> tuple[int, int]:
        """The numbers of the user and of its group."""
        if self.name is None:
            return os.getuid(), os.getgid()
        entry = pwd.getpwnam(self.name)
        return entry.pw_uid, entry.pw_gid

    def become(self) -> None:
        """Make this process one of the user's, for good."""
        if self.name is None:
            return
        uid, gid = self.numbers
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
        os.environ["USER"] = os.environ["LOGNAME"] = self.name

    def make_folder(self, parent: Path) -> Path:
        """A new folder that belongs to the user."""
        folder = tempfile.mkdtemp(dir=parent)
        os.chown(folder, *self.numbers)
        return Path(folder)

    def find_unreadable(self) -> str | None:
        """What of Python and of this repository the user may not read; None: it may read all of it."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self.become()
            places = [os.__file__, importlib.__file__, str(PACKAGE / "cli.py"), str(SHIPPED_LORA)]
            unreadable = [place for place in places if not os.access(place, os.R_OK)]
            os.write(writer, "".join(unreadable[:1]).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as answer:
            text = answer.read().decode()
        os.waitpid(child, 0)
        return text or None


def choose_user(name: str | None) -> User:
    """The user of the commands, checked.

    Args:
        name: as the command line has it; None: `nobody` for root, else whoever started this script.
    """
    is_root = os.geteuid() == 0
    if name is not None and not is_root:
        sys.exit("only root can become another user: leave --user out")
    user = User((name or "nobody") if is_root else None)
    try:
        owner = user.numbers
    except KeyError:
        sys.exit(f"there is no user {user.name}; name one with --user")
    if owner[0] == 0:
        sys.exit("root may write into / and /dev, which some of the paths are: name another user with --user")
    unreadable = user.find_unreadable()
    if unreadable is not None:
        sys.exit(
            f"{user.name} may not read {unreadable}: use a Python and a copy of the repository outside of "
            "root's home, or start this script as another user"
        )
    return user


def try_pair(setting: str, kind: str, parent: Path, home: Path, user: User) -> Attempt:
    """Run the command with one path in one setting, in a folder of its own; `home` is that of all pairs."""
    folder = user.make_folder(parent)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.environ["HOME"] = str(home)
        run_command(setting, kind, folder, user)
    code = wait_for(child)
    text = (folder / LOG).read_text(errors="replace")
    return Attempt(setting, kind, code, text, time.monotonic() - began)


def run_command(setting: str, kind: str, folder: Path, user: User) -> None:
    """Be the command, in a process that ends with it."""
    code = 1
    try:
        os.setsid()
        user.become()
        work = folder / "work"
        work.mkdir()
        arguments = SETTINGS[setting](KINDS[kind](folder))
        descriptor = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), write_through=True)
        sys.stderr = io.TextIOWrapper(
            os.fdopen(2, "wb", closefd=False), errors="backslashreplace", write_through=True
        )
        os.chdir(work)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        sys.argv = ["int8run", *arguments]
        from int8run import cli

        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        # what the command let through is the fault that is looked for
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int) -> int | None:
    """The exit code of a process; None: it was killed, because it did not end."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> int:
    """Exit code 1 when a pair does not pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--all", action="store_true", help="print the pairs that pass, too")
    parser.add_argument("--user", help="who runs the commands when root starts this script (default: nobody)")
    arguments = parser.parse_args()
    user = choose_user(arguments.user)
    for module in IMPORTED_BEFORE:
        importlib.import_module(module)

    tried = failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o711)  # the user has folders of its own in it
        home = user.make_folder(Path(temporary))  # one for all, so that kernels are built once
        for setting in arguments.settings:
            for kind in arguments.kinds:
                attempt = try_pair(setting, kind, Path(temporary), home, user)
                tried += 1
                failed += attempt.problem is not None
                if attempt.problem is not None or arguments.all:
                    print(attempt.describe(), flush=True)
    print(f"{tried} pairs, {failed} do not pass")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
