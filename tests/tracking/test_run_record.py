"""status.json and what is read from an output folder."""

import errno
import json
import os
import re
import time
from pathlib import Path

import psutil
import pytest

from int8run.errors import FileError
from int8run.tracking.process_identity import describe_process, is_process_gone
from int8run.tracking.run_record import (
    FAILED,
    FINISHED,
    KILLED,
    RUNNING,
    end_record,
    find_records,
    hash_config,
    read_record,
    start_record,
    update_record,
)

IDENTITY = {
    "task": "run",
    "name": "seed=1",
    "overrides": ["seed=1"],
    "params": {"seed": "1"},
    "config_hash": "c",
    "build_key": "b",
    "objective": "q",
}


def test_a_record_reads_all_files_of_a_job(tmp_path: Path) -> None:
    started = start_record(tmp_path / "job", IDENTITY)

    assert (started.state, started.ended, started.run_id, started.uploaded) == (RUNNING, None, None, False)

    update_record(started, tracking={"run_id": "r", "uploaded": True})
    end_record(read_record(tmp_path / "job"), FAILED, "no disk", ["careful"])
    (tmp_path / "job" / "metrics.json").write_text(
        json.dumps(
            {
                "metrics": {"a": "inf", "b": 2.5, "c": "nan"},
                "series": {"s": [1, "-inf"]},
                "images": [{"prompt": "inf and more", "psnr_db": "inf"}],
            }
        )
    )
    (tmp_path / "job" / "layers.csv").write_text("name,quantized\nx,true\n")
    record = read_record(tmp_path / "job")

    assert (record.state, record.error, record.warnings, record.run_id, record.uploaded) == (
        FAILED,
        "no disk",
        ["careful"],
        "r",
        True,
    )
    assert record.ended is not None and record.ended >= record.started
    assert (
        record.metrics["a"] == float("inf")
        and record.metrics["b"] == 2.5
        and record.metrics["c"] != record.metrics["c"]
    )
    assert record.series == {"s": [1, float("-inf")]}
    assert record.images == [{"prompt": "inf and more", "psnr_db": float("inf")}]
    assert record.layers == [{"name": "x", "quantized": "true"}]


def test_missing_files_are_empty(tmp_path: Path) -> None:
    record = start_record(tmp_path, IDENTITY)

    assert (
        record.metrics,
        record.series,
        record.images,
        record.layers,
        record.environment,
        record.config,
    ) == ({}, {}, [], [], {}, {})


def test_the_prompt_nan_stays_a_text(tmp_path: Path) -> None:
    start_record(tmp_path, IDENTITY)
    (tmp_path / "metrics.json").write_text(
        json.dumps({"images": [{"prompt": "nan", "key": "inf", "psnr_db": "inf"}]})
    )

    assert read_record(tmp_path).images == [{"prompt": "nan", "key": "inf", "psnr_db": float("inf")}]


def test_a_job_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    record = start_record(tmp_path, IDENTITY)

    assert read_record(tmp_path).state == RUNNING

    update_record(record, pid=find_free_pid())
    dead = read_record(tmp_path)

    assert dead.state == KILLED and "without an error message" in str(dead.error)

    update_record(record, host="elsewhere", pid=find_free_pid())

    assert read_record(tmp_path).state == RUNNING, "of other machines nothing is known"


def test_a_reused_process_number_is_another_process() -> None:
    mine = describe_process()

    assert not is_process_gone(
        **{"host": mine["host"], "pid": mine["pid"], "started": mine["process_started"]}
    )
    assert is_process_gone(mine["host"], mine["pid"], mine["process_started"] - 100)
    boot, _, seconds = mine["process_since_boot"].rpartition(" ")
    for since_boot in (f"another-boot {seconds}", f"{boot} {float(seconds) - 100:.2f}"):
        assert is_process_gone(mine["host"], mine["pid"], mine["process_started"], since_boot)


@pytest.mark.parametrize("jump", [3600.0, -86400.0], ids=["an hour ahead", "a day back"])
def test_a_clock_that_jumps_kills_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """The system computes both times from the clock: https://psutil.readthedocs.io, `boot_time`."""
    record = start_record(tmp_path / "job", IDENTITY)
    boot_time, create_time, now = psutil.boot_time(), psutil.Process().create_time(), time.time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot_time + jump)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time + jump)
    monkeypatch.setattr(time, "time", lambda: now + jump)

    assert read_record(record.folder).state == RUNNING, "it is alive"
    ended = end_record(record, FINISHED)
    assert ended.ended is not None
    assert ended.ended >= ended.started


def find_free_pid() -> int:
    return next(pid for pid in range(400_000, 500_000) if not psutil.pid_exists(pid))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"state": "RUNNING"}', '{"state": "FINISHED", "tracking": [1]}']
)
def test_a_damaged_status_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)

    with pytest.raises(FileError, match=re.escape(f"{tmp_path / 'status.json'} is damaged")):
        read_record(tmp_path)


