"""Tensors of one file or of many, read whole or by rows; sets of files that do not fit are refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import randn
from torch import Tensor

from int8run.checkpoints import reader as module
from int8run.checkpoints.header import MAX_TENSORS
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

TENSORS = {
    "a": randn(5, 6).bfloat16(),
    "b": torch.tensor(3),
    "c": randn(4, 4).to(torch.float8_e4m3fn),
    "c2": randn(4, 4).to(torch.float8_e5m2),
    "d": randn(3) > 0,
    "e": torch.arange(3).to(torch.uint16),
    "f": randn(2, 3) + 1j * randn(2, 3),
    "g": randn(3, 2, 2).half(),
    "h": torch.tensor([-128, 127], dtype=torch.int8),
    "i": randn(2).double(),
    "z": torch.zeros(0),
    "zz": torch.zeros(0, 4),
}


def is_bit_equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, of any dtype."""

    def raw(t):
        return bytes(t.contiguous().flatten().view(torch.uint8).numpy())

    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def write_shards(folder: Path, stem: str = "m", index: bool = True, variant: str = "") -> dict[str, Tensor]:
    """Two shards, with an index or without."""
    parts = [{"a": randn(2, 3), "b": randn(4)}, {"c": randn(1, 5)}]
    names = [f"{stem}-{i:05}-of-00002{variant}.safetensors" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_tensors(folder / name, part, {"format": "pt", "part": name})
    if index:
        places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / f"{stem}.safetensors.index{variant}.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )
    return parts[0] | parts[1]


def read_all(path: Path) -> dict[str, Tensor]:
    with TensorFiles.open(path) as files:
        return {key: files.read(key) for key in files}


def are_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(is_bit_equal(found[key], expected[key]) for key in expected)


# -- one file --------------------------------------------------------------------------------------


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "m.safetensors", TENSORS, {"format": "pt", "note": "ü"})

    assert are_bit_equal(read_all(path), load_file(path))

    files = TensorFiles.open(path)

    assert files.metadata == {"format": "pt", "note": "ü"}
    assert files.files == (path,)
    assert files.path == path

    info = files["a"]

    assert (info.key, info.file, info.dtype, info.shape, info.nbytes) == ("a", path, "BF16", (5, 6), 60)
    assert path.read_bytes()[info.start : info.start + info.nbytes] == bytes(
        TENSORS["a"].view(torch.uint8).numpy()
    )


def test_keys_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    files = TensorFiles.open(save_tensors(tmp_path / "m.safetensors", TENSORS))
    starts = [info.start for info in files.values()]

    assert len(files) == len(TENSORS)
    assert starts == sorted(starts)
    assert "a" in files
    assert "x" not in files


@pytest.mark.parametrize(
    "rows",
    [slice(0, 2), slice(1, 5), slice(2, None), slice(None, 3), slice(5, 5), slice(None), None],
    ids=str,
)
def test_rows_are_read_without_the_others(rows: slice | None, tmp_path: Path) -> None:
    files = TensorFiles.open(save_tensors(tmp_path / "m.safetensors", TENSORS))
    expected = TENSORS["a"] if rows is None else TENSORS["a"][rows]

    assert is_bit_equal(files.read("a", rows), expected)

    buffer = torch.full((64,), 255, dtype=torch.uint8)
    found = files.read_into("a", rows, buffer)

    assert is_bit_equal(found, expected)
    assert found.data_ptr() == buffer.data_ptr() or not found.numel()
    assert (buffer[expected.numel() * 2 :] == 255).all(), "no byte more is written"


@pytest.mark.parametrize("rows", [slice(0, 6), slice(-1, None), slice(3, 2), slice(0, 4, 2)], ids=str)
def test_missing_rows_raise(rows: slice, tmp_path: Path) -> None:
    files = TensorFiles.open(save_tensors(tmp_path / "m.safetensors", TENSORS))
    with pytest.raises(ValueError, match=r"a has 5 rows; .* cannot be read"):
        files.read("a", rows)
    with pytest.raises(ValueError, match=r"b has None rows; 0:1:None cannot be read"):
        files.read("b", slice(0, 1))


@pytest.mark.parametrize(
    "buffer", [torch.zeros(59, dtype=torch.uint8), torch.zeros(60), torch.zeros(10, 6, dtype=torch.uint8)]
)
def test_buffer_that_does_not_fit_raises(buffer: Tensor, tmp_path: Path) -> None:
    files = TensorFiles.open(save_tensors(tmp_path / "m.safetensors", TENSORS))
    with pytest.raises(ValueError, match=r"a takes 60 bytes; the buffer is"):
        files.read_into("a", None, buffer)


def test_numbers_smaller_than_a_byte_are_read_as_bytes(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [2, 6], "data_offsets": [0, 6]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(6)))
    files = TensorFiles.open(path)

    assert files.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert files.read("a", slice(1, 2)).tolist() == [[3, 4, 5]]


