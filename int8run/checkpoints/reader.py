"""The tensors of a checkpoint, of one safetensors file or of many: names and shapes from the headers, numbers by ranged reads."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch
from torch import Tensor

from int8run.checkpoints.header import DTYPES, read_full_header
from int8run.errors import FileError

INDEX_MARK = (
    ".safetensors.index"  # `x.safetensors.index.json`, and with a variant `x.safetensors.index.fp16.json`
)
SHARD_NAME = re.compile(r"(?P<set>.+)-\d{5}-of-(?P<count>\d{5})(?P<variant>\..+)?")
# names that are looked for in a folder, the first one that is there is taken; diffusers' and transformers' own
USUAL_NAMES = ("diffusion_pytorch_model", "model")
MAX_READ_BYTES = 2**30  # Linux reads no more than 2 GB at a time


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is."""

    key: str
    file: Path
    dtype: str  # the format's word: F32, BF16, I8, F8_E4M3 ...
    shape: tuple[int, ...]
    start: int  # byte in the file
    nbytes: int


class TensorFiles(Mapping[str, TensorInfo]):
    """One checkpoint: keys in the order of their bytes, and reads that leave nothing in memory but what they return.

    Files are opened at the first read and closed by `close`, or by leaving a `with`. Several threads may read.

    Args:
        path: what the user named.
        headers: of each file, its tensors and its metadata.
    """

    def __init__(self, path: Path, headers: Mapping[Path, tuple[Sequence[TensorInfo], Mapping[str, str]]]):
        self.path, self.files = path, tuple(headers)
        self.metadata_of = {file: metadata for file, (_, metadata) in headers.items()}
        self.infos: dict[str, TensorInfo] = {}
        for infos, _ in headers.values():
            for info in infos:
                if info.key in self.infos:
                    raise FileError(
                        f"{path}: {info.key} is in {self.infos[info.key].file.name} and in {info.file.name}; one is too many"
                    )
                self.infos[info.key] = info
        self.handles: dict[Path, FileIO] = {}
        self.lock = Lock()

    @classmethod
    def open(cls, path: Path) -> "TensorFiles":
        """Read the headers of a .safetensors file, of an index.json with its shards, or of a folder with either.

        Raises:
            FileError: nothing there, more than one checkpoint in the folder, a shard that is missing or belongs elsewhere, or a header
                that does not describe its file.
        """
        path = path.expanduser()
        found = choose_checkpoint(path) if path.is_dir() else path
        if found.name.endswith(".json"):
            return cls(path, read_sharded(found))
        shard = SHARD_NAME.fullmatch(found.stem)
        if shard and int(shard["count"]) > 1 and found.is_file():
            if not path.is_dir():
                raise FileError(
                    f"{path} is one of {int(shard['count'])} shards; name their folder or their .index.json"
                )
            return cls(path, {file: read_tensor_infos(file) for file in list_shards(found, shard)})
        return cls(path, {found: read_tensor_infos(found)})

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers say; of a key in several the first file's."""
        return {
            key: value for metadata in reversed(self.metadata_of.values()) for key, value in metadata.items()
        }

    def __getitem__(self, key: str) -> TensorInfo:
        return self.infos[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def read(self, key: str, rows: slice | None = None) -> Tensor:
        """A tensor in its own dtype, or some rows of its first dimension.

        Numbers smaller than a byte (F4, F6) come as bytes, uint8 [rows, bytes of a row].

        Raises:
            FileError: the file ends earlier than its header said, or cannot be read.
            ValueError: for rows that a tensor does not have.
        """
        _, count = self.span(key, rows)
        return self.read_into(key, rows, torch.empty(count, dtype=torch.uint8))

    def read_into(self, key: str, rows: slice | None, buffer: Tensor) -> Tensor:
        """The same without new memory: the result is a view of the beginning of `buffer`, uint8 [at least the bytes of the rows]."""
        start, count = self.span(key, rows)
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() < count:
            raise ValueError(f"{key} takes {count} bytes; the buffer is {buffer.dtype} {list(buffer.shape)}")
        self.fill(self.infos[key].file, start, buffer[:count])
        return view_as_tensor(self.infos[key], rows, buffer[:count])

    def drop(self, key: str, rows: slice | None = None) -> None:
        """Tell the system that these bytes are not needed again, so that a long read does not push out everything else."""
        if hasattr(os, "posix_fadvise"):
            start, count = self.span(key, rows)
            if count:  # 0 would mean: up to the end
                os.posix_fadvise(
                    self.handle(self.infos[key].file).fileno(), start, count, os.POSIX_FADV_DONTNEED
                )

    def span(self, key: str, rows: slice | None) -> tuple[int, int]:
        """First byte in the file, and number of bytes."""
        info = self.infos[key]
        if rows is None:
            return info.start, info.nbytes
        start, stop = resolve_rows(info.key, first_dimension(info.shape), rows)
        row = info.nbytes // max(info.shape[0], 1)
        return info.start + start * row, (stop - start) * row

    def handle(self, file: Path) -> FileIO:
        """The open file."""
        with self.lock:
            if file not in self.handles:
                try:
                    self.handles[file] = FileIO(file)
                except OSError as error:
                    raise FileError(f"{file} cannot be read: {error.strerror or error}") from error
            return self.handles[file]

    def fill(self, file: Path, start: int, buffer: Tensor) -> None:
        """Read the bytes from `start` on into all of `buffer`."""
        handle, view, done = self.handle(file), memoryview(buffer.numpy()), 0  # type: ignore[arg-type] # numpy's stubs do not say so
        while done < len(view):
            part = view[done : done + MAX_READ_BYTES]
            try:
                if hasattr(os, "preadv"):
                    count = os.preadv(handle.fileno(), [part], start + done)
                else:  # Windows
                    with self.lock:
                        handle.seek(start + done)
                        count = handle.readinto(part) or 0
            except OSError as error:
                raise FileError(f"{file} cannot be read: {error.strerror or error}") from error
            if not count:
                raise FileError(
                    f"{file} was cut off or replaced while it was read: it ends before byte {start + len(view)}"
                )
            done += count

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self.lock:
            while self.handles:
                self.handles.popitem()[1].close()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def resolve_rows(key: str, count: int | None, rows: slice | None) -> tuple[int, int]:
    """First row and the one after the last, of a tensor with so many (None: it has no first dimension).

    Raises:
        ValueError: a step, or rows that are not there.
    """
    if rows is None:
        return 0, count or 0
    last = -1 if count is None else count
    start, stop = rows.start or 0, last if rows.stop is None else rows.stop
    if rows.step not in (None, 1) or not 0 <= start <= stop <= last:
        raise ValueError(f"{key} has {count} rows; {rows.start}:{rows.stop}:{rows.step} cannot be read")
    return start, stop


def first_dimension(shape: tuple[int, ...]) -> int | None:
    """The size of the first dimension, if there is one."""
    return shape[0] if shape else None


def view_as_tensor(info: TensorInfo, rows: slice | None, data: Tensor) -> Tensor:
    """Bytes as the numbers that they are. data: uint8 [bytes] -> [rows, ...]."""
    shape = info.shape
    if rows is not None:
        start, stop = resolve_rows(info.key, first_dimension(info.shape), rows)
        shape = (stop - start, *shape[1:])
    bits, word = DTYPES[info.dtype]
    if bits < 8:
        return data.reshape(shape[0] if shape else 1, -1)
    dtype = getattr(torch, word, torch.uint8)  # an older torch without that float gives its bytes
    return data.view(dtype).reshape(shape)


def read_tensor_infos(file: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """What a file holds, in the order of its bytes, and its metadata."""
    entries, metadata, begin = read_full_header(file)
    infos = []
    for key, entry in entries.items():
        start, stop = entry["data_offsets"]
        infos.append(
            TensorInfo(key, file, entry["dtype"], tuple(entry["shape"]), begin + start, stop - start)
        )
    return sorted(infos, key=lambda info: info.start), metadata


def choose_checkpoint(folder: Path) -> Path:
    """The checkpoint in a folder: an index, a file, or the first of the shards that have no index.

    Raises:
        FileError: none, or several of which none has a usual name.
    """
    sets: dict[str, Path] = {}
    for file in sorted(folder.iterdir(), reverse=True):  # an index stands behind its shards and replaces them
        if file.name.startswith("."):  # one that is being written
            continue
        if INDEX_MARK in file.name and file.name.endswith(".json"):
            sets[file.name.removesuffix(".json").replace(INDEX_MARK, "")] = file
        elif file.suffix == ".safetensors":
            shard = SHARD_NAME.fullmatch(file.stem)
            name = shard["set"] + (shard["variant"] or "") if shard else file.stem
            if INDEX_MARK not in sets.get(name, file).name:
                sets[name] = file
    if not sets:
        whole = (folder / "model_index.json").is_file()
        inside = "name the folder of one component in it, such as `transformer`, `unet` or `text_encoder`"
        where = inside if whole else "name a .safetensors file or its folder"
        raise FileError(f"{folder} holds no safetensors file; {where}")
    if len(sets) == 1:
        return next(iter(sets.values()))
    for name in USUAL_NAMES:
        if name in sets:
            return sets[name]
    raise FileError(
        f"{folder} holds {len(sets)} checkpoints ({', '.join(sorted(sets))}); name one of the files"
    )


def list_shards(first: Path, shard: re.Match[str]) -> list[Path]:
    """The shards beside one of them, told by their names alone."""
    count = int(shard["count"])
    files = [
        first.with_name(f"{shard['set']}-{number:05}-of-{count:05}{shard['variant'] or ''}.safetensors")
        for number in range(1, count + 1)
    ]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileError(
            f"{first.parent}: {len(missing)} of {count} shards are missing (first: {missing[0]}); download them again"
        )
    return files


def read_sharded(index: Path) -> dict[Path, tuple[list[TensorInfo], dict[str, str]]]:
    """The shards that an index names, compared with it."""
    if not index.is_file():
        raise FileError(f"{index}: no such file (looked for {index.absolute()})")
    try:
        found = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{index} is no index of shards: {error}") from error
    places = found.get("weight_map") if isinstance(found, dict) else None
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(name, str) for name in places.values())
    ):
        raise FileError(f"{index} is no index of shards: it has no `weight_map` of keys and file names")
    keys: dict[str, set[str]] = defaultdict(set)
    for key, name in places.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FileError(f"{index}: the shard {name!r} is no .safetensors file beside it")
        keys[name].add(key)
    headers = {}
    for name in sorted(keys):
        file = index.with_name(name)
        if not file.is_file():
            raise FileError(
                f"{index}: the shard {name} is missing ({len(keys[name])} tensors are in it); download it again"
            )
        headers[file] = read_tensor_infos(file)
        held = {info.key for info in headers[file][0]}
        if keys[name] - held:
            raise FileError(
                f"{index}: {min(keys[name] - held)} is not in {name}, where the index says; they do not belong together"
            )
        if held - keys[name]:
            raise FileError(
                f"{index}: {min(held - keys[name])} is in {name}, and the index does not say so; they do not belong together"
            )
    return headers
