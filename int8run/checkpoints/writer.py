"""Writing a safetensors file piece by piece: all sizes are known before the first byte, nothing is kept in memory.

The file is written under a temporary name in its own folder and renamed when it is whole, so that nobody ever meets half a file. A
process that is killed leaves its temporary file behind; the next one that writes into that folder removes it.
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

import torch
from torch import Tensor

from int8run.checkpoints.header import DTYPES, MAX_HEADER_BYTES
from int8run.errors import FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TensorEntry = tuple[str, str, tuple[int, ...]]  # key, dtype in safetensors' words, shape
PART_NAME = ".int8run-{}.part"  # a file that is not whole yet; filled with the process and a number
FLUSH_BYTES = (
    64 * 2**20
)  # after so many, the system is told to bring them to the disk, so that the end has little to wait for


class StreamWriter:
    """One safetensors file that is being written. Used as a context manager: left without `finish`, it removes what it wrote.

    Tensors may be written in any order and each in any number of pieces. In the file they lie by falling size of their numbers, so
    that each starts at a multiple of it, which readers that map the file need.

    Args:
        path: the file to be; its folder is made. One that is there is replaced at the end.
        entries: key, dtype and shape of every tensor.
        metadata: texts for the header.

    Raises:
        FileError: the folder cannot be written to or has not enough space, or the header is larger than the format allows.
        ValueError: for a key given twice.
    """

    def __init__(self, path: Path, entries: Iterable[TensorEntry], metadata: Mapping[str, str]):
        self.path = path
        ordered = sorted(entries, key=lambda entry: -count_bytes(entry[1], ()))
        header, self.places = plan_layout(ordered, metadata, path)
        self.nbytes = len(header) + sum(stop - start for start, stop in self.places.values())
        self.written = dict.fromkeys(self.places, 0)
        self.unsent = 0
        self.finished = False
        if path.is_dir():
            raise FileError(f"{path} cannot be written: it is a folder; name a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            free = shutil.disk_usage(path.parent).free
            if self.nbytes > free:
                raise FileError(
                    f"{path} needs {self.nbytes} bytes ({self.nbytes / 1e9:.2f} GB), {path.parent} has {free} free ({free / 1e9:.2f} GB); "
                    "make room or choose another folder"
                )
            self.part, self.descriptor = create_part_file(path.parent)
        except OSError as error:
            raise make_write_error(path, error) from error
        try:
            self._put(header, 0)
        except FileError:
            self.abandon()
            raise

    def write(self, key: str, data: Tensor | bytes | memoryview) -> None:
        """The next bytes of one tensor, which follow those written before. A tensor of any dtype is taken as its bytes.

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
        self._put(view, offset)
        self.written[key] += len(view)

    def finish(self) -> Path:
        """Bring everything to the disk and give the file its name.

        Raises:
            FileError: when the disk refuses.
            ValueError: when a tensor is not whole.
        """
        missing = [key for key, (start, stop) in self.places.items() if self.written[key] != stop - start]
        if missing:
            raise ValueError(f"{len(missing)} tensors are not whole (first: {missing[0]})")
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
        if not self.finished:
            self.finished = True
            with suppress(OSError):  # the first error is the one to tell
                self.part.unlink(missing_ok=True)
            with suppress(OSError):
                os.close(self.descriptor)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        try:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            while view:  # a call writes 2 GB at most
                view = view[os.write(self.descriptor, view) :]
            self.unsent += len(data)
            if self.unsent >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
                # written pages go to the disk, and those that are there are forgotten: nobody reads them again here
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
    """The first bytes of the file, and where each tensor starts and stops in it."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    sizes: dict[str, tuple[int, int]] = {}
    end = 0
    for key, dtype, shape in entries:
        if key in sizes:
            raise ValueError(f"{key} is given twice")
        start, end = end, end + count_bytes(dtype, shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        sizes[key] = (start, end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise FileError(f"{path}: its header would have {len(text)} bytes; readers take {MAX_HEADER_BYTES}")
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        key: (first + start, first + stop) for key, (start, stop) in sizes.items()
    }


def count_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Of a tensor of that dtype, in safetensors' word, and shape."""
    return DTYPES[dtype][0] * prod(shape) // 8


def view_as_bytes(data: Tensor | bytes | memoryview) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    if isinstance(data, Tensor):
        return data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return memoryview(data).cast("B")


def create_part_file(folder: Path) -> tuple[Path, int]:
    """A new locked temporary file, with the permissions that any new file gets.

    Raises:
        OSError: when it cannot be made.
    """
    while True:
        part = folder / PART_NAME.format(f"{os.getpid()}-{time.time_ns()}")
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        if not acquire_lock(descriptor, wait=True) or os.path.exists(part):
            return part, descriptor
        os.close(descriptor)  # another process took it for a leftover in the moment before it was locked


def acquire_lock(descriptor: int, wait: bool = False) -> bool:
    """Whether this process has the file's lock now; where there are no locks, nobody has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left: temporary files of ours that nobody has locked. A process's locks end with it.

    Where there are no locks, nothing is removed.
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
    """Make a rename outlive a power cut, where a folder can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_write_error(path: Path, error: OSError) -> FileError:
    """The error for a place that cannot be written to, or not any more."""
    return FileError(
        f"{path} cannot be written: {error.strerror or error}; make room, or choose a folder that you may write to"
    )
