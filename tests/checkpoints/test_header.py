"""Headers of safetensors files: every way in which one can be wrong is an error of ours that names it."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from int8run.checkpoints.header import (
    DTYPES,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_METADATA,
    MAX_NAME_CHARS,
    MAX_TENSORS,
    read_full_header,
    read_header,
)
from int8run.errors import FileError


def make_entry(start: int, stop: int, dtype: str = "I8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


def write_file(folder: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "m.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


VALID = {"a": make_entry(0, 3), "b": make_entry(3, 8)}


def test_header_is_read(tmp_path: Path) -> None:
    path = write_file(tmp_path, {"__metadata__": {"format": "pt"}, **VALID})
    found = read_full_header(path)

    assert (found.entries, found.metadata) == (VALID, {"format": "pt"}) == read_header(path)
    assert found.data_start == path.stat().st_size - 8


ALLOWED = {
    "padded with spaces": json.dumps(VALID).encode() + b"   ",
    "in another order": {"b": make_entry(3, 8), "a": make_entry(0, 3)},
    "empty tensors at every place": {
        "x": make_entry(0, 0),
        "a": make_entry(0, 3),
        "y": make_entry(3, 3),
        "b": make_entry(3, 8),
        "z": make_entry(8, 8, "F32", [2, 0]),
    },
    "no dimension": {"a": make_entry(0, 1, shape=[]), "b": make_entry(1, 8)},
    "half bytes": {"a": make_entry(0, 3, "F4", [2, 3]), "b": make_entry(3, 8)},
    "three quarters of bytes": {"a": make_entry(0, 3, "F6_E2M3", [4]), "b": make_entry(3, 8)},
}


@pytest.mark.parametrize("header", ALLOWED.values(), ids=ALLOWED)
def test_everything_the_format_allows_is_read(header: Any, tmp_path: Path) -> None:
    assert {"a", "b"} <= set(read_header(write_file(tmp_path, header))[0])


DAMAGED = {
    "overlap": (
        {"a": make_entry(0, 4), "b": make_entry(3, 8)},
        "b begins at byte 3 of the data, inside of a, which ends at 4",
    ),
    "the same place": (
        {"a": make_entry(0, 8), "b": make_entry(0, 8)},
        "b begins at byte 0 of the data, inside of a",
    ),
    "gap": (
        {"a": make_entry(0, 3), "b": make_entry(4, 8)},
        "bytes 3 to 4 of the data, between a and b, belong to no tensor",
    ),
    "gap at the beginning": (
        {"a": make_entry(1, 8)},
        "bytes 0 to 1 of the data, between the header and a, belong to no tensor",
    ),
    "backwards": (
        {"a": make_entry(0, 8), "b": make_entry(8, 3, shape=[5])},
        "b ends at byte 3 of the data, before its beginning at 8",
    ),
    "beyond the end": (
        {"a": make_entry(0, 3), "b": make_entry(3, 9)},
        "the header describes .* bytes, the file has",
    ),
    "before the end": (
        {"a": make_entry(0, 3), "b": make_entry(3, 7)},
        "the header describes .* bytes, the file has",
    ),
    "another size": (
        {"a": make_entry(0, 3), "b": make_entry(3, 8, shape=[4])},
        r"b has 5 bytes, "
        r"I8 \[4\] takes 4",
    ),
    "another dtype": (
        {"a": make_entry(0, 3), "b": make_entry(3, 8, "F32", [5])},
        r"b has 5 bytes, "
        r"F32 \[5\] takes 20",
    ),
    "part of a byte": (
        {"a": make_entry(0, 3), "b": make_entry(3, 8, "F4", [9])},
        r"b has 5 bytes, F4 "
        r"\[9\] takes 4.5",
    ),
    "no such dtype": (
        {"a": make_entry(0, 3), "b": make_entry(3, 8, "Q3")},
        "b has the dtype 'Q3'; the format has F64, F32",
    ),
    "negative shape": (
        {"a": make_entry(0, 3), "b": make_entry(3, 8, shape=[-5, -1])},
        r"b has the shape \[-5, -1\]; a shape is of whole",
    ),
    "fractional shape": (
        {"a": make_entry(0, 3), "b": make_entry(3, 8, shape=[5.0])},
        r"b has the shape \[5.0\]; a shape is of whole",
    ),
    "shape of true": (
        {"a": make_entry(0, 7), "b": make_entry(7, 8, shape=[True])},
        r"b has the shape \[True\]; a shape is of whole",
    ),
    "a key twice": (
        b'{"a": %s, "a": %s}' % ((json.dumps(make_entry(0, 8)).encode(),) * 2),
        "its header has 'a' twice",
    ),
    "a field twice": (
        b'{"a": {"dtype": "I8", "dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}',
        "its header has 'dtype' twice",
    ),
}


@pytest.mark.parametrize(("header", "words"), DAMAGED.values(), ids=DAMAGED)
def test_entries_that_do_not_describe_the_file_raise(header: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"m.safetensors is damaged: {words}") as raised:
        read_header(write_file(tmp_path, header))
    assert "\n" not in str(raised.value)


NOT_A_HEADER = {
    "a list": [],
    "no entry": {"a": 5},
    "no dtype": {"a": {"shape": [8], "data_offsets": [0, 8]}},
    "no shape": {"a": {"dtype": "I8", "data_offsets": [0, 8]}},
    "no offsets": {"a": {"dtype": "I8", "shape": [8]}},
    "one offset": {"a": {"dtype": "I8", "shape": [8], "data_offsets": [8]}},
    "negative offsets": {"a": make_entry(-1, 8)},
    "fractional offsets": {"a": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8.0]}},
    "endless offsets": {"a": make_entry(0, 2**63)},
}


@pytest.mark.parametrize("header", NOT_A_HEADER.values(), ids=NOT_A_HEADER)
def test_json_that_is_not_a_header_raises(header: Any, tmp_path: Path) -> None:
    with pytest.raises(
        FileError,
        match=r"is not a safetensors file: its header is not a JSON object of tensors with dtype, shape and "
        r"offsets",
    ):
        read_header(write_file(tmp_path, header))


def test_metadata_may_be_null_and_numbers_in_it_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_header(write_file(tmp_path, {"__metadata__": None, **VALID})) == (VALID, {})
    assert not caplog.records

    metadata = {"a": "text", "b": 1, "c": None, "d": True}
    assert read_header(write_file(tmp_path, {"__metadata__": metadata, **VALID})) == (VALID, {"a": "text"})
    assert (
        "ignoring 3 entries of __metadata__ in its header, where only text is allowed (first: b)"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([], r"__metadata__ in its header is '\[\]', not an object of texts"),
        (7, "__metadata__ in its header is '7', not an object of texts"),
        ("x", "__metadata__ in its header is 'x', not an object of texts"),
        (
            {"q": {"layers": {}}},
            "q in __metadata__ of its header is an object or a list, where the format has texts",
        ),
        ({"q": []}, "q in __metadata__ of its header is an object or a list, where the format has texts"),
    ],
)
def test_metadata_that_may_say_something_is_an_error(metadata: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=message):
        read_header(write_file(tmp_path, {"__metadata__": metadata, **VALID}))


OTHER_FILES = {
    "no json": (lambda folder: write_file(folder, b"{nothing"), "its header is not JSON"),
    "longer than the file": (
        lambda folder: write_file(folder, VALID, length=10**6),
        "or it is cut off: its first 8 bytes give no possible",
    ),
    "cut in its length": (lambda folder: write_file(folder, b"", b"", 0), "or it is cut off"),
    "gguf": (
        lambda folder: write_file(folder, VALID, length=int.from_bytes(b"GGUF\3", "little")),
        "but a GGUF file, which int8run reads as model.location=, clip.path= and task.base=",
    ),
}


@pytest.mark.parametrize(("make", "words"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_other_files_raise(make: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"is not a safetensors file.*{words}"):
        read_header(make(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="a sparse file")
def test_header_above_the_limit_raises(tmp_path: Path) -> None:
    path = write_file(tmp_path, b"", b"", MAX_HEADER_BYTES + 1)
    os.truncate(path, MAX_HEADER_BYTES + 100)  # takes no room

    with pytest.raises(
        FileError,
        match=r"is not a safetensors file: its header would have 100000001 bytes, 100000000 are allowed",
    ):
        read_header(path)


def make_empty_tensors(names: list[str], shape: list[int] | None = None) -> dict[str, Any]:
    return {name: make_entry(0, 0, shape=shape or [0]) for name in names}


AT_THE_LIMIT = {
    "tensors": make_empty_tensors([f"a{i}" for i in range(MAX_TENSORS)]),
    "metadata": {"__metadata__": {f"a{i}": "" for i in range(MAX_METADATA)}},
    "name": make_empty_tensors(["n" * MAX_NAME_CHARS]),
    "name of metadata": {"__metadata__": {"n" * MAX_NAME_CHARS: ""}},
    "dimensions": make_empty_tensors(["a"], [0] * MAX_DIMENSIONS),
}
BEYOND_THE_LIMIT = {
    "tensors": (
        make_empty_tensors([f"a{i}" for i in range(MAX_TENSORS + 1)]),
        "it has 20001 tensors, 20000 are allowed",
    ),
    "tensors whose fields are spelled otherwise": (
        json.dumps(make_empty_tensors([f"a{i}" for i in range(MAX_TENSORS + 1)]))
        .replace('"data_off', r'"data\u005foff')
        .encode(),
        "it has 20001 tensors, 20000 are allowed",
    ),
    "metadata": (
        {"__metadata__": {f"a{i}": "" for i in range(MAX_METADATA + 1)}},
        "it has 20001 entries of metadata, 20000 are allowed",
    ),
    "name": (
        make_empty_tensors(["n" * (MAX_NAME_CHARS + 1)]),
        r"its header has a name of 501 characters \('n{40}'\.\.\.\), 500 are allowed",
    ),
    "name of metadata": (
        {"__metadata__": {"n" * (MAX_NAME_CHARS + 1): ""}},
        r"its header has a name of 501 characters \('n{40}'\.\.\.\), 500 are allowed",
    ),
    "dimensions": (
        make_empty_tensors(["a"], [0] * (MAX_DIMENSIONS + 1)),
        "a has 17 dimensions, 16 are allowed",
    ),
}


@pytest.mark.parametrize("header", AT_THE_LIMIT.values(), ids=AT_THE_LIMIT)
def test_header_at_its_limits_is_read(header: Any, tmp_path: Path) -> None:
    found = read_full_header(write_file(tmp_path, header, b""))
    assert len(found.entries) + len(found.metadata) == max(len(header), len(header.get("__metadata__", {})))


@pytest.mark.parametrize(("header", "words"), BEYOND_THE_LIMIT.values(), ids=BEYOND_THE_LIMIT)
def test_header_beyond_its_limits_raises(header: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"m.safetensors cannot be read: {words}; ask who made the file$"):
        read_header(write_file(tmp_path, header, b""))


def test_header_that_is_nested_deeply_raises(tmp_path: Path) -> None:
    path = write_file(tmp_path, b'{"a": ' + b"[" * 10_000, b"")
    with pytest.raises(FileError, match=r"its header is nested in more than 64 levels$"):
        read_header(path)


def test_dtype_sizes_equal_those_of_torch_and_safetensors(tmp_path: Path) -> None:
    known = {
        name: getattr(torch, dtype.torch_name)
        for name, dtype in DTYPES.items()
        if hasattr(torch, dtype.torch_name)
    }

    assert len(known) >= 17

    path = tmp_path / "m.safetensors"

    for word, dtype in known.items():
        assert dtype.itemsize * 8 == DTYPES[word].bits

    tensors = {word: torch.zeros(3, dtype=dtype) for word, dtype in known.items() if "FNUZ" not in word}
    save_file(tensors, path)

    assert {key: found["dtype"] for key, found in read_header(path)[0].items()} == {
        word: word for word in tensors
    }


def test_sizes_that_no_tensor_can_have_raise(tmp_path: Path) -> None:
    # of no number, so that it fits into any file
    path = write_file(tmp_path, {"a": make_entry(0, 8), "b": make_entry(8, 8, shape=[2**40, 2**40, 0])})

    with pytest.raises(FileError, match=r"b has the shape \[1099511627776, .*, 0\], which no file can hold"):
        read_header(path)
    with pytest.raises((SafetensorError, RuntimeError)), safe_open(path, "pt") as file:
        file.get_tensor("b")


JSON_HEADERS = {name: header for name, (header, _) in DAMAGED.items() if isinstance(header, dict)}


@pytest.mark.parametrize("header", JSON_HEADERS.values(), ids=JSON_HEADERS)
def test_safetensors_refuses_the_same_files(header: Any, tmp_path: Path) -> None:
    # strictness of our own that the library does not share would refuse files that others read
    path = write_file(tmp_path, header)
    with pytest.raises((SafetensorError, OSError, ValueError)), safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            file.get_tensor(key)
