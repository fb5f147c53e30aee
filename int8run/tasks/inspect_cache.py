"""`task=inspect` without a path: lists what the cache holds.

Called by `options.Inspect`. Only headers are read.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from int8run.checkpoints.header import read_header
from int8run.checkpoints.provenance import read_provenance
from int8run.errors import FileError
from int8run.utils.disk_cache import DiskCache
from int8run.utils.plurals import count_noun

# entries of a file's provenance that tell it from others
DISTINGUISHING_NAMES = ("model", "family", "outlier", "rounding")


def inspect_cache(cache: DiskCache) -> Table:
    """List what is kept on disk for later runs, the file that was used last on top."""
    files = cache.list_files()
    total = sum(file.bytes for file in files)
    title = f"{cache.path}: {total / 1e9:.2f} of {cache.limit_gb:g} GB"
    table = Table(title=title, title_justify="left")
    table.add_column("kind", overflow="fold")
    table.add_column("made from", overflow="fold")
    table.add_column("size", overflow="fold", justify="right")
    table.add_column("last used", overflow="fold")
    for file in reversed(files):
        table.add_row(
            file.path.parent.name,
            describe_cache_file(file.path),
            f"{file.bytes / 1e6:.1f} MB",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used)),
        )
    return table


def describe_cache_file(path: Path) -> str:
    """Describe a file of the cache in one line, from its header."""
    try:
        _, metadata = read_header(path)
        provenance = read_provenance(path, metadata)
    except FileError:
        return f"{path.name}, damaged"
    return ", ".join(list_origins(provenance)) or path.name


def list_origins(provenance: Mapping[str, Any]) -> list[str]:
    """List what a file of the cache was made from, as its provenance says."""
    origins = []
    for name in DISTINGUISHING_NAMES:
        value = provenance.get(name)
        if value:
            origins.append(str(value))
    num_images = provenance.get("images", provenance.get("drawings"))  # as earlier versions call them
    if num_images is not None:
        origins.append(count_noun(int(num_images), "image"))
    for lora_name, *_ in provenance.get("loras", []):
        origins.append(str(lora_name))
    return origins