def test_a_folder_without_a_status_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"holds no status\.json: no job of int8run wrote it"):
        read_record(tmp_path)


def test_records_are_found_at_any_depth_by_number(tmp_path: Path) -> None:
    for place, number in (("a/b", 10), ("c", 2), ("d/e/f", 0), ("mlartifacts/int8run/1234/artifacts", 2)):
        start_record(tmp_path / place, {**IDENTITY, "number": number})

    assert [r.number for r in find_records(tmp_path)] == [0, 2, 10]


SETTINGS = {
    "seed": 0,
    "model": {"location": "tiny", "extra": [1, 2]},
    "tracker": {"uri": None},
    "resume": False,
    "progress": True,
    "sync": None,
}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"tracker": {"uri": "http://x"}}, True),
        ({"resume": True}, True),
        ({"progress": False}, True),
        ({"cache": {"folder": "x"}}, True),
        ({"seed": 1}, False),
        ({"model": {"location": "tiny", "extra": [2, 1]}}, False),
        ({"new": None}, False),
    ],
    ids=str,
)
def test_the_hash_covers_the_settings_that_decide_a_result(change: dict[str, object], same: bool) -> None:
    assert (hash_config({**SETTINGS, **change}) == hash_config(SETTINGS)) is same
    assert re.fullmatch("[0-9a-f]{16}", hash_config(SETTINGS))


def test_the_hash_does_not_depend_on_the_order_of_settings() -> None:
    assert hash_config(dict(reversed(SETTINGS.items()))) == hash_config(SETTINGS)


def test_a_full_disk_still_takes_the_end_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = start_record(tmp_path, IDENTITY)

    def full(self: Path, *args: object, **kwargs: object) -> int:
        Path.touch(self)
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    end_record(record, FAILED, "the disk is full")

    assert read_record(tmp_path).state == FAILED and read_record(tmp_path).error == "the disk is full"
    assert os.listdir(tmp_path) == ["status.json"]


def test_the_end_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = start_record(tmp_path, IDENTITY)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)

    with pytest.raises(KeyboardInterrupt):
        end_record(record, FINISHED)
    assert read_record(tmp_path).state == RUNNING


@pytest.mark.parametrize("name", ["metrics.json", "environment.json", "config.yaml"])
def test_a_list_in_place_of_an_object_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    record = start_record(tmp_path, IDENTITY)
    (tmp_path / name).write_text("[1, 2]")

    assert (record.metrics, record.statistics, record.environment, record.config) == ({}, {}, {}, {})
    assert f"{tmp_path / name} is damaged and is ignored: it holds no names with values" in caplog.text


def test_parts_of_metrics_that_are_something_else_are_empty(tmp_path: Path) -> None:
    record = start_record(tmp_path, IDENTITY)
    (tmp_path / "metrics.json").write_text('{"metrics": [1], "statistics": {"metrics": 3}, "images": {}}')

    assert (record.metrics, record.statistics, record.images) == ({}, {}, [])


def test_files_are_utf_8_whatever_the_machine_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = start_record(tmp_path, IDENTITY)
    (tmp_path / "config.yaml").write_text("prompt: Füchse, 狐\n", encoding="utf-8")
    (tmp_path / "layers.csv").write_text("name\n狐\n", encoding="utf-8")
    monkeypatch.setattr("io.text_encoding", lambda encoding, *levels: encoding or "ascii")

    assert (record.config, record.layers) == ({"prompt": "Füchse, 狐"}, [{"name": "狐"}])


def test_damaged_metrics_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = start_record(tmp_path, IDENTITY)
    (tmp_path / "metrics.json").write_text('{"metrics": {"a": 1')

    assert (
        record.metrics == {}
        and record.images == []
        and f"{tmp_path / 'metrics.json'} is damaged and is ignored" in caplog.text
    )


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("lora.strength=0.5 outlier=convrot", "strength=0.5 convrot"),
        ("outlier=none", "outlier=none"),
        ("seed=1", "seed=1"),
        ("outlier=none lora=none seed=1", "outlier=none lora=none seed=1"),
        ("lora.strength=1 lora.adapters.0.strength=0.5", "lora.strength=1 0.strength=0.5"),
        ("+lora.adapters.0.strength=1 clip=auto", "strength=1 auto"),
        ("defaults", "defaults"),
        ("a.b=[x, y] c=d", "a.b=[x, y] c=d"),
    ],
)
def test_the_label_of_a_sweeps_job_is_short(tmp_path: Path, name: str, label: str) -> None:
    assert start_record(tmp_path, {**IDENTITY, "name": name, "sweep": "s"}).label == label
    assert start_record(tmp_path, {**IDENTITY, "name": name}).label == name, (
        "a single run has no others to differ from"
    )


def test_a_damaged_record_does_not_hide_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start_record(tmp_path / "a", IDENTITY)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "status.json").write_text('{"sta')

    assert [r.folder.name for r in find_records(tmp_path)] == ["a"]
    assert f"{tmp_path / 'b' / 'status.json'} is damaged" in caplog.text and "it is ignored" in caplog.text
