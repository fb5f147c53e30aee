"""What is kept on disk for the next run: INT8 layers and float images, under a hash of all that made them.

`int8run.pipeline` reads and writes it, the config group `cache` sets its folder and limit, and `task=inspect`
lists it. The cache knows files and sizes, not what is in them. Each file has a hash of its content beside it,
which is checked when the file is asked for.
"""

import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from int8run.errors import FileError, check_range
from int8run.utils.content_hash import (
    describe_damage,
    format_checked_json,
    get_hash_path,
    hash_content,
    read_checked_json,
    remove_with_hash,
)
from int8run.utils.paths import expand_path, get_cache_folder

log = logging.getLogger(__name__)

GB = 10**9
SUFFIX = ".safetensors"
# hashes of model files, which take minutes to compute for large ones
HASHES_FILE = "hashes.json"
# how the name of a file begins while it is being written
UNFINISHED_PREFIX = ".unfinished-"
# a process that began to write a file so long ago was killed
ABANDONED_AFTER_SECONDS = 86400


class CachedFile(NamedTuple):
    """One file of the cache.

    Args:
        path: of the file.
        bytes: its size.
        used: time of its last use, in seconds since 1970.
    """

    path: Path
    bytes: int
    used: float


@dataclass(frozen=True)
class DiskCache:
    """A folder with a size limit; the files that were not used for the longest time go first.

    Args:
        folder: None: `~/.cache/int8run`.
        limit_gb: of all files together; 0: nothing is kept and nothing is looked for.
    """

    folder: str | None = None
    limit_gb: float = 40.0

    def __post_init__(self) -> None:
        check_range("cache.limit_gb", self.limit_gb, 0, 1_000_000)
        if self.folder is not None:
            expand_path(self.folder)  # raises for what can be no path

    @property
    def path(self) -> Path:
        """The folder."""
        if self.folder is None:
            return get_cache_folder()
        return expand_path(self.folder)

    def get(self, kind: str, key: str) -> Path | None:
        """The file of a key, or None; counts as a use of the file. A damaged one is removed, with a warning.

        Args:
            kind: the folder inside the cache: `int8`, `float`.
            key: from `hash_parts`.
        """
        path = self.path / kind / f"{key}{SUFFIX}"
        if not self.limit_gb or not path.is_file():
            return None
        damage = describe_damage(path)
        if damage is not None:
            self.remove(path, damage)
            return None
        os.utime(path)
        return path

    def put(self, kind: str, key: str, size: int, write: Callable[[Path], object]) -> Path | None:
        """Keep a file, and remove old ones to make room for it.

        Args:
            kind: the folder inside the cache: `int8`, `float`.
            key: from `hash_parts`.
            size: about how many bytes the file will have.
            write: writes the file at the path that it is given.

        Returns:
            The file, or None where it is larger than the cache or cannot be written.
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
        # two processes may write the same file at once, each under a name of its own
        unfinished = path.with_name(f"{UNFINISHED_PREFIX}{make_writer_name()}-{path.name}")
        unfinished_hash = get_hash_path(unfinished)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.make_room(limit - size)
            write(unfinished)
            # the hash first: a process that is killed in between leaves an old file that does not match
            unfinished_hash.write_text(hash_content(unfinished))
            unfinished_hash.replace(get_hash_path(path))
            unfinished.replace(path)
        except (OSError, FileError) as error:
            reason = getattr(error, "strerror", None) or error
            log.warning("%s cannot be written (%s); not kept for the next run", path, reason)
            return None
        finally:
            remove_with_hash(unfinished)
        log.info("kept for the next run: %s (%.1f MB)", path, path.stat().st_size / 1e6)
        return path

    def remove(self, path: Path, reason: object) -> None:
        """Remove a file that cannot be used."""
        log.warning("%s is not used and removed from the cache: %s", path, reason)
        remove_with_hash(path)

    def list_files(self) -> list[CachedFile]:
        """Every file, the longest unused first. Removes what killed processes left unfinished."""
        files = []
        for path in self.path.glob(f"*/*{SUFFIX}"):
            with suppress(FileNotFoundError):  # another process may clear up at the same time
                stat = path.stat()
                if not path.name.startswith(UNFINISHED_PREFIX):
                    files.append(CachedFile(path=path, bytes=stat.st_size, used=stat.st_mtime))
                elif stat.st_mtime < time.time() - ABANDONED_AFTER_SECONDS:
                    remove_with_hash(path)
        return sorted(files, key=lambda file: file.used)

    def make_room(self, limit: float) -> None:
        """Remove the longest unused files until the others have at most `limit` bytes."""
        files = self.list_files()
        total = sum(file.bytes for file in files)
        for file in files:
            if total <= limit:
                return
            last_used = time.strftime("%Y-%m-%d", time.localtime(file.used))
            size_mb = file.bytes / 1e6
            log.info("cache: %s (%.1f MB, last used %s) makes room", file.path, size_mb, last_used)
            remove_with_hash(file.path)
            total -= file.bytes

    def hash_file(self, path: Path) -> str:
        """SHA-256 of a file. One whose size and times did not change since is not read again."""
        real = path.resolve()
        if real.parent.name == "blobs" and len(real.name) == 64:
            return real.name  # the cache of huggingface_hub names large files by their SHA-256
        stat = real.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = read_hashes(self.path / HASHES_FILE)
        entry = known.get(str(real))  # stamp and hash
        if entry is not None and entry[:3] == stamp:
            return str(entry[3])
        with real.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self.limit_gb:
            write_hashes(self.path / HASHES_FILE, known | {str(real): [*stamp, digest]})
        return digest


def make_writer_name() -> str:
    """A name that no other writer has.

    A process number alone would not do: containers that share a cache all have a process 1.
    """
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def hash_parts(parts: Iterable[object]) -> str:
    """A key for everything that decides a result: the start of the SHA-256 of all their reprs."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


def read_hashes(path: Path) -> dict[str, list[object]]:
    """The hashes known so far, by path: size, two stamps and the hash.

    A file that cannot be read holds none.
    """
    found = read_checked_json(path)
    return {name: entry for name, entry in found.items() if isinstance(entry, list) and len(entry) == 4}


def write_hashes(path: Path, known: dict[str, list[object]]) -> None:
    """Keep the hashes, where the file can be written."""
    unfinished = path.with_name(f".{make_writer_name()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(format_checked_json(known))
        unfinished.replace(path)
    except OSError as error:
        log.debug("%s cannot be written: %s", path, error)
