"""How int8run made a file: one JSON object in the metadata of the header, under `int8run`.

The tasks that write a checkpoint store it; `inspect` prints it, and whoever loads such a file reads settings
from it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from int8run.errors import FileError
from int8run.utils.untrusted_json import parse_untrusted_json

PROVENANCE_KEY = "int8run"


def read_provenance(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """How int8run made a file; empty when another program did.

    Args:
        path: of the file, for the error.
        metadata: of its header.

    Raises:
        FileError: when it cannot be read.
    """
    text = metadata.get(PROVENANCE_KEY, "{}")
    try:
        found = parse_untrusted_json(text)
    except ValueError as error:
        raise FileError(f"{path}: the provenance in the header {error}: {text[:80]!r}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path}: the provenance in the header is not a JSON object: {text[:80]!r}")
    return found
