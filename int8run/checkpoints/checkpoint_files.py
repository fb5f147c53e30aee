"""The files of one checkpoint, single or in shards, and what their headers say of the tensors in them.

`reader` asks for them. No tensor is read here; every fault of an index or a set of shards is an error.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from int8run.checkpoints.gguf_blocks import StoredForm
from int8run.checkpoints.gguf_files import read_gguf_content
from int8run.checkpoints.gguf_header import begins_like_gguf
from int8run.checkpoints.header import (
    MAX_HEADER_BYTES,
    MAX_NAME_CHARS,
    MAX_TENSORS,
    make_too_many_error,
    read_full_header,
)
from int8run.errors import FileError
from int8run.utils.paths import GGUF, SAFETENSORS
from int8run.utils.plurals import count_noun
from int8run.utils.untrusted_json import parse_untrusted_json

# `x.safetensors.index.json`, and with a variant `x.safetensors.index.fp16.json`
INDEX_MARK = ".safetensors.index"
SHARD_NAME = re.compile(r"(?P<set>.+)-\d{5}-of-(?P<count>\d{5})(?P<variant>\..+)?")
# names that are looked for in a folder, the first that is found is taken; diffusers' and transformers' own
USUAL_NAMES = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is.

    Args:
        key: its name.
        file: that it is in.
        dtype: of what is read, by safetensors' name: F32, BF16, I8, F8_E4M3 ...
        shape: rows first.
        start: byte in the file.
        nbytes: how many bytes it takes there.
        form: how a GGUF file stores it; None: its numbers lie row by row.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    form: StoredForm | None = None

    @property
    def has_blocks(self) -> bool:
        """Whether it is stored in blocks of a few bits, as in GGUF files."""
        return self.form is not None and self.form.block is not None


@dataclass(frozen=True)
class FileContent:
    """What the header of one file says."""

    infos: tuple[TensorInfo, ...]  # in the order of their bytes
    metadata: Mapping[str, str]


def read_file_content(file: Path) -> FileContent:
    """Read what a file holds, and its metadata, from its header: of a safetensors or a GGUF file."""
    if file.suffix.lower() == GGUF or begins_like_gguf(file):
        return read_gguf_file_content(file)
    header = read_full_header(file)
    infos = []
    for key, entry in header.entries.items():
        start, stop = entry["data_offsets"]
        info = TensorInfo(
            key=key,
            file=file,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=header.data_start + start,
            nbytes=stop - start,
        )
        infos.append(info)
    return FileContent(tuple(sorted(infos, key=lambda info: info.start)), header.metadata)


def read_gguf_file_content(file: Path) -> FileContent:
    """Read the same of a GGUF file."""
    if not file.is_file():
        raise FileError(f"{file}: no such file (looked for {file.absolute()})")
    content = read_gguf_content(file)
    infos = [
        TensorInfo(
            key=tensor.key,
            file=file,
            dtype=tensor.dtype,
            shape=tensor.stored.shape,
            start=tensor.stored.start,
            nbytes=tensor.stored.nbytes,
            form=tensor.form,
        )
        for tensor in content.tensors
    ]
    return FileContent(tuple(infos), content.metadata)


def choose_checkpoint(folder: Path) -> Path:
    """The checkpoint in a folder: an index, a file, or the first of the shards that have no index.

    Raises:
        FileError: none, or several of which none has a usual name.
    """
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        hint = "name a .safetensors file or its folder"
        gguf = next((file for file in sorted(folder.iterdir()) if file.suffix.lower() == GGUF), None)
        if gguf is not None:
            hint = f"name its GGUF file, {gguf}"
        if (folder / "model_index.json").is_file():
            hint = "name the folder of one component in it, such as `transformer`, `unet` or `text_encoder`"
        raise FileError(f"{folder} holds no safetensors file; {hint}")
    if len(checkpoints) == 1:
        return next(iter(checkpoints.values()))
    for name in USUAL_NAMES:
        if name in checkpoints:
            return checkpoints[name]
    names = ", ".join(sorted(checkpoints))
    raise FileError(f"{folder} holds {len(checkpoints)} checkpoints ({names}); name one of the files")


def find_checkpoints(folder: Path) -> dict[str, Path]:
    """Name without shard number -> the index, the file or the first shard of each checkpoint in a folder."""
    files: dict[str, Path] = {}
    indexes: dict[str, Path] = {}
    for file in sorted(folder.iterdir(), reverse=True):  # so that the first shard replaces the others
        if file.name.startswith("."):  # one that is being written
            continue
        if INDEX_MARK in file.name and file.name.endswith(".json"):
            name = file.name.removesuffix(".json").replace(INDEX_MARK, "")
            indexes[name] = file
        elif file.suffix == SAFETENSORS:
            files[name_checkpoint(file)] = file
    return files | indexes


def name_checkpoint(file: Path) -> str:
    """The name of the checkpoint that a file is, or is a shard of: without the number of the shard."""
    shard = SHARD_NAME.fullmatch(file.stem)
    if shard is None:
        return file.stem
    return shard["set"] + (shard["variant"] or "")


def list_shards(first: Path, shard: re.Match[str]) -> list[Path]:
    """The shards beside one of them, found by their names alone.

    Args:
        first: any of the shards.
        shard: its name, matched by SHARD_NAME.

    Raises:
        FileError: when one of them is missing.
    """
    count, variant = int(shard["count"]), shard["variant"] or ""
    files = [
        first.with_name(f"{shard['set']}-{number:05}-of-{count:05}{variant}.safetensors")
        for number in range(1, count + 1)
    ]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileError(
            f"{first.parent}: {len(missing)} of {count} shards are missing (first: {missing[0]}); download "
            "them again"
        )
    return files


def read_sharded(index: Path) -> dict[Path, FileContent]:
    """Read the headers of the shards that an index names, and compare them with it.

    Raises:
        FileError: the file is not an index, a shard is missing, or holds other tensors than the index says.
    """
    keys_by_shard: dict[str, set[str]] = defaultdict(set)
    for key, name in read_weight_map(index).items():
        if Path(name).name != name or not name.endswith(SAFETENSORS):
            raise FileError(f"{index}: the shard {name!r} is not a .safetensors file beside it")
        keys_by_shard[name].add(key)

    contents = {}
    for name, keys in sorted(keys_by_shard.items()):
        file = index.with_name(name)
        if not file.is_file():
            content = count_noun(len(keys), "tensor", "are")
            raise FileError(f"{index}: the shard {name} is missing ({content} in it); download it again")
        contents[file] = read_file_content(file)
        found = {info.key for info in contents[file].infos}
        if keys - found:
            raise FileError(
                f"{index}: {min(keys - found)} is not in {name}, where the index says; they do not belong "
                "together"
            )
        if found - keys:
            raise FileError(
                f"{index}: {min(found - keys)} is in {name}, and the index does not say so; "
                "they do not belong together"
            )
    return contents


def read_weight_map(index: Path) -> dict[str, str]:
    """Read key -> name of the shard that holds it, out of an index.

    Raises:
        FileError: the file is missing, or is not an index.
    """
    if not index.is_file():
        raise FileError(f"{index}: no such file (looked for {index.absolute()})")
    try:
        with index.open("rb") as file:
            text = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        raise FileError(f"{index} cannot be read: {error.strerror or error}") from error
    if len(text) > MAX_HEADER_BYTES:
        raise FileError(
            f"{index} is not an index of shards: it has over {MAX_HEADER_BYTES} bytes, which is the limit"
        )
    try:
        found = parse_untrusted_json(text)
    except ValueError as error:
        raise FileError(f"{index} is not an index of shards: it {error}") from error
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not weight_map or not is_weight_map(weight_map):
        raise FileError(f"{index} is not an index of shards: it has no `weight_map` of keys and file names")
    if len(weight_map) > MAX_TENSORS:
        raise make_too_many_error(index, len(weight_map), "tensors", MAX_TENSORS)
    names_by_key: dict[str, str] = weight_map
    longest = max((*names_by_key, *names_by_key.values()), key=len)
    if len(longest) > MAX_NAME_CHARS:
        raise FileError(
            f"{index} cannot be read: it has a name of {len(longest)} characters ({longest[:40]!r}...), "
            f"{MAX_NAME_CHARS} are allowed; ask who made the file"
        )
    return names_by_key


def is_weight_map(found: object) -> bool:
    """Whether parsed JSON names a file for each of some keys."""
    return isinstance(found, dict) and all(isinstance(name, str) for name in found.values())
