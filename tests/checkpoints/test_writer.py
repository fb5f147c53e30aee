"""The streaming writer: files that others read, and what happens when it is stopped half way."""

import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.helpers import randn

from int8run.checkpoints import writer as module
from int8run.checkpoints.header import read_header
from int8run.checkpoints.writer import PART_NAME, StreamWriter, TensorEntry
from int8run.errors import FileError

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
TWO_ENTRIES = [TensorEntry("a", "F32", (2, 3)), TensorEntry("b", "I8", (5,))]


def list_part_files(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def write_two(path, value=1.0):
    with StreamWriter(path, TWO_ENTRIES, {}) as writer:
        writer.write("b", torch.arange(5, dtype=torch.int8))
        writer.write("a", torch.full((2, 3), value))
        return writer.finish()


def test_every_dtype_and_shape_is_read_back(tmp_path):
    shapes = [(), (1,), (0,), (3, 5), (2, 0, 3), (7,)]
    tensors = {
        f"{word}.{i}": (randn(*shape, seed=i) * 3).to(dtype)
        for word, dtype in DTYPES.items()
        for i, shape in enumerate(shapes)
    }
    entries = [TensorEntry(key, key.split(".")[0], tuple(t.shape)) for key, t in tensors.items()]
    metadata = {"format": "pt", "note": 'quotes " and ümlauts'}
    with StreamWriter(tmp_path / "new" / "folder" / "x.safetensors", entries, metadata) as writer:
        for key, t in tensors.items():
            writer.write(key, t)
        path = writer.finish()
    back = load_file(path)

    assert set(back) == set(tensors)
    for key, t in tensors.items():
        assert back[key].dtype == t.dtype
        assert back[key].shape == t.shape
        assert torch.equal(back[key].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8))
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    assert path.stat().st_size == writer.nbytes

    read_header(path)  # our own reader is at least as strict


def test_tensors_start_at_multiples_of_their_number_size(tmp_path):
    entries = [
        TensorEntry("marker", "U8", (7,)),
        TensorEntry("scale", "F32", (3, 1)),
        TensorEntry("half", "BF16", (3,)),
        TensorEntry("weight", "I8", (3, 1)),
        TensorEntry("big", "F64", (1,)),
    ]

    with StreamWriter(tmp_path / "x.safetensors", entries, {"k": "v"}) as writer:
        for key, dtype, _ in entries:
            assert writer.places[key][0] % module.count_bytes(dtype, ()) == 0

    header = {}
    with StreamWriter(tmp_path / "x.safetensors", entries, {"k": "v"}) as writer:
        for key, dtype, shape in entries:
            writer.write(key, torch.zeros(shape, dtype=DTYPES[dtype]))
        header, _ = read_header(writer.finish())

    assert list(header) == ["big", "scale", "half", "marker", "weight"]  # in the order given among equals


def test_pieces_may_be_written_in_any_order(tmp_path):
    data = {"a": randn(7, 9), "b": torch.arange(100, dtype=torch.uint8), "c": randn(5).bfloat16()}
    raw = {key: bytes(t.view(torch.uint8).flatten().tolist()) for key, t in data.items()}
    entries = [
        TensorEntry("a", "F32", (7, 9)),
        TensorEntry("b", "U8", (100,)),
        TensorEntry("c", "BF16", (5,)),
    ]
    generator = torch.Generator().manual_seed(0)
    left = {key: memoryview(text) for key, text in raw.items()}
    with StreamWriter(tmp_path / "x.safetensors", entries, {}) as writer:
        while any(map(len, left.values())):
            key = list(left)[int(torch.randint(3, (), generator=generator))]
            count = int(torch.randint(40, (), generator=generator))
            writer.write(key, left[key][:count])
            left[key] = left[key][count:]
        path = writer.finish()

    assert all(torch.equal(t, load_file(path)[key]) for key, t in data.items())


def test_non_contiguous_tensor_is_written(tmp_path):
    t = randn(4, 6).T
    with StreamWriter(tmp_path / "x.safetensors", [TensorEntry("t", "F32", (6, 4))], {}) as writer:
        writer.write("t", t[:2])
        writer.write("t", t[2:])
        assert torch.equal(load_file(writer.finish())["t"], t)


def test_written_pages_are_flushed_on_the_way(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "FLUSH_BYTES", 100)
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: calls.append(a), raising=False)

    with StreamWriter(tmp_path / "x.safetensors", [TensorEntry("t", "U8", (1000,))], {}) as writer:
        for _ in range(20):
            writer.write("t", bytes(50))

        assert 9 <= len(calls) <= 11

        monkeypatch.delattr(os, "posix_fadvise")  # a system without it
        writer.unsent = 10**9
        writer.write("t", b"")
        writer.finish()


def test_partial_writes_are_continued(tmp_path, monkeypatch):
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[:3]))
    path = write_two(tmp_path / "x.safetensors")

    assert load_file(path)["b"].tolist() == [0, 1, 2, 3, 4]


def test_error_inside_the_context_leaves_no_file(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        StreamWriter(tmp_path / "x.safetensors", TWO_ENTRIES, {}) as writer,
    ):
        writer.write("b", bytes(5))
        assert list_part_files(tmp_path)
        assert not (tmp_path / "x.safetensors").exists()
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = write_two(tmp_path / "x.safetensors", 1.0)

    with pytest.raises(ZeroDivisionError), StreamWriter(path, TWO_ENTRIES, {}) as writer:
        writer.write("a", bytes(24))
        _ = 1 / 0
    assert load_file(path)["a"][0, 0] == 1

    write_two(path, 2.0)

    assert load_file(path)["a"][0, 0] == 2
    assert list_part_files(tmp_path) == []


