"""What is kept on disk for the next run: INT8 layers and float pictures, under the hash of all that made them."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from int8run.errors import FileError, check_range

log = logging.getLogger(__name__)
GB = 10**9
HASHES_FILE = "hashes.json"
SUFFIX = ".safetensors"
UNFINISHED_PREFIX = ".unfinished-"  # how the name of a file begins that is being written
ABANDONED_AFTER_SECONDS = 86400  # a process that began to write so long ago was killed


class CachedFile(NamedTuple):
    """One file of the store."""

    path: Path
    bytes: int
    used: float  # time of the last use


@dataclass(frozen=True)
class DiskCache:
    """A folder with a limit; the files that were not used for the longest time go first.

    Args:
        folder: None: `~/.cache/int8run`.
        limit_gb: of all files together; 0: nothing is kept and nothing is looked for.
    """

    folder: str | None = None
    limit_gb: float = 40.0

    def __post_init__(self) -> None:
        check_range("cache.limit_gb", self.limit_gb, 0, 1_000_000)

    @property
    def path(self) -> Path:
        """Where it is."""
        return Path.home() / ".cache" / "int8run" if self.folder is None else Path(self.folder).expanduser()

    def get(self, kind: str, key: str) -> Path | None:
        """The file of a key, which counts as a use."""
        path = self.path / kind / f"{key}{SUFFIX}"
        if not self.limit_gb or not path.is_file():
            return None
        os.utime(path)
        return path

    def put(self, kind: str, key: str, size: int, write: Callable[[Path], object]) -> Path | None:
        """Keep a file of about `size` bytes, and drop old ones for it. Returns None where it has no room.

        Args:
            kind: the folder: `int8`, `float`.
            write: writes the file at the path that it is given.
        """
        limit = self.limit_gb * GB
        if size > limit:
            if limit:
                log.info(
                    "%.1f GB are more than cache.limit_gb=%g allows; not kept for the next run",
                    size / GB,
                    self.limit_gb,
                )
            return None
        path = self.path / kind / f"{key}{SUFFIX}"
        fresh = path.with_name(
            f"{UNFINISHED_PREFIX}{os.getpid()}-{path.name}"
        )  # two processes may make the same
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.make_room(limit - size)
            write(fresh)
            fresh.replace(path)
        except (OSError, FileError) as error:
            log.warning(
                "%s cannot be written (%s); not kept for the next run",
                path,
                getattr(error, "strerror", None) or error,
            )
            return None
        finally:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
        log.info("kept for the next run: %s (%.1f MB)", path, path.stat().st_size / 1e6)
        return path

    def remove(self, path: Path, why: object) -> None:
        """Forget a file that cannot be used."""
        log.warning("%s is not used and removed from the cache: %s", path, why)
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def list_files(self) -> list[CachedFile]:
        """Every file, the longest unused first."""
        found = []
        for path in self.path.glob(f"*/*{SUFFIX}"):
            with suppress(FileNotFoundError):  # another process may clear up at the same time
                facts = path.stat()
                if not path.name.startswith(UNFINISHED_PREFIX):
                    found.append(CachedFile(path, facts.st_size, facts.st_mtime))
                elif facts.st_mtime < time.time() - ABANDONED_AFTER_SECONDS:
                    path.unlink()
        return sorted(found, key=lambda kept: kept.used)

    def make_room(self, limit: float) -> None:
        """Remove the longest unused files until the others are within the limit."""
        kept = self.list_files()
        total = sum(k.bytes for k in kept)
        for path, size, used in kept:
            if total <= limit:
                return
            log.info(
                "cache: %s (%.1f MB, last used %s) makes room",
                path,
                size / 1e6,
                time.strftime("%Y-%m-%d", time.localtime(used)),
            )
            path.unlink(missing_ok=True)
            total -= size

    def hash_file(self, path: Path) -> str:
        """SHA-256 of a file. One that did not change since is not read again: size and times say so."""
        real = path.resolve()
        if real.parent.name == "blobs" and len(real.name) == 64:
            return real.name  # the hub's cache names large files by their SHA-256
        facts = real.stat()
        known = read_hashes(self.path / HASHES_FILE)
        stamp = [facts.st_size, facts.st_mtime_ns, facts.st_ino]
        found = known.get(str(real))
        if found is not None and found[:3] == stamp:
            return str(found[3])
        with real.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self.limit_gb:
            write_hashes(self.path / HASHES_FILE, known | {str(real): [*stamp, digest]})
        return digest


def hash_parts(parts: Iterable[object]) -> str:
    """One name for everything that decides a result."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


def read_hashes(path: Path) -> dict[str, list[object]]:
    """Hashes known so far; a file that cannot be read holds none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return (
        {k: v for k, v in found.items() if isinstance(v, list) and len(v) == 4}
        if isinstance(found, dict)
        else {}
    )


def write_hashes(path: Path, known: dict[str, list[object]]) -> None:
    """Keep them, where that can be."""
    fresh = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(known))
        fresh.replace(path)
    except OSError as error:
        log.debug("%s cannot be written: %s", path, error)
