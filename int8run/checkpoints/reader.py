"""The tensors of a checkpoint, in one safetensors file or in many shards, or in a GGUF file.

Names and shapes come from the headers; numbers are read by ranges of bytes when asked for, so that a
checkpoint may be larger than the memory. All readers of weights (`detect.py`, `layer.py`, `pipeline`,
`text_encoders`, `export`) stand on `TensorFiles`. Nothing here knows what a tensor is for.
"""

import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch
from torch import Tensor

from int8run.checkpoints.checkpoint_files import (
    SHARD_NAME,
    FileContent,
    TensorInfo,
    choose_checkpoint,
    list_shards,
    read_file_content,
    read_sharded,
)
from int8run.checkpoints.header import (
    DTYPES,
    MAX_TENSORS,
    make_too_many_error,
)
from int8run.errors import FileError
from int8run.utils.paths import expand_path

MAX_READ_BYTES = 2**30  # Linux reads no more than 2 GB at a time


class TensorFiles(Mapping[str, TensorInfo]):
    """One checkpoint: keys in the order of their bytes, and reads that keep nothing in memory.

    Files are opened at the first read and closed by `close`, or by leaving a `with`. Several threads may
    read.

    Args:
        path: what the user named.
        contents: file -> what its header says.
    """

    def __init__(self, path: Path, contents: Mapping[Path, FileContent]):
        self.path = path
        self.files = tuple(contents)
        self.metadata_by_file = {file: content.metadata for file, content in contents.items()}
        self.infos: dict[str, TensorInfo] = {}
        for content in contents.values():
            for info in content.infos:
                if info.key in self.infos:
                    raise FileError(
                        f"{path}: {info.key} is in {self.infos[info.key].file.name} and in {info.file.name}; "
                        "one is too many"
                    )
                self.infos[info.key] = info
        if len(self.infos) > MAX_TENSORS:
            raise make_too_many_error(path, len(self.infos), "tensors", MAX_TENSORS)
        self.open_files: dict[Path, FileIO] = {}
        self.lock = Lock()

    @classmethod
    def open(cls, path: Path) -> "TensorFiles":
        """Read the headers of a .safetensors or .gguf file, of an index.json with its shards, or of a folder.

        Raises:
            FileError: nothing there, more than one checkpoint in the folder, a shard that is missing or
                belongs elsewhere, or a header that does not describe its file.
        """
        path = expand_path(path)
        is_folder = path.is_dir()
        found = choose_checkpoint(path) if is_folder else path
        if found.name.endswith(".json"):
            return cls(path, read_sharded(found))

        shard = SHARD_NAME.fullmatch(found.stem)
        is_one_of_many = shard is not None and int(shard["count"]) > 1 and found.is_file()
        if shard is None or not is_one_of_many:
            return cls(path, {found: read_file_content(found)})
        if not is_folder:
            raise FileError(
                f"{path} is one of {int(shard['count'])} shards; name their folder or their .index.json"
            )
        return cls(path, {file: read_file_content(file) for file in list_shards(found, shard)})

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all headers; where several have a key, the first file's counts."""
        merged: dict[str, str] = {}
        for metadata in reversed(self.metadata_by_file.values()):
            merged.update(metadata)
        return merged

    def __getitem__(self, key: str) -> TensorInfo:
        return self.infos[key]

    def __contains__(self, key: object) -> bool:
        return key in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """Read a tensor in its own dtype, or some rows of its first dimension.

        Numbers smaller than a byte (F4, F6) come as bytes, uint8 [rows, bytes of a row]. Blocks of a GGUF
        file come as the numbers that they stand for, float32.

        Raises:
            FileError: the file ends earlier than its header said, or cannot be read.
            ValueError: for rows that a tensor does not have.
        """
        _, count = self.get_byte_range(key, rows)
        return self.read_into(key, rows, torch.empty(count, dtype=torch.uint8))

    def read_into(self, key: str, rows: slice | None, buffer: Tensor) -> Tensor:
        """Read the same without new memory.

        Args:
            key: of the tensor.
            rows: of its first dimension; None: all.
            buffer: uint8 [at least the bytes of the rows], overwritten.

        Returns:
            A view of the beginning of `buffer`, in the tensor's dtype and shape. What a GGUF file stores in
            another form has memory of its own.
        """
        info = self.infos[key]
        start, count = self.get_byte_range(key, rows)
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() < count:
            raise ValueError(f"{key} takes {count} bytes; the buffer is {buffer.dtype} {list(buffer.shape)}")
        self.read_bytes(info.file, start, buffer[:count])
        if info.form is not None:
            return info.form.decode(buffer[:count], info.shape, resolve_all_rows(info, rows))
        return view_as_tensor(info, rows, buffer[:count])

    def drop_from_page_cache(self, key: str, rows: slice | None = None) -> None:
        """Let the system forget these bytes, so that a long read does not push out everything else."""
        if not hasattr(os, "posix_fadvise"):
            return
        start, count = self.get_byte_range(key, rows)
        if count:  # 0 would mean: up to the end
            descriptor = self.get_handle(self.infos[key].file).fileno()
            os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)

    def get_byte_range(self, key: str, rows: slice | None) -> tuple[int, int]:
        """First byte in the file, and number of bytes, of a tensor or of some of its rows."""
        info = self.infos[key]
        if rows is None:
            return info.start, info.nbytes
        if info.form is not None:
            offset, count = info.form.find_bytes(info.shape, resolve_all_rows(info, rows))
            return info.start + offset, count
        start, stop = resolve_rows(info.key, get_row_count(info.shape), rows)
        row_bytes = info.nbytes // max(info.shape[0], 1)
        return info.start + start * row_bytes, (stop - start) * row_bytes

    def get_handle(self, file: Path) -> FileIO:
        """The open file; opened where it is not yet."""
        with self.lock:
            if file not in self.open_files:
                try:
                    self.open_files[file] = FileIO(file)
                except OSError as error:
                    raise FileError(f"{file} cannot be read: {error.strerror or error}") from error
            return self.open_files[file]

    def read_bytes(self, file: Path, start: int, buffer: Tensor) -> None:
        """Fill `buffer`, uint8 [bytes], with the bytes of a file from `start` on.

        Raises:
            FileError: the file cannot be read, or ends before the buffer is full.
        """
        handle = self.get_handle(file)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type] # numpy's stubs do not say so
        done = 0
        while done < len(view):
            part = view[done : done + MAX_READ_BYTES]
            try:
                count = self._read_part(handle, start + done, part)
            except OSError as error:
                raise FileError(f"{file} cannot be read: {error.strerror or error}") from error
            if not count:
                raise FileError(
                    f"{file} was cut off or replaced while it was read: it ends before byte "
                    f"{start + len(view)}"
                )
            done += count

    def _read_part(self, handle: FileIO, start: int, part: memoryview) -> int:
        """Read once, perhaps less than asked for. Returns the number of bytes; 0 at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(handle.fileno(), [part], start)
        with self.lock:  # Windows: the position belongs to the file, not to the call
            handle.seek(start)
            return handle.readinto(part) or 0

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self.lock:
            while self.open_files:
                self.open_files.popitem()[1].close()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def resolve_rows(key: str, count: int | None, rows: slice | None) -> tuple[int, int]:
    """First row and the one after the last.

    Args:
        key: of the tensor, for the error.
        count: how many rows the tensor has; None: it has no first dimension.
        rows: which ones; None: all.

    Raises:
        ValueError: a step, or rows that are not there.
    """
    if rows is None:
        return 0, count or 0
    last = -1 if count is None else count  # so that nothing fits where there is no first dimension
    start = rows.start or 0
    stop = last if rows.stop is None else rows.stop
    is_range = rows.step in (None, 1) and 0 <= start <= stop <= last
    if not is_range:
        raise ValueError(f"{key} has {count} rows; {rows.start}:{rows.stop}:{rows.step} cannot be read")
    return start, stop


def resolve_all_rows(info: TensorInfo, rows: slice | None) -> tuple[int, int]:
    """First row and the one after the last; of all rows a single number is one. Raises as `resolve_rows`."""
    if rows is None:
        return 0, info.shape[0] if info.shape else 1
    return resolve_rows(info.key, get_row_count(info.shape), rows)


def get_row_count(shape: tuple[int, ...]) -> int | None:
    """The size of the first dimension, if there is one."""
    return shape[0] if shape else None


def view_as_tensor(info: TensorInfo, rows: slice | None, data: Tensor) -> Tensor:
    """View bytes as the numbers that they are. data: uint8 [bytes] -> [rows, ...]."""
    shape = info.shape
    if rows is not None:
        start, stop = resolve_rows(info.key, get_row_count(info.shape), rows)
        shape = (stop - start, *shape[1:])
    dtype = DTYPES[info.dtype]
    if dtype.bits < 8:
        num_rows = shape[0] if shape else 1
        return data.reshape(num_rows, -1)
    # an older torch that lacks a float gives its bytes
    torch_dtype = getattr(torch, dtype.torch_name, torch.uint8)
    return data.view(torch_dtype).reshape(shape)