def test_wrong_use_raises(tmp_path):
    path = tmp_path / "x.safetensors"

    with pytest.raises(ValueError, match="a is given twice"):
        StreamWriter(path, [TensorEntry("a", "F32", (1,)), TensorEntry("a", "F32", (1,))], {})

    with StreamWriter(path, TWO_ENTRIES, {}) as writer:
        writer.write("b", bytes(3))
        with pytest.raises(ValueError, match=r"^b has 5 bytes; 3 were written and 3 more came$"):
            writer.write("b", bytes(3))
        with pytest.raises(ValueError, match=r"^2 tensors are not complete \(first: a\)$"):
            writer.finish()

    assert list(tmp_path.iterdir()) == []


def test_header_above_the_limit_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 200)
    with pytest.raises(
        FileError, match=r"x\.safetensors: its header would have \d+ bytes; readers take 200$"
    ):
        StreamWriter(tmp_path / "x.safetensors", TWO_ENTRIES, {"k": "v" * 200})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_file_has_the_users_permissions(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = write_two(tmp_path / "x.safetensors")
    finally:
        os.umask(before)

    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_path_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FileError,
        match=r"file/x\.safetensors cannot be written: (Not a directory|File exists); make room, or choose a",
    ):
        write_two(tmp_path / "file" / "x.safetensors")
    with pytest.raises(FileError, match=r"cannot be written: it is a folder; name a file$"):
        write_two(tmp_path)


def test_too_little_space_raises_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    entries = [TensorEntry("t", "BF16", (10**9, 12))]
    words = (
        r"x\.safetensors needs 240000\d{5} bytes \(24\.00 GB\), .* has 1000000000 free \(1\.00 GB\); "
        r"make room or choose another folder$"
    )

    with pytest.raises(FileError, match=words):
        StreamWriter(tmp_path / "x.safetensors", entries, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_disk_that_fills_up_on_the_way_raises(tmp_path, monkeypatch, call):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    words = (
        rf"^{re.escape(str(tmp_path))}/x\.safetensors cannot be written: No space left on device; "
        r"make room, or choose a folder"
    )

    with (
        pytest.raises(FileError, match=words),
        StreamWriter(tmp_path / "x.safetensors", TWO_ENTRIES, {}) as writer,
    ):
        writer.write("a", bytes(24))
        writer.write("b", bytes(1))
        monkeypatch.setattr(os, call, full)
        writer.write("b", bytes(4))
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_full_at_the_header_raises(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)

    with pytest.raises(FileError, match="No space left on device"):
        StreamWriter(tmp_path / "x.safetensors", TWO_ENTRIES, {})
    assert list(tmp_path.iterdir()) == []


WRITE_HALF_SCRIPT = """
import sys, time
from pathlib import Path
from int8run.checkpoints.writer import StreamWriter, TensorEntry
writer = StreamWriter(Path(sys.argv[1]), [TensorEntry("t", "U8", (10**6,))], {})
writer.write("t", bytes(10**5))
print("half", flush=True)
time.sleep(3600)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL and file locks")
def test_next_writer_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "x.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_HALF_SCRIPT, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "half\n"
        left = list_part_files(tmp_path)
        assert left[0].startswith(f".int8run-{process.pid}-")
        assert not path.exists()
        write_two(tmp_path / "other.safetensors")
        assert list_part_files(tmp_path) == left, "another live process writes it"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    assert list_part_files(tmp_path) == left
    assert not path.exists()

    (tmp_path / ".something.part").write_text("not ours")
    write_two(tmp_path / "other.safetensors")

    assert list_part_files(tmp_path) == [".something.part"]


@pytest.mark.skipif(module.fcntl is None, reason="needs file locks")
def test_two_writers_of_one_process_do_not_interfere(tmp_path):
    with StreamWriter(tmp_path / "x.safetensors", TWO_ENTRIES, {}) as first:
        write_two(tmp_path / "y.safetensors")
        first.write("a", bytes(24))
        first.write("b", bytes(5))
        first.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "y.safetensors"]


@pytest.mark.skipif(module.fcntl is None, reason="needs file locks")
def test_part_removed_before_it_was_locked_is_created_again(tmp_path, monkeypatch):
    real, made = module.acquire_lock, []

    def slow(descriptor, wait=False):
        if wait and not made:  # the other process is faster once
            made.extend(tmp_path.iterdir())
            made[0].unlink()
        return real(descriptor, wait=wait)

    monkeypatch.setattr(module, "acquire_lock", slow)

    assert load_file(write_two(tmp_path / "x.safetensors"))["b"].tolist() == [0, 1, 2, 3, 4]
    assert len(made) == 1


def test_without_locks_leftovers_are_kept(tmp_path, monkeypatch):
    left = tmp_path / PART_NAME.format(f"1-{time.time_ns()}")
    left.write_text("may belong to somebody")
    monkeypatch.setattr(module, "fcntl", None)
    write_two(tmp_path / "x.safetensors")

    assert left.exists()


def test_sync_folder_is_skipped_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    assert Path(write_two(tmp_path / "x.safetensors")).exists()
