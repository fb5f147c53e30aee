"""Small disks in memory (tmpfs) for the faults of a disk. Only root can mount one."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox import check_that


def require_root(purpose: str) -> None:
    """Raise LostError unless this process may mount."""
    check_that(os.getuid() == 0, f"only root can {purpose}; --only names the faults that go without")


@contextmanager
def mount_small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a disk of its own at a new folder; the yielded function gives it so many kilobytes."""
    require_root("mount a small disk")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=True)

    def resize(kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def mount_with(folder: Path, option: str) -> Iterator[None]:
    """Mount a disk of 50 MB at a new folder, with an option of `mount` such as `ro`."""
    require_root("mount a disk")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=50m,{option}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        # lazily: a process of the command may still have a file open
        subprocess.run(["umount", "-l", folder], check=True)
