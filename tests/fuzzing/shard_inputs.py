"""Checkpoints in several files with an index, both damaged at random."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.checkpoint_inputs import PREFIXES, to_denoiser
from text_encoders.compare_files import BASES, base, compare_file
from text_encoders.files import File
from text_encoders.mutations import MUTATIONS, Draft, header_field

from int8run.errors import FileError
from int8run.tasks.inspect_file import inspect_file

INDEX = "x.safetensors.index.json"
LAYERS = "_quantization_metadata"
# names of shards that an index must not have, or that are not there
OTHER_NAMES = (
    "x-00009-of-00009.safetensors",
    "../x-00001-of-00002.safetensors",
    "/x-00001-of-00002.safetensors",
    "x-00001-of-00002.bin",
    "",
    ".safetensors",
    "X-00001-OF-00002.SAFETENSORS",
)
Index = dict[str, Any]


def deal_tensors(file: File, chance: Random, count: int) -> list[File]:
    """A file as several, each with some of its tensors; what belongs to one layer may be in two of them."""
    shards = [File() for _ in range(count)]
    is_dealt = chance.random() < 0.5
    for i, (key, stored) in enumerate(file.tensors.items()):
        place = i % count if is_dealt else i * count // len(file.tensors)
        shards[place].tensors[key] = stored
    deal_metadata(file, shards, chance)
    if chance.random() < 0.1:
        # one header says something else of a layer, which may be in another file
        header_field(Draft(chance.choice(shards)), chance)
    return shards


def deal_metadata(file: File, shards: list[File], chance: Random) -> None:
    """Give the metadata to the first file, to all of them, or to each what it says of its own layers."""
    kind = chance.choice(("first", "all", "own"))
    for i, shard in enumerate(shards):
        if kind != "first" or i == 0:
            shard.metadata = dict(file.metadata)
    text = file.metadata.get(LAYERS)
    if kind != "own" or text is None:
        return
    try:
        layers = json.loads(text)["layers"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    for shard in shards:
        own = {name: entry for name, entry in dict(layers).items() if f"{name}.weight" in shard.tensors}
        shard.metadata[LAYERS] = json.dumps({"format_version": "1.0", "layers": own})


def move_key(index: Index, folder: Path, chance: Random) -> None:
    """One tensor is said to be in another file."""
    keys, names = list(index["weight_map"]), list(index["weight_map"].values())
    index["weight_map"][chance.choice(keys)] = chance.choice(names)


def rename_shard(index: Index, folder: Path, chance: Random) -> None:
    """A file is called otherwise."""
    old, new = chance.choice(list(index["weight_map"].values())), chance.choice(OTHER_NAMES)
    index["weight_map"] = {key: new if name == old else name for key, name in index["weight_map"].items()}


def drop_key(index: Index, folder: Path, chance: Random) -> None:
    """A tensor that the index does not know."""
    del index["weight_map"][chance.choice(list(index["weight_map"]))]


def add_key(index: Index, folder: Path, chance: Random) -> None:
    """A tensor that is nowhere."""
    index["weight_map"]["nobody.weight"] = next(iter(index["weight_map"].values()))


def lose_shard(index: Index, folder: Path, chance: Random) -> None:
    """A file is not there."""
    (folder / chance.choice(list(index["weight_map"].values()))).unlink(missing_ok=True)


def copy_shard(index: Index, folder: Path, chance: Random) -> None:
    """A file holds what another one holds."""
    names = sorted(set(index["weight_map"].values()))
    first, second = folder / chance.choice(names), folder / chance.choice(names)
    if first.is_file():
        second.write_bytes(first.read_bytes())


def spoil_map(index: Index, folder: Path, chance: Random) -> None:
    """Something else in the place of the map, or of a name in it."""
    if chance.random() < 0.5:
        index["weight_map"] = chance.choice(([], {}, None, "x", 7))
    else:
        index["weight_map"][chance.choice(list(index["weight_map"]))] = chance.choice((None, 1, [], {}))


def lie_about_size(index: Index, folder: Path, chance: Random) -> None:
    """A size that is wrong, which nobody needs."""
    index["metadata"] = chance.choice(({"total_size": -1}, {"total_size": "x"}, None, [], {}))


CHANGES: tuple[Callable[[Index, Path, Random], None], ...] = (
    move_key,
    rename_shard,
    drop_key,
    add_key,
    lose_shard,
    copy_shard,
    spoil_map,
    lie_about_size,
    lie_about_size,
)


def spoil_text(text: bytes, chance: Random) -> bytes:
    """Another byte of an index, or a part of it."""
    at = chance.randrange(len(text))
    return chance.choice(
        (text[:at], text + b"}", text[:at] + bytes([chance.randrange(256)]) + text[at + 1 :])
    )


def write_shards(file: File, chance: Random, folder: Path) -> Path:
    """Write a checkpoint with something done to its tensors, to one of its files, and to its index."""
    for old in folder.iterdir():
        old.unlink()
    draft = Draft(file)
    for _ in range(chance.choice((0, 0, 1))):
        chance.choice(MUTATIONS)(draft, chance)
    count = chance.choice((1, 2, 2, 3))
    weight_map: dict[str, str] = {}
    damaged = chance.randrange(count)
    for i, shard in enumerate(deal_tensors(draft.file, chance, count)):
        name = f"x-{i + 1:05}-of-{count:05}.safetensors"
        # what is done to a header or to bytes is done to one file
        changes = (draft.entries, draft.text, draft.raw) if i == damaged else ([], [], [])
        Draft(shard, *changes).write(folder / name)
        weight_map |= dict.fromkeys(shard.tensors, name)
    index: Index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    if weight_map and chance.random() < 0.5:
        chance.choice(CHANGES)(index, folder, chance)
    text = json.dumps(index).encode()
    if chance.random() < 0.1:
        text = spoil_text(text, chance)
    (folder / INDEX).write_bytes(text)
    return folder / INDEX


def check_shards(chance: Random, folder: Path) -> bool:
    """Read every layer of a sharded checkpoint both ways. Returns whether it was read."""
    file = base(chance.choice([*BASES])).copy()
    path = write_shards(to_denoiser(file, chance.choice(PREFIXES)), chance, folder)
    was_read = compare_file(path) == "read"
    try:
        inspect_file(str(path))
    except FileError as error:
        assert "\n" not in str(error), error
    return was_read
