"""Write a safetensors file piece by piece; only the sizes must be known before the first byte.

Nothing is kept in memory. The file is written under a temporary name in its own folder and renamed when it is
complete, so that nobody ever reads half a file. A process that is killed leaves its temporary file behind;
the next one that writes into that folder removes it. Used by `export` and the tasks that quantize files;
knows nothing about what the tensors are.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from int8run.checkpoints.data_hash import PLACEHOLDER, join_hashes
from int8run.checkpoints.header import DTYPES, MAX_HEADER_BYTES
from int8run.errors import FileError
from int8run.utils.content_hash import new_hash
from int8run.utils.plurals import count_noun

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PART_NAME = ".int8run-{}.part"  # a file that is not complete yet; filled with the process and a number
# after so many bytes, the system is told to bring them to the disk, so that the end has little to wait for
FLUSH_BYTES = 64 * 2**20


class TensorEntry(NamedTuple):
    """One tensor of a file that will be written."""

    key: str
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]


class StreamWriter:
    """One safetensors file that is being written.

    A context manager: left without `finish`, it removes what it wrote.

    Where the metadata holds the placeholder of `data_hash`, the hash of the tensors takes its place.

    Tensors may be written in any order and each in any number of pieces. In the file they are sorted by
    falling size of their numbers, so that each starts at a multiple of that size, which readers that map the
    file need.

    Args:
        path: of the complete file; its folder is created. A file that is there is replaced at the end.
        entries: every tensor of the file.
        metadata: texts for the header.

    Raises:
        FileError: the folder cannot be written to or has not enough space, or the header is larger than the
            format allows.
        ValueError: for a key given twice.
    """

    def __init__(self, path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str]):
        self.path = path
        largest_numbers_first = sorted(entries, key=lambda entry: -count_bytes(entry.dtype, ()))
        header, self.places = plan_layout(largest_numbers_first, metadata, path)
        self.nbytes = len(header) + sum(stop - start for start, stop in self.places.values())
        self.written = dict.fromkeys(self.places, 0)  # key -> bytes
        self.entries = largest_numbers_first
        # where the hash of the tensors goes, and key -> that of its bytes so far; -1: nobody asked for it
        self.hash_offset = header.find(PLACEHOLDER.encode())
        self.hashes = {key: new_hash() for key in self.places} if self.hash_offset >= 0 else {}
        self.unsent = 0  # bytes that the system may still hold in memory
        self.finished = False

        if path.is_dir():
            raise FileError(f"{path} cannot be written: it is a folder; name a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            check_free_space(path, self.nbytes)
            self.part, self.descriptor = create_part_file(path.parent)
        except OSError as error:
            raise make_write_error(path, error) from error
        try:
            self._write_at(0, header)
        except FileError:
            self.abandon()
            raise

    def write(self, key: str, data: Tensor | bytes | memoryview) -> None:
        """Append bytes to one tensor. A tensor of any dtype is taken as its bytes.

        Raises:
            FileError: when the disk refuses them.
            ValueError: for more bytes than the tensor has.
        """
        view = view_as_bytes(data)
        start, stop = self.places[key]
        offset = start + self.written[key]
        if offset + len(view) > stop:
            raise ValueError(
                f"{key} has {stop - start} bytes; {self.written[key]} were written and {len(view)} more came"
            )
        self._write_at(offset, view)
        self.written[key] += len(view)
        if key in self.hashes:
            self.hashes[key].update(view)

    def finish(self) -> Path:
        """Bring everything to the disk and give the file its name.

        Raises:
            FileError: when the disk refuses.
            ValueError: when a tensor is not complete.
        """
        missing = [key for key, (start, stop) in self.places.items() if self.written[key] != stop - start]
        if missing:
            raise ValueError(
                f"{count_noun(len(missing), 'tensor', 'are')} not complete (first: {missing[0]})"
            )
        if self.hashes:
            data_hash = join_hashes(
                (entry.key, entry.dtype, entry.shape, self.hashes[entry.key].digest())
                for entry in self.entries
            )
            self._write_at(self.hash_offset, data_hash.encode())
        try:
            os.fsync(self.descriptor)
            # while it is still locked: a part whose lock is free may be removed by anybody
            self.part.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise make_write_error(self.path, error) from error
        self.finished = True
        os.close(self.descriptor)
        return self.path

    def abandon(self) -> None:
        """Remove what was written; after `finish` nothing."""
        if self.finished:
            return
        self.finished = True
        with suppress(OSError):  # the first error is the one to report
            self.part.unlink(missing_ok=True)
        with suppress(OSError):
            os.close(self.descriptor)

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        remaining = memoryview(data)
        try:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            while remaining:  # a call writes 2 GB at most
                count = os.write(self.descriptor, remaining)
                remaining = remaining[count:]
            self.unsent += len(data)
            if self.unsent >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
                # written pages go to the disk, and those that are there are forgotten: nobody reads them
                # again here
                os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                self.unsent = 0
        except OSError as error:
            raise make_write_error(self.path, error) from error

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()


def plan_layout(
    entries: Iterable[TensorEntry], metadata: Mapping[str, str], path: Path
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Lay out a file.

    Args:
        entries: every tensor, in the order of the file.
        metadata: texts for the header.
        path: of the file, for the error.

    Returns:
        The bytes before the data, and for each key where its tensor starts and stops in the file.

    Raises:
        FileError: for a header that is larger than readers take.
        ValueError: for a key given twice.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for key, dtype, shape in entries:
        if key in offsets:
            raise ValueError(f"{key} is given twice")
        start, end = end, end + count_bytes(dtype, shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        offsets[key] = (start, end)

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    if len(text) > MAX_HEADER_BYTES:
        raise FileError(f"{path}: its header would have {len(text)} bytes; readers take {MAX_HEADER_BYTES}")
    length = len(text).to_bytes(8, "little")
    data_start = len(length) + len(text)
    places = {key: (data_start + start, data_start + stop) for key, (start, stop) in offsets.items()}
    return length + text, places


def count_bytes(dtype: str, shape: Sequence[int]) -> int:
    """How many bytes a tensor takes, of a dtype by safetensors' name."""
    return DTYPES[dtype].bits * prod(shape) // 8


