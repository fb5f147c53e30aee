"""The disk cache: a size limit, the longest unused go first, and hashes that follow a changed file."""

import hashlib
import json
import logging
import os
import threading
from pathlib import Path

import pytest
from support.run_job import make_spec

from int8run.errors import ConfigError, FileError
from int8run.utils.content_hash import BLOCK_BYTES, get_hash_path
from int8run.utils.disk_cache import GB, HASHES_FILE, UNFINISHED_PREFIX, DiskCache, hash_parts


def store(folder: Path, limit: float = 1.0) -> DiskCache:
    """A store with a limit in bytes times 1e9."""
    return DiskCache(str(folder), limit)


def bytes_of(count: int):
    """A function that writes so many bytes."""
    return lambda path: path.write_bytes(b"x" * count)


def put(kept: DiskCache, key: str, count: int, used: float) -> Path:
    """A file that was last used at that time."""
    path = kept.put("int8", key, count, bytes_of(count))
    assert path is not None
    os.utime(path, (used, used))
    return path


def test_what_is_put_is_found_by_kind_and_key(tmp_path: Path) -> None:
    kept = store(tmp_path / "deep" / "cache")
    path = kept.put("int8", "a", 3, bytes_of(3))

    assert path == tmp_path / "deep" / "cache" / "int8" / "a.safetensors" == kept.get("int8", "a")
    assert path.read_bytes() == b"xxx" and kept.get("float", "a") is None and kept.get("int8", "b") is None


def test_the_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DiskCache().path == tmp_path / ".cache" / "int8run" and DiskCache("~/x").path == tmp_path / "x"
    assert make_spec(["cache.folder=null"]).cache == DiskCache(None, 40)


def test_the_longest_unused_make_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = store(tmp_path, 10 / GB)
    first, second, third = (
        put(kept, key, 3, used) for key, used in (("a", 300.0), ("b", 100.0), ("c", 200.0))
    )

    assert [k.path.stem for k in kept.list_files()] == ["b", "c", "a"] and [
        k.bytes for k in kept.list_files()
    ] == [
        3,
        3,
        3,
    ]
    assert kept.get("int8", "b") == second  # which is a use

    with caplog.at_level(logging.INFO):
        kept.put("float", "d", 4, bytes_of(4))

    assert (
        not third.exists()
        and first.exists()
        and second.exists()
        and (tmp_path / "float" / "d.safetensors").exists()
    )
    assert any("c.safetensors" in r.getMessage() and "makes room" in r.getMessage() for r in caplog.records)

    kept.put("float", "e", 10, bytes_of(10))  # exactly the limit

    assert [k.path.stem for k in kept.list_files()] == ["e"]


def test_what_is_larger_than_the_limit_is_not_kept_and_nothing_goes_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path, 10 / GB)
    old = put(kept, "a", 9, 1.0)
    with caplog.at_level(logging.INFO):
        assert kept.put("int8", "b", 11, lambda path: pytest.fail("written all the same")) is None

    assert old.exists() and "cache.limit_gb=1e-08 allows; not kept" in caplog.text


def test_a_limit_of_0_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "a.safetensors").write_text("x")
    (tmp_path / "weights").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    kept = store(tmp_path, 0)
    with caplog.at_level(logging.INFO):
        assert kept.get("int8", "a") is None
        assert kept.put("int8", "b", 1, lambda path: pytest.fail("written all the same")) is None
        assert kept.hash_file(tmp_path / "weights") == hashlib.sha256(b"x").hexdigest()

    assert sorted(tmp_path.rglob("*")) == before and not caplog.records


@pytest.mark.parametrize("limit", [-1, "much", True, float("nan"), 10**7])
def test_a_limit_that_is_none_is_rejected(limit: object) -> None:
    with pytest.raises(ConfigError, match=r"^cache\.limit_gb is .*; allowed is a number from 0 to 1e\+06$"):
        DiskCache(None, limit)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    kept = store(tmp_path / "file" / "cache")

    assert (
        kept.put("int8", "a", 1, bytes_of(1)) is None
        and kept.get("int8", "a") is None
        and kept.list_files() == []
    )

    (said,) = caplog.records

    assert (
        said.levelname == "WARNING"
        and "cannot be written" in said.getMessage()
        and said.getMessage().endswith("not kept for the next run")
    )

    (tmp_path / "weights").write_text("x")

    assert kept.hash_file(tmp_path / "weights") == hashlib.sha256(b"x").hexdigest()


