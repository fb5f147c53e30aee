"""What the parts of a run on a GPU have in common: their report, their sizes, their dtype."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROWS = 4608  # image and text tokens of FLUX.1 at 1024x1024
SHRINK = 64  # how much smaller lengths are in a dry run
TIMED_ROUNDS = 20


@dataclass
class Report:
    """What a part has found, written anew with each row.

    Args:
        path: of the file.
        values: `rows`, and what else is known.
    """

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def add_row(self, **row: Any) -> None:
        """One more row."""
        self.values.setdefault("rows", []).append(row)
        print(row, flush=True)
        self.write()

    def write(self) -> None:
        """All values as JSON."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.values))


def shrink(length: int, device: str) -> int:
    """A length, in a dry run a tiny one."""
    return max(length // SHRINK, 1) if device == "cpu" else length


def choose_dtype() -> Any:
    """Of inputs and outputs."""
    import torch

    return torch.bfloat16