def test_long_reads_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tensors(tmp_path / "m.safetensors", TENSORS)
    monkeypatch.setattr(module, "MAX_READ_BYTES", 7)

    assert are_bit_equal(read_all(path), load_file(path))


def test_a_system_without_preadv_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tensors(tmp_path / "m.safetensors", TENSORS)
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(module, "MAX_READ_BYTES", 7)

    assert are_bit_equal(read_all(path), load_file(path))

    TensorFiles.open(path).drop_from_page_cache("a")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no posix_fadvise")
def test_pages_are_dropped_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: calls.append(rest))
    files = TensorFiles.open(save_tensors(tmp_path / "m.safetensors", TENSORS))
    files.drop_from_page_cache("a", slice(1, 3))
    files.drop_from_page_cache("z")  # a length of 0 would mean the rest of the file

    assert calls == [(files["a"].start + 12, 24, os.POSIX_FADV_DONTNEED)]


def test_file_truncated_meanwhile_raises(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "m.safetensors", {"a": randn(100, 100)})
    files = TensorFiles.open(path)
    os.truncate(path, 1000)

    with pytest.raises(
        FileError, match=r"m.safetensors was cut off or replaced while it was read: it ends before byte"
    ):
        files.read("a")


def test_file_that_is_gone_or_unreadable_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tensors(tmp_path / "m.safetensors", TENSORS)
    files = TensorFiles.open(path)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail, raising=False)
        with pytest.raises(FileError, match=r"m.safetensors cannot be read: Input/output error"):
            files.read("a")

    files.close()
    path.unlink()

    with pytest.raises(FileError, match=r"m.safetensors cannot be read: No such file or directory"):
        files.read("a")


def test_files_are_opened_on_first_read_and_closed(tmp_path: Path) -> None:
    files = TensorFiles.open(save_tensors(tmp_path / "m.safetensors", TENSORS))

    assert not files.open_files

    with files:
        files.read("a")
        (handle,) = files.open_files.values()

    assert handle.closed
    assert not files.open_files
    assert is_bit_equal(files.read("a"), TENSORS["a"]), "it is opened again"


# -- many files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "m.safetensors.index.json"])
def test_shards_with_an_index_are_one_checkpoint(name: str, tmp_path: Path) -> None:
    expected = write_shards(tmp_path)

    assert are_bit_equal(read_all(tmp_path / name), expected)

    files = TensorFiles.open(tmp_path / name)

    assert [file.name for file in files.files] == [
        "m-00001-of-00002.safetensors",
        "m-00002-of-00002.safetensors",
    ]
    assert files.metadata == {"format": "pt", "part": "m-00001-of-00002.safetensors"}
    assert [m["part"] for m in files.metadata_by_file.values()] == [file.name for file in files.files]