def test_a_write_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    assert store(tmp_path).put("int8", "a", 1, full) is None
    assert "No space left on device" in caplog.text


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    kept = store(tmp_path)
    old = put(kept, "a", 3, 1.0)

    def half(path: Path) -> None:
        path.write_bytes(b"h")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.put("int8", "a", 3, half)

    assert old.read_bytes() == b"xxx" and sorted(p.name for p in old.parent.iterdir()) == [
        "a.blake2b",
        "a.safetensors",
    ]


def test_an_error_of_ours_while_writing_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path) -> None:
        raise FileError("needs 5 bytes, has 3 free")

    assert store(tmp_path).put("int8", "a", 1, full) is None
    assert "needs 5 bytes, has 3 free); not kept for the next run" in caplog.text


def test_writers_of_one_key_leave_one_whole_file(tmp_path: Path) -> None:
    kept = store(tmp_path)

    def slowly(path: Path) -> None:
        kept.put("int8", "a", 1, lambda inner: inner.write_bytes(b"inner")) if path.name.count("a") else None
        path.write_bytes(b"outer")

    assert kept.put("int8", "a", 1, slowly) is not None
    assert sorted(p.name for p in (tmp_path / "int8").iterdir()) == ["a.blake2b", "a.safetensors"]
    path = kept.get("int8", "a")
    assert path is not None and path.read_bytes() == b"outer"


def test_what_a_killed_process_left_goes_after_a_day_and_counts_for_nothing(tmp_path: Path) -> None:
    kept = store(tmp_path, 10 / GB)
    put(kept, "a", 9, 1.0)
    new, old = (tmp_path / "int8" / f"{UNFINISHED_PREFIX}{name}.safetensors" for name in ("1-b", "2-c"))
    for path in (new, old):
        path.write_bytes(b"x" * 99)
    os.utime(old, (1, 1))

    assert [k.path.stem for k in kept.list_files()] == ["a"]
    assert new.exists() and not old.exists()


def test_a_file_that_cannot_be_used_is_dropped_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path)
    path = put(kept, "a", 3, 1.0)
    kept.remove(path, FileError("is cut off"))

    assert not path.exists() and f"{path} is not used and removed from the cache: is cut off" in caplog.text

    kept.remove(path, "gone already")


@pytest.mark.parametrize("place", [0, 1, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 9])
def test_a_flipped_bit_is_noticed_said_and_thrown_away(
    place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path)
    path = put(kept, "a", BLOCK_BYTES + 10, 1.0)
    flip_bit(path, place)

    assert kept.get("int8", "a") is None
    assert f"{path} is not used and removed from the cache: it is damaged" in caplog.text
    assert list(path.parent.iterdir()) == []
    assert put(kept, "a", BLOCK_BYTES + 10, 1.0) == kept.get("int8", "a")


def flip_bit(path: Path, place: int) -> None:
    """Flip the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped", "gone", "not text"])
def test_a_file_without_its_own_hash_is_thrown_away(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path)
    hash_path = get_hash_path(put(kept, "a", 3, 1.0))
    if damage == "flipped":
        flip_bit(hash_path, 5)
    elif damage == "gone":
        hash_path.unlink()
    else:
        hash_path.write_bytes(b"\xff\xfe")

    assert kept.get("int8", "a") is None and list(hash_path.parent.iterdir()) == []
    assert "is not used and removed from the cache" in caplog.text


def test_hashes_go_with_their_files(tmp_path: Path) -> None:
    kept = store(tmp_path, 10 / GB)
    put(kept, "a", 6, 1.0)
    put(kept, "b", 6, 2.0)
    assert sorted(p.name for p in (tmp_path / "int8").iterdir()) == ["b.blake2b", "b.safetensors"]


# -- hashes ----------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each file that is read to be hashed."""
    seen: list[int] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: (seen.append(1), digest(*arguments))[1])
    return seen


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path, reads: list[int]) -> None:
    kept, file = store(tmp_path / "cache"), tmp_path / "weights"
    file.write_bytes(b"one")
    one = kept.hash_file(file)

    assert (
        one
        == hashlib.sha256(b"one").hexdigest()
        == kept.hash_file(file)
        == store(tmp_path / "cache").hash_file(file)
    )
    assert len(reads) == 1

    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))  # as large, and older

    assert kept.hash_file(file) == hashlib.sha256(b"two").hexdigest() and len(reads) == 2

    fresh = tmp_path / "fresh"  # as large and as old, but another file
    fresh.write_bytes(b"six")
    os.utime(fresh, ns=(1, 1))
    fresh.replace(file)

    assert kept.hash_file(file) == hashlib.sha256(b"six").hexdigest() and len(reads) == 3


