"""Hashes of what our own files hold, so that a bit that flipped on a disk is noticed before it is used.

BLAKE2b is in Python's standard library and as quick on every processor. A large file is hashed in blocks by
several threads: 1.4 GB/s for each of them on a Zen 5, more than most disks give.
"""

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from int8run.utils.untrusted_json import parse_untrusted_json

log = logging.getLogger(__name__)
BLOCK_BYTES = 16 * 2**20
MAX_THREADS = 8
DIGEST_BYTES = 32


def new_hash() -> "hashlib.blake2b":
    """A hash that takes bytes with `update`."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def hash_content(path: Path) -> str:
    """The hash of a file: that of the hashes of its blocks, one after the other, in hexadecimal digits.

    Raises:
        OSError: when it cannot be read.
    """
    size = path.stat().st_size
    starts = range(0, size, BLOCK_BYTES)

    def hash_block(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.blake2b(file.read(BLOCK_BYTES), digest_size=DIGEST_BYTES).digest()

    digest = new_hash()
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        for block in threads.map(hash_block, starts):
            digest.update(block)
    return digest.hexdigest()


# -- a file beside the file ------------------------------------------------------------------------


def get_hash_path(path: Path) -> Path:
    """Where the hash of a file stands: `x.safetensors` -> `x.blake2b`."""
    return path.with_suffix(".blake2b")


def describe_damage(path: Path) -> str | None:
    """Say what is wrong with a file that has its hash beside it; None: it is as it was written."""
    try:
        expected = get_hash_path(path).read_text(errors="replace").strip()
    except OSError:
        return "its hash is not beside it"
    try:
        found = hash_content(path)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None if found == expected else "it is damaged: it does not hold what was written"


def remove_with_hash(path: Path) -> None:
    """Remove a file and its hash, where they are and can be removed."""
    for file in (path, get_hash_path(path)):
        with suppress(OSError):
            file.unlink(missing_ok=True)


# -- small JSON files ------------------------------------------------------------------------------


def format_checked_json(content: dict[str, Any]) -> str:
    """The text of a JSON file with a hash of what it holds."""
    return json.dumps({"blake2b": hash_json(content), "content": content}, indent=1, sort_keys=True)


def read_checked_json(path: Path) -> dict[str, Any]:
    """Read what `format_checked_json` made; empty, with a warning, where a file is damaged.

    A file that is absent, or of an earlier version without a hash, is empty without a word: what is in it can
    be made again.
    """
    # a pipe or a device would never end
    if not path.is_file():
        return {}
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    try:
        found = parse_untrusted_json(text)
    except ValueError as error:
        log.warning("%s is damaged and is made again: it %s", path, error)
        return {}
    if not isinstance(found, dict) or "blake2b" not in found:
        return {}
    content = found.get("content")
    if not isinstance(content, dict) or hash_json(content) != found["blake2b"]:
        log.warning("%s is damaged and is made again: it does not hold what was written", path)
        return {}
    return content


def hash_json(content: dict[str, Any]) -> str:
    """The hash of a JSON object, whatever the order of its names."""
    digest = new_hash()
    digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()
