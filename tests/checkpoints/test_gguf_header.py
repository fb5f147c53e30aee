"""Headers of GGUF files: what is read, and the words that refuse each fault."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.gguf_files import DraftTensor, GgufDraft, write_gguf

from int8run.checkpoints.gguf_header import begins_like_gguf, read_gguf_header
from int8run.checkpoints.gguf_types import BLOCK_TYPES, PLAIN_TYPES, UNREAD_TYPES
from int8run.errors import FileError

F32, Q8_0, Q2_K = 0, 8, 10


def make_tensor(name: str | bytes = "a.weight", **fields: object) -> DraftTensor:
    tensor = DraftTensor(name, (4, 2), F32, np.arange(8, dtype="<f4").tobytes())
    for field_name, value in fields.items():
        setattr(tensor, field_name, value)
    return tensor


def make_draft(*tensors: DraftTensor, **fields: object) -> GgufDraft:
    draft = GgufDraft(tensors=list(tensors) or [make_tensor()])
    for field_name, value in fields.items():
        setattr(draft, field_name, value)
    return draft


def test_sizes_are_turned_and_places_are_counted_from_the_file(tmp_path: Path) -> None:
    draft = make_draft(make_tensor("a"), make_tensor("b", sizes=(8,), kind=0)).add_text("general.name", "x")
    path = draft.write(tmp_path / "x.gguf")

    header = read_gguf_header(path)

    first, second = header.tensors
    assert (first.name, first.dtype, first.shape, first.nbytes) == ("a", "F32", (2, 4), 32)
    assert second.shape == (8,) and second.start == first.start + 32
    data = path.read_bytes()
    assert data[first.start : first.start + 32] == np.arange(8, dtype="<f4").tobytes()
    assert header.metadata == {"general.name": "x"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of POSIX")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    assert not begins_like_gguf(tmp_path / "pipe")


def test_types_are_those_of_the_library() -> None:
    sizes = gguf.GGML_QUANT_SIZES
    for number, block in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *sizes[kind]) == block
    for number, name in PLAIN_TYPES.items():
        assert gguf.GGMLQuantizationType(number).name == name
    known = {*BLOCK_TYPES, *PLAIN_TYPES, *UNREAD_TYPES}
    assert known >= {int(kind) for kind in gguf.GGMLQuantizationType}
    for kind in gguf.GGMLQuantizationType:
        assert UNREAD_TYPES.get(int(kind), kind.name) == kind.name


def test_places_and_metadata_are_those_that_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tensors = {f"blocks.{i}.a.weight": np.ones((i + 1, 64), np.float32) for i in range(5)}
    write_gguf(path, tensors, "Q8_0", metadata={"general.alignment": 64, "general.name": "ö"})

    header = read_gguf_header(path)

    reader = gguf.GGUFReader(path)
    assert len(header.tensors) == len(reader.tensors)
    for own, other in zip(header.tensors, reader.tensors, strict=True):
        assert (own.name, own.start, own.nbytes) == (other.name, other.data_offset, other.n_bytes)
        assert own.shape == tuple(reversed(other.shape.tolist()))
    assert header.metadata["general.architecture"] == "flux"
    assert header.metadata["general.name"] == "ö"


def test_lists_of_a_tokenizer_are_passed_over(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_token_list([f"word {i}" for i in range(1000)])
    writer.add_token_scores([0.5] * 1000)
    writer.add_array("comfy.gguf.orig_shape.a", [2, 4])
    writer.add_tensor("a", np.ones((1, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_gguf_header(tmp_path / "x.gguf")

    assert header.metadata == {"general.architecture": "llama", "comfy.gguf.orig_shape.a": (2, 4)}
    assert header.tensors[0].shape == (2, 4), "as it was before it was reshaped"


def test_version_2_is_read(tmp_path: Path) -> None:
    path = make_draft(version=struct.pack("<I", 2)).write(tmp_path / "x.gguf")
    assert read_gguf_header(path).tensors[0].name == "a.weight"


# what is wrong -> the file, and the words of its refusal
MISTAKES: dict[str, tuple[Callable[[], GgufDraft], str]] = {
    "other file": (lambda: make_draft(magic=b"GGML"), "does not begin with the letters GGUF"),
    "big-endian": (lambda: make_draft(version=struct.pack(">I", 3)), "is a big-endian GGUF file"),
    "version 1": (
        lambda: make_draft(version=struct.pack("<I", 1)),
        "of version 1, and int8run reads 2 and 3",
    ),
    "version 77": (lambda: make_draft(version=struct.pack("<I", 77)), "of version 77"),
    "more tensors than any file": (lambda: make_draft(num_tensors=2**60), f"it has {2**60} tensors"),
    "more entries than any file": (lambda: make_draft(num_entries=2**60), "entries of metadata, 20000"),
    "more tensors than there are": (lambda: make_draft(num_tensors=9), "the name of a tensor has"),
    "long name": (lambda: make_draft(make_tensor("a" * 3000)), "has 3000 bytes, 500 characters"),
    "name of 600": (lambda: make_draft(make_tensor("a" * 600)), "has 600 characters"),
    "name is no text": (lambda: make_draft(make_tensor(b"\xff\xfe")), "the text of a tensor is not UTF-8"),
    "same name": (lambda: make_draft(make_tensor("a"), make_tensor("a")), "it holds a twice"),
    "same entry": (
        lambda: make_draft().add_text("x", "1").add_text("x", "2"),
        "its metadata has x twice",
    ),
    "value is no text": (lambda: make_draft().add_text("x", b"\xff"), "the text of x is not UTF-8"),
    "unknown type of metadata": (
        lambda: make_draft(metadata=[("x", 99, b"")]),
        "x in its metadata has type 99",
    ),
    "list of lists": (
        lambda: make_draft(metadata=[("x", 9, struct.pack("<IQ", 9, 1))]),
        "is a list of type 9",
    ),
    "endless list": (
        lambda: make_draft(metadata=[("x", 9, struct.pack("<IQ", 4, 2**62))]),
        "goes on beyond the end",
    ),
    "list of too many texts": (
        lambda: make_draft(metadata=[("x", 9, struct.pack("<IQ", 8, 2**40))]),
        "texts in its metadata, 4000000 are allowed",
    ),
    "many dimensions": (lambda: make_draft(make_tensor(num_sizes=2**31)), "dimensions, 16 are allowed"),
    "impossible size": (lambda: make_draft(make_tensor(sizes=(2**63, 2))), "which no file can hold"),
    "product of sizes": (lambda: make_draft(make_tensor(sizes=(2**40, 2**40))), "which no file can hold"),
    "sizes beside a zero": (
        lambda: make_draft(make_tensor(sizes=(0, 2**40, 2**40))),
        "which no file can hold",
    ),
    "original sizes beside a zero": (
        lambda: make_draft(
            make_tensor(sizes=(0, 4)),
            metadata=[("comfy.gguf.orig_shape.a.weight", 9, struct.pack("<IQQQ", 10, 2, 2**64 - 1, 0))],
        ),
        "comfy.gguf.orig_shape.a.weight is (18446744073709551615, 0)",
    ),
    "beyond the file": (lambda: make_draft(make_tensor(sizes=(4, 200))), "is cut off or damaged"),
    "place beyond the file": (lambda: make_draft(make_tensor(offset=2**40)), "is cut off or damaged"),
    "place is not aligned": (lambda: make_draft(make_tensor(offset=8)), "no multiple of the alignment 32"),
    "overlap": (
        lambda: make_draft(make_tensor("a"), make_tensor("b", offset=0)),
        "inside of a, which ends at",
    ),
    "alignment 0": (lambda: make_draft().add_uint32("general.alignment", 0), "alignments are powers of two"),
    "alignment 24": (
        lambda: make_draft().add_uint32("general.alignment", 24),
        "general.alignment in its metadata is 24",
    ),
    "alignment is a text": (
        lambda: make_draft().add_text("general.alignment", "32"),
        "alignments are powers of two",
    ),
    "one of several": (
        lambda: make_draft().add_uint32("split.count", 3),
        "is one of 3 files of a split GGUF",
    ),
    "Q2_K": (lambda: make_draft(make_tensor(kind=Q2_K, sizes=(256,))), "a.weight is Q2_K"),
    "MXFP4": (lambda: make_draft(make_tensor(kind=39, sizes=(32,))), "a.weight is MXFP4"),
    "IQ4_XS": (lambda: make_draft(make_tensor(kind=23, sizes=(256,))), "take a file with these"),
    "unknown type": (lambda: make_draft(make_tensor(kind=1234)), "has type 1234, which GGUF has not"),
    "cut block": (lambda: make_draft(make_tensor(kind=Q8_0, sizes=(40, 1))), "Q8_0 has blocks of 32"),
    "original shape of another size": (
        lambda: make_draft(
            metadata=[("comfy.gguf.orig_shape.a.weight", 9, struct.pack("<IQii", 5, 2, 3, 3))]
        ),
        "comfy.gguf.orig_shape.a.weight is (3, 3), and the tensor has the shape",
    ),
    "original shape below zero": (
        lambda: make_draft(
            metadata=[("comfy.gguf.orig_shape.a.weight", 9, struct.pack("<IQii", 5, 2, -2, -4))]
        ),
        "comfy.gguf.orig_shape.a.weight is (-2, -4)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    make, words = MISTAKES[name]
    path = make().write(tmp_path / "x.gguf")

    with pytest.raises(FileError) as caught:
        read_gguf_header(path)

    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 4, 8, 20, 60, 100])
def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(make_draft().add_text("general.name", "x").to_bytes()[:size])

    with pytest.raises(FileError, match=r"cut off|does not begin"):
        read_gguf_header(path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read: No such file"):
        read_gguf_header(tmp_path / "x.gguf")