def test_a_link_is_the_file_that_it_leads_to(tmp_path: Path, reads: list[int]) -> None:
    (tmp_path / "weights").write_bytes(b"one")
    (tmp_path / "link").symlink_to(tmp_path / "weights")
    kept = store(tmp_path / "cache")

    assert kept.hash_file(tmp_path / "link") == kept.hash_file(tmp_path / "weights") and len(reads) == 1


def test_the_hubs_own_names_are_believed(tmp_path: Path, reads: list[int]) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("f" * 64, "a" * 40):  # the second is a git hash, of small files
        (blobs / name).write_bytes(b"x")
        (tmp_path / name[:3]).symlink_to(blobs / name)
    kept = store(tmp_path / "cache")

    assert kept.hash_file(tmp_path / "fff") == "f" * 64 and not reads
    assert kept.hash_file(tmp_path / "aaa") == hashlib.sha256(b"x").hexdigest() and len(reads) == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', '{"a": [1]}', '"x"'])
def test_a_damaged_table_of_hashes_holds_none(damage: str, tmp_path: Path) -> None:
    kept, file = store(tmp_path), tmp_path / "weights"
    file.write_bytes(b"one")
    (tmp_path / HASHES_FILE).write_text(damage)

    assert kept.hash_file(file) == hashlib.sha256(b"one").hexdigest()
    assert list(json.loads((tmp_path / HASHES_FILE).read_text())["content"]) == [str(file.resolve())]


def test_writers_at_the_same_time_leave_a_table_that_can_be_read(tmp_path: Path) -> None:
    kept = store(tmp_path / "cache")
    files = [tmp_path / str(n) for n in range(8)]
    for file in files:
        file.write_text(file.name)
    found: list[tuple[Path, str]] = []
    threads = [
        threading.Thread(target=lambda f=f: [found.append((f, kept.hash_file(f))) for _ in range(20)])
        for f in files
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 160 and all(
        digest == hashlib.sha256(f.name.encode()).hexdigest() for f, digest in found
    )
    assert json.loads((tmp_path / "cache" / HASHES_FILE).read_text()) and [
        p.name for p in (tmp_path / "cache").iterdir()
    ] == [HASHES_FILE]


def test_a_key_says_all_that_is_in_it() -> None:
    parts = ["1.0", [("a", "b")], 3]

    assert hash_parts(parts) == hash_parts(["1.0", [("a", "b")], 3]) and len(hash_parts(parts)) == 32

    others = [
        ["1.1", [("a", "b")], 3],
        ["1.0", [("a", "c")], 3],
        ["1.0", [("a", "b")], "3"],
        ["1.0", [("a", "b")]],
        parts[::-1],
    ]

    assert len({hash_parts(p) for p in [parts, *others]}) == 6


# -- the tests themselves --------------------------------------------------------------------------


@pytest.mark.slow
def test_no_test_writes_into_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from support.cli_process import command_in

    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    assert make_spec([]).cache.limit_gb == 0 and make_spec(["cache.folder=here"]).cache == DiskCache(
        "here", 40
    )

    with command_in(tmp_path / "work", monkeypatch, capsys) as command:
        size = [
            "sampler.steps=1",
            "prompts.prompts=[a]",
            "backend=reference",
            "tracker=none",
            "metrics.baseline=none",
        ]
        assert command(*size, "sampler.height=16", "sampler.width=16").code == 0

    assert (
        len(list((tmp_path / "work-cache" / "int8").glob("*.safetensors"))) == 1
        and not (tmp_path / "home" / ".cache" / "int8run").exists()
    )
