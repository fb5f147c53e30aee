"""The `int8run` command inside the test's process: no new interpreter, no state left for the next test."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from int8run import cli
from int8run.utils.disk_cache import DiskCache


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The message after `int8run: `, to the end of the error stream. There is exactly one, and no
        traceback.
        """
        assert "Traceback" not in self.out + self.err, self.err
        found = re.findall(r"(?:\A|\n)int8run: (.*)\Z", self.err, flags=re.DOTALL)
        assert len(found) == 1 and "\nint8run: " not in found[0], f"no single message in {self.err!r}"
        return found[0].removesuffix("\n")


class Command:
    """Runs `int8run` with arguments, in the test's own folder."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str] | None
    ):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def __call__(self, *arguments: str) -> Outcome:
        self.monkeypatch.setattr(sys, "argv", ["int8run", *arguments])
        self.read_printed()
        GlobalHydra.instance().clear()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *self.read_printed())

    def read_printed(self) -> tuple[str, str]:
        """What was printed since the last time, to both streams; nothing where nobody captures it."""
        if self.capsys is None:
            return "", ""
        out, err = self.capsys.readouterr()
        return out, err

    def made(self) -> list[str]:
        """Every file and folder that there is now in the command's folder."""
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*"))


@contextmanager
def command_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str] | None
) -> Iterator[Command]:
    """A command whose working folder is `folder`; environment, logging and hydra's singletons are put back.

    Args:
        folder: made where it is absent.
        monkeypatch: undone by its owner.
        capsys: what the command prints; None in a fixture that several tests share.
    """
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    cache = (
        folder.parent / f"{folder.name}-cache"
    )  # where commands keep things for each other, in place of the user's own
    monkeypatch.setattr(
        DiskCache,
        "path",
        property(lambda self: cache if self.folder is None else Path(self.folder).expanduser()),
    )
    for name in ("INT8RUN_DEBUG", "HYDRA_FULL_ERROR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    config = HydraConfig.instance().cfg
    try:
        yield Command(folder, monkeypatch, capsys)
    finally:
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = config
        for handler in [h for h in root.handlers if h not in handlers]:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)
