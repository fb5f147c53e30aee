"""One LoRA of a stack: its file, its strengths, and the words in which a run reports it.

`LoraStack` holds these in order. Nothing here touches a model.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8run.lora.config import check_strength
from int8run.lora.load import LoraFile

log = logging.getLogger(__name__)


@dataclass
class Entry:
    """One LoRA of the stack and how strong it is.

    Args:
        name: for people and for `set_strength`.
        file: what it holds.
        strength: in the denoiser.
        text_strength: in the text encoders.
        components: the parts of the file that are applied; None: all.
    """

    name: str
    file: LoraFile
    strength: float = 0.0
    text_strength: float = 0.0
    components: Sequence[str] | None = None

    def format_strengths(self) -> str:
        """`'ink' 0.8`, or `'ink' 0.8 (text 0.4)` where the two differ."""
        if self.text_strength == self.strength:
            return f"{self.name!r} {self.strength:g}"
        return f"{self.name!r} {self.strength:g} (text {self.text_strength:g})"


def check_strengths(name: str, strength: float, text_strength: float | None) -> None:
    """Check that both strengths of a LoRA are in range.

    Raises:
        ConfigError: naming the LoRA and the range.
    """
    check_strength(f"strength of LoRA {name!r}", strength)
    if text_strength is not None:
        check_strength(f"text_strength of LoRA {name!r}", text_strength)


def warn_duplicates(entries: Sequence[Entry]) -> None:
    """Warn where two LoRAs are the same file."""
    if len(entries) < 2:
        return  # a hash reads the whole file
    first_names: dict[str, str] = {}
    for entry in entries:
        first_name = first_names.setdefault(entry.file.identity, entry.name)
        if first_name != entry.name:
            log.warning(
                "LoRA %r holds the same weights as %r; together they act like one with both strengths added",
                entry.name,
                first_name,
            )


def describe_entry(entry: Entry, num_changed: Mapping[str, int], num_unmatched: int) -> str:
    """A line on what is in the file of a LoRA, and what it changes.

    Args:
        entry: the LoRA.
        num_changed: how many modules of each component it changes.
        num_unmatched: modules of the file that are not in the model.
    """
    file = entry.file
    changed = [f"{component} {count}" for component, count in num_changed.items() if count]
    parts = [f"LoRA {entry.name!r} ({file.title}): {format_contents(file)}"]
    parts.append(f"modules changed: {', '.join(changed)}")
    if num_unmatched:
        parts.append(f"{num_unmatched} not applied")
    return "; ".join([*parts, *file.notes])


def format_contents(file: LoraFile) -> str:
    """Adapter types, ranks and scales in a file: `40 × LoRA, rank 8, alpha/rank 1`."""
    parts = [f"{count} × {adapter_type}" for adapter_type, count in file.adapter_types.most_common()]
    parts += format_range("rank", file.ranks)
    parts += format_range("alpha/rank", file.scales)
    return ", ".join(parts)


def format_range(name: str, counts: Counter[int] | Counter[float]) -> list[str]:
    """`rank 8`, or `rank 4 to 16` where modules differ; nothing where none has one.

    Args:
        name: of the number.
        counts: number -> modules that have it.
    """
    if not counts:
        return []
    lowest, highest = min(counts), max(counts)
    if len(counts) == 1:
        return [f"{name} {lowest:g}"]
    return [f"{name} {lowest:g} to {highest:g}"]
