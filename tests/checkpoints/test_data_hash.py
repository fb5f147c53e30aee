"""The hash of the tensors in the note of a file: what changed since int8run wrote it is noticed."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from int8run.checkpoints.data_hash import DATA_HASH, PLACEHOLDER, add_placeholder, check_data
from int8run.checkpoints.header import read_full_header
from int8run.checkpoints.provenance import PROVENANCE_KEY
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import StreamWriter, TensorEntry
from int8run.errors import FileError

ENTRIES = [
    TensorEntry("b", "I8", (5,)),
    TensorEntry("empty", "F32", (0,)),
    TensorEntry("a.weight", "F32", (2, 3)),
    TensorEntry("none", "I8", (0,)),
]
TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.int8),
    "empty": torch.zeros(0),
    "none": torch.zeros(0, dtype=torch.int8),
}


def write_file(folder: Path, note: dict[str, object] | None = None, title: str = "") -> Path:
    note = add_placeholder({"int8run": "1"}) if note is None else note
    metadata = {"title": title, PROVENANCE_KEY: json.dumps(note)}
    with StreamWriter(folder / "m.safetensors", ENTRIES, metadata) as writer:
        for row in TENSORS["a.weight"]:  # in pieces
            writer.write("a.weight", row)
        writer.write("b", TENSORS["b"])
        return writer.finish()


def check(path: Path) -> bool:
    with TensorFiles.open(path) as files:
        return check_data(files)


def test_hash_is_that_of_names_dtypes_shapes_and_bytes(tmp_path: Path) -> None:
    path = write_file(tmp_path, title=PLACEHOLDER[:40])
    expected = hashlib.blake2b(digest_size=32)
    # as they lie in the file: the largest numbers first
    for name, text in [
        ("empty", "5 empty F32 [0] "),
        ("a.weight", "8 a.weight F32 [2, 3] "),
        ("b", "1 b I8 [5] "),
        ("none", "4 none I8 [0] "),
    ]:
        data = TENSORS[name].numpy().tobytes()
        expected.update(text.encode() + hashlib.blake2b(data, digest_size=32).digest())

    metadata = read_full_header(path).metadata
    assert json.loads(metadata[PROVENANCE_KEY]) == {"int8run": "1", DATA_HASH: expected.hexdigest()}
    assert metadata["title"] == PLACEHOLDER[:40]
    assert check(path)
    assert all(torch.equal(tensor, TENSORS[key]) for key, tensor in load_file(path).items())


def test_any_flipped_bit_is_noticed_or_changes_no_tensor(tmp_path: Path) -> None:
    path = write_file(tmp_path)
    written = path.read_bytes()
    unnoticed = []
    for place in range(len(written)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        try:
            has_hash = check(path)
        except FileError:
            continue
        found = load_file(path)
        is_same = found.keys() == TENSORS.keys() and all(
            torch.equal(tensor, TENSORS[key]) for key, tensor in found.items()
        )
        # a bit in the name of the hash: the file looks like one of an earlier version
        if has_hash and not is_same:
            unnoticed.append(place)
    assert not unnoticed


@pytest.mark.parametrize("change", ["a number", "a name", "a shape"])
def test_file_that_another_program_changed_is_refused(change: str, tmp_path: Path) -> None:
    path = write_file(tmp_path)
    tensors = load_file(path)
    metadata = read_full_header(path).metadata
    if change == "a number":
        tensors["b"][0] = 9
    elif change == "a name":
        tensors["c"] = tensors.pop("b")
    else:
        tensors["a.weight"] = tensors["a.weight"].reshape(3, 2)
    save_file(tensors, path, metadata)
    with pytest.raises(FileError, match=r"m.safetensors does not hold the tensors that int8run wrote"):
        check(path)


def test_file_without_a_hash_is_not_checked(tmp_path: Path) -> None:
    assert not check(write_file(tmp_path, {"int8run": "0.1"}))