def view_as_bytes(data: Tensor | bytes | memoryview) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    if isinstance(data, Tensor):
        return data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return memoryview(data).cast("B")


def check_free_space(path: Path, nbytes: int) -> None:
    """Raise FileError when the folder of a file has less space than the file needs."""
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise FileError(
            f"{path} needs {nbytes} bytes ({nbytes / 1e9:.2f} GB), {path.parent} has {free} free "
            f"({free / 1e9:.2f} GB); make room or choose another folder"
        )


def create_part_file(folder: Path) -> tuple[Path, int]:
    """Create and lock a temporary file, with the permissions that any new file gets.

    Returns:
        Its path and its descriptor.

    Raises:
        OSError: when it cannot be created.
    """
    while True:
        part = folder / PART_NAME.format(f"{os.getpid()}-{time.time_ns()}")
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        if not acquire_lock(descriptor, wait=True) or os.path.exists(part):
            return part, descriptor
        os.close(descriptor)  # another process took it for a leftover in the moment before it was locked


def acquire_lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file for this process.

    Args:
        descriptor: of the file.
        wait: for another process that holds the lock.

    Returns:
        Whether this process has the lock now; never where the system has no locks.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left: temporary files of ours that nobody has locked.

    The locks of a process end with it. Where the system has no locks, nothing is removed.
    """
    for part in folder.glob(PART_NAME.format("*")):
        with suppress(OSError):
            descriptor = os.open(part, os.O_RDWR)
            try:
                if acquire_lock(descriptor):
                    part.unlink()
            finally:
                os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where a folder can be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_write_error(path: Path, error: OSError) -> FileError:
    """The error for a place that cannot be written to, or not any more."""
    return FileError(
        f"{path} cannot be written: {error.strerror or error}; make room, or choose a folder that you may "
        "write to"
    )
