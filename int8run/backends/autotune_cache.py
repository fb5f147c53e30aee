"""What was measured on this machine, kept in a small JSON file.

The next run with the same config finds the same choices in it. `backend=auto`, the Triton backend's tiles and
the costs of outlier methods and LoRA branches share one file; each brings keys of its own.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from int8run import __version__
from int8run.backends.base import Backend
from int8run.utils.content_hash import format_checked_json, read_checked_json
from int8run.utils.hardware import get_device_name
from int8run.utils.paths import check_replaceable, expand_path, get_cache_folder

log = logging.getLogger(__name__)
LOCK_TIMEOUT_S = 10.0  # writing takes another process milliseconds


def default_cache_path() -> Path:
    """Where measured choices are kept when the config names no file."""
    return get_cache_folder() / "backend_choices.json"


class AutotuneCache:
    """Measured choices for one device: which backend, which tile, up to how many rows float is faster.

    Entries of other devices, drivers and versions stay in the file and are not read.

    Args:
        path: the file; None: the one in the user's cache.
        device: what was measured.
        dtype: of the float model, where the choice depends on it.
    """

    def __init__(self, path: Path | None, device: torch.device, dtype: torch.dtype | None = None):
        self.path = default_cache_path() if path is None else expand_path(path)
        self.environment = describe_environment(device, dtype)
        self.entries = read_entries(self.path)
        self.is_writable = True

    def get(self, key: str) -> str | None:
        """The value found before, or None."""
        return self.entries.get(f"{self.environment} | {key}")

    def put(self, key: str, value: str) -> str:
        """Keep a value, here and in the file; a file that cannot be written is reported once.

        Returns:
            The value that counts: that of another process which measured the same since the file was read.
        """
        full_key = f"{self.environment} | {key}"
        is_known = full_key in self.entries
        self.entries[full_key] = value
        if not self.is_writable:
            return value  # each further attempt could wait for the lock again
        try:
            self.entries[full_key] = self._write_entry(full_key, value, replaces=is_known)
        except OSError as error:
            self.is_writable = False
            log.warning(
                "measured choices cannot be kept in %s (%s); every run measures anew",
                self.path,
                error.strerror or error,
            )
        return self.entries[full_key]

    def _write_entry(self, full_key: str, value: str, *, replaces: bool) -> str:
        """Add an entry to the file, which may have got others since it was read.

        Args:
            full_key: of the entry.
            value: of the entry.
            replaces: whether it takes the place of an entry that is there.

        Returns:
            The value that the file has.
        """
        check_replaceable(self.path)
        # written whole under another name and moved, so that a reader never sees half a file
        unfinished = self.path.with_suffix(f".{time.time_ns()}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # several jobs of a sweep may write at once: each keeps the entries of the others
        with FileLock(f"{self.path}.lock", timeout=LOCK_TIMEOUT_S):
            entries = read_entries(self.path)
            if full_key in entries and not replaces:
                return entries[full_key]
            entries[full_key] = value
            unfinished.write_text(format_checked_json(entries))
            unfinished.replace(self.path)
        return value


def open_cache_of(backend: Backend, device: torch.device, dtype: torch.dtype) -> AutotuneCache:
    """The choices in the file that a backend of the config names; of one that names none in the user's own.

    Args:
        backend: of the config.
        device: what is measured.
        dtype: of the float model.
    """
    table = getattr(backend, "table", None)
    path = expand_path(table) if table else None
    return AutotuneCache(path, device, dtype)


def parse_ratio(text: str | None) -> float | None:
    """A ratio out of the cache; a file that somebody edited may hold anything."""
    try:
        ratio = float(text or "")
    except ValueError:
        return None
    return ratio if 0 < ratio < math.inf else None


def describe_environment(device: torch.device, dtype: torch.dtype | None) -> str:
    """What a measured choice depends on, as the first part of its key: device, versions and dtype."""
    parts = [get_device_name(device), *library_versions(device)]
    if dtype is not None:
        parts.append(str(dtype).removeprefix("torch."))
    return " | ".join(parts)


def library_versions(device: torch.device) -> list[str]:
    """The versions of int8run, torch and, on a GPU, its runtime and its driver."""
    versions = [f"int8run {__version__}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        runtime: Any = torch._C  # typed by builds with CUDA only
        name = "CUDA" if torch.version.hip is None else "HIP"
        version = torch.version.cuda if torch.version.hip is None else torch.version.hip
        versions.append(f"{name} {version}, driver {runtime._cuda_getDriverVersion()}")
    if device.type == "xpu":
        driver = torch.xpu.get_device_properties(device).driver_version
        versions.append(f"SYCL {torch.version.xpu}, driver {driver}")
    return versions


def read_entries(path: Path) -> dict[str, str]:
    """The entries of a file; one that cannot be read, or is damaged, counts as empty and is written anew."""
    found = read_checked_json(path)
    return {key: value for key, value in found.items() if isinstance(value, str)}
