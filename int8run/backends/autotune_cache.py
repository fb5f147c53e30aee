"""What was measured on this machine, kept in a small file, so that the same config gives the same result the next time."""

import importlib.metadata
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from int8run.utils.hardware import get_device_name

log = logging.getLogger(__name__)


def default_cache_path() -> Path:
    """Where measured choices are kept when the config names no file."""
    return Path.home() / ".cache" / "int8run" / "backend_choices.json"


class AutotuneCache:
    """Choices for one device, each under what was asked: which backend, which tile, up to how many rows float is faster.

    Args:
        dtype: of the float model, where the answer depends on it.

    Entries of other devices, drivers and versions stay in the file and are not seen.
    """

    def __init__(self, path: Path | None, device: torch.device, dtype: torch.dtype | None = None):
        self.path = path or default_cache_path()
        self.environment = " | ".join(
            [
                get_device_name(device),
                *library_versions(device),
                *([str(dtype).removeprefix("torch.")] if dtype else []),
            ]
        )
        self.entries = read_entries(self.path)
        self.is_writable = True

    def get(self, question: str) -> str | None:
        """The answer found before, or None."""
        return self.entries.get(f"{self.environment} | {question}")

    def put(self, question: str, answer: str) -> None:
        """Keep an answer, here and in the file. Written whole to a new name and moved, so that a reader never sees half a file."""
        key = f"{self.environment} | {question}"
        self.entries[key] = answer
        fresh = self.path.with_suffix(f".{time.time_ns()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(
                f"{self.path}.lock"
            ):  # jobs of one sweep in several processes keep each other's answers
                fresh.write_text(
                    json.dumps({**read_entries(self.path), key: answer}, indent=1, sort_keys=True)
                )
                fresh.replace(self.path)
        except OSError as error:
            if self.is_writable:
                log.warning(
                    "measured choices cannot be kept in %s (%s); every run measures anew",
                    self.path,
                    error.strerror,
                )
            self.is_writable = False


def library_versions(device: torch.device) -> list[str]:
    """Versions that a measured choice depends on: int8run, torch and, on a GPU, CUDA and its driver."""
    stamp = [f"int8run {importlib.metadata.version('int8run')}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        runtime: Any = torch._C  # typed by builds with CUDA only
        stamp.append(f"CUDA {torch.version.cuda}, driver {runtime._cuda_getDriverVersion()}")
    return stamp


def read_entries(path: Path) -> dict[str, str]:
    """Choices made before; an unreadable table counts as empty and is written anew."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
