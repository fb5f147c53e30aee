"""Hashes of our own files: a changed byte anywhere is noticed; small JSON files hold their own hash."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch

from int8run.backends.autotune_cache import AutotuneCache
from int8run.utils.content_hash import BLOCK_BYTES, format_checked_json, hash_content, read_checked_json


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_hash_is_that_of_the_hashes_of_the_blocks(size: int, tmp_path: Path) -> None:
    data = bytes(i * 7 % 251 for i in range(1000)) * (size // 1000 + 1)
    data = data[:size]
    (tmp_path / "x").write_bytes(data)

    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, size, BLOCK_BYTES)]
    digests = b"".join(hashlib.blake2b(block, digest_size=32).digest() for block in blocks)
    assert hash_content(tmp_path / "x") == hashlib.blake2b(digests, digest_size=32).hexdigest()


def test_json_is_read_as_it_was_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"b": [1, 2.5, None], "a": "ü", "c": {"x": True}}
    (tmp_path / "x.json").write_text(format_checked_json(content))
    assert read_checked_json(tmp_path / "x.json") == content
    assert read_checked_json(tmp_path / "absent.json") == {}
    assert not caplog.records


def test_any_flipped_bit_in_json_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.json"
    content = {"key": "value", "number": 1.25}
    written = format_checked_json(content).encode()
    unnoticed = []
    for place in range(len(written)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        found = read_checked_json(path)
        if found not in ({}, content):  # white space may change
            unnoticed.append((place, found))
    assert not unnoticed
    assert "x.json is damaged and is made again" in caplog.text


def test_measured_choice_with_a_flipped_bit_is_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "choices.json"
    AutotuneCache(path, torch.device("cpu")).put("shape", "vnni")
    assert AutotuneCache(path, torch.device("cpu")).get("shape") == "vnni"

    path.write_text(path.read_text().replace('"vnni"', '"vnnh"'))
    with caplog.at_level(logging.WARNING):
        assert AutotuneCache(path, torch.device("cpu")).get("shape") is None
    assert "choices.json is damaged and is made again" in caplog.text


def test_json_of_an_earlier_version_is_made_again_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"key": "value"}))
    assert read_checked_json(tmp_path / "x.json") == {}
    assert not caplog.records