def test_shards_without_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    expected = write_shards(tmp_path, index=False)

    assert are_bit_equal(read_all(tmp_path), expected)
    with pytest.raises(FileError, match=r"is one of 2 shards; name their folder or their .index.json"):
        TensorFiles.open(tmp_path / "m-00001-of-00002.safetensors")

    (tmp_path / "m-00001-of-00002.safetensors").unlink()

    with pytest.raises(
        FileError,
        match=r"1 of 2 shards are missing \(first: m-00001-of-00002.safetensors\); download them again",
    ):
        TensorFiles.open(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_shards_of_a_variant_are_found(index: bool, tmp_path: Path) -> None:
    expected = write_shards(tmp_path, "diffusion_pytorch_model", index, ".fp16")

    assert are_bit_equal(read_all(tmp_path), expected)

    # the plain one goes before
    plain = {"x": randn(3)}
    save_tensors(tmp_path / "diffusion_pytorch_model.safetensors", plain)

    assert are_bit_equal(read_all(tmp_path), plain)


def test_usual_names_are_preferred(tmp_path: Path) -> None:
    one, two = {"x": randn(3)}, {"y": randn(4)}
    save_tensors(tmp_path / "z.safetensors", one)
    save_tensors(tmp_path / ".1.safetensors", two)  # one that is being written

    assert are_bit_equal(read_all(tmp_path), one)

    save_tensors(tmp_path / "another.safetensors", two)

    with pytest.raises(FileError, match=r"holds 2 checkpoints \(another, z\); name one of the files"):
        TensorFiles.open(tmp_path)

    expected = write_shards(tmp_path, "model")

    assert are_bit_equal(read_all(tmp_path), expected)

    save_tensors(tmp_path / "diffusion_pytorch_model.safetensors", two)

    assert are_bit_equal(read_all(tmp_path), two)
    assert are_bit_equal(read_all(tmp_path / "z.safetensors"), one)


def test_links_are_read_by_their_own_names(tmp_path: Path) -> None:
    # as the hub's cache lays them out
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    expected = write_shards(tmp_path / "blobs")
    for number, file in enumerate(sorted((tmp_path / "blobs").iterdir())):
        (tmp_path / "snapshot" / file.name).symlink_to(file.rename(tmp_path / "blobs" / str(number)))

    assert are_bit_equal(read_all(tmp_path / "snapshot"), expected)


def edit_index(folder: Path, change: Any) -> None:
    index = folder / "m.safetensors.index.json"
    found = json.loads(index.read_text())
    change(found["weight_map"])
    index.write_text(json.dumps(found))


WRONG_INDEX = {
    "a key that is not there": (
        lambda m: m.update(x="m-00001-of-00002.safetensors"),
        "x is not in m-00001-of-00002.safetensors, where the index",
    ),
    "a key elsewhere": (
        lambda m: m.update(c="m-00001-of-00002.safetensors"),
        "c is not in m-00001-of-00002.safetensors, where the index says",
    ),
    "a key too few": (
        lambda m: m.pop("b"),
        "b is in m-00001-of-00002.safetensors, and the index does not say so; they do not belong",
    ),
    "no such shard": (
        lambda m: m.update(x="n.safetensors"),
        r"the shard n.safetensors is missing \(1 tensor is in it\); download it again",
    ),
    "a shard elsewhere": (
        lambda m: m.update(x="../m.safetensors"),
        r"the shard '../m.safetensors' is not a .safetensors file beside it",
    ),
    "a pickled shard": (
        lambda m: m.update(x="m.bin"),
        "the shard 'm.bin' is not a .safetensors file beside it",
    ),
    "a number": (lambda m: m.update(x=5), "is not an index of shards: it has no `weight_map`"),
    "nothing": (lambda m: m.clear(), "is not an index of shards: it has no `weight_map`"),
}


@pytest.mark.parametrize(("change", "words"), WRONG_INDEX.values(), ids=WRONG_INDEX)
def test_index_that_does_not_fit_raises(change: Any, words: str, tmp_path: Path) -> None:
    write_shards(tmp_path)
    edit_index(tmp_path, change)

    with pytest.raises(FileError, match=rf"m.safetensors.index.json.*{words}"):
        TensorFiles.open(tmp_path)


INDEXES_BEYOND_THE_LIMITS = {
    "tensors": (
        {f"a{i}": "m.safetensors" for i in range(MAX_TENSORS + 1)},
        "it has 20001 tensors, 20000 are",
    ),
    "a name": ({"n" * 501: "m.safetensors"}, "it has a name of 501 characters"),
    "a name of a file": ({"a": "n" * 501}, "it has a name of 501 characters"),
}


@pytest.mark.parametrize(
    ("weight_map", "words"), INDEXES_BEYOND_THE_LIMITS.values(), ids=INDEXES_BEYOND_THE_LIMITS
)
def test_index_beyond_the_limits_of_a_header_raises(
    weight_map: dict[str, str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileError, match=rf"m.safetensors.index.json cannot be read: {words}"):
        TensorFiles.open(tmp_path)


def test_shards_with_more_tensors_than_a_checkpoint_has_raise(tmp_path: Path) -> None:
    half = MAX_TENSORS // 2 + 1
    for number in (1, 2):
        entries = {
            f"a{number}.{i}": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]} for i in range(half)
        }
        text = json.dumps(entries).encode()
        shard = tmp_path / f"m-0000{number}-of-00002.safetensors"
        shard.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FileError, match=r"cannot be read: it has 20002 tensors, 20000 are allowed"):
        TensorFiles.open(tmp_path)


def test_key_that_an_index_has_twice_raises(tmp_path: Path) -> None:
    text = '{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}'
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(FileError, match=r"is not an index of shards: it has 'a' twice"):
        TensorFiles.open(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "5", '{"weight_map": []}', "[" * 100_000])
def test_file_that_is_not_an_index_raises(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(FileError, match=r"m.safetensors.index.json is not an index of shards"):
        TensorFiles.open(tmp_path)


def test_key_in_two_shards_raises(tmp_path: Path) -> None:
    write_shards(tmp_path, index=False)
    save_tensors(tmp_path / "m-00002-of-00002.safetensors", {"c": randn(2), "a": randn(2)})

    with pytest.raises(
        FileError,
        match=r"a is in m-00001-of-00002.safetensors and in m-00002-of-00002.safetensors; one is too many",
    ):
        TensorFiles.open(tmp_path)


def test_path_without_a_checkpoint_raises(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"holds no safetensors file; name a .safetensors file or its folder"):
        TensorFiles.open(tmp_path)

    (tmp_path / "model_index.json").write_text("{}")

    with pytest.raises(
        FileError,
        match=r"holds no safetensors file; name the folder of one component in it, such as `transformer`, "
        r"`unet` or `text_encoder`",
    ):
        TensorFiles.open(tmp_path)
    for name in ("absent.safetensors", "absent.safetensors.index.json", "m-00001-of-00002.safetensors"):
        with pytest.raises(FileError, match=rf"{name}: no such file"):
            TensorFiles.open(tmp_path / name)


def test_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tensors(tmp_path / "m.safetensors", TENSORS)

    assert len(TensorFiles.open(Path("~/m.safetensors"))) == len(TENSORS)
