"""What `task=inspect` says about a LoRA file: what it changes, what it is made for, how to call it up.

Called by `inspect_file`. Of the file only the header is read; sidecar files beside it are read, too.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from int8run.errors import FileError
from int8run.lora import few_step
from int8run.lora.base_model import detect_lora_base
from int8run.lora.key_groups import KeyGroups, group_keys
from int8run.lora.key_parsing import parse_key
from int8run.lora.metadata import describe_header
from int8run.lora.trigger_words import iter_trigger_words
from int8run.lora.unread_types import describe_unread_types, list_unread_types
from int8run.tasks.file_description import MAX_VALUE_LENGTH, Row
from int8run.utils.plurals import count_noun

MAX_TRIGGERS = 3
# the part of an adapter that stands for its type
ADAPTER_TYPES = {
    "down": "LoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "diff": "diff",
    "diff_b": "bias",
    "on_input": "IA3",
    "w_norm": "norm",
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "oft_blocks": "OFT or BOFT",
    "kohya_oft_blocks_0": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
}
# the entry of each tensor in a safetensors header
Header = Mapping[str, Mapping[str, Any]]


def describe_lora(path: Path, header: Header, metadata: Mapping[str, str]) -> Iterator[Row]:
    """Describe a LoRA file.

    Args:
        path: of the file.
        header: entries of its tensors.
        metadata: of its header.

    Raises:
        FileError: for a shape that no LoRA has.
        LoraError: for several adapters in one file.
    """
    groups = group_keys(path, header)
    yield "LoRA", describe_modules(groups, find_ranks(path, header))
    yield from describe_types(groups)
    yield "first module", parse_key(next(iter(header))).name

    base = detect_lora_base(header, metadata)
    if base is not None:
        yield "base model", str(base)
    else:
        architecture = metadata.get("modelspec.architecture", "unknown from names, shapes and tags")
        yield "base model", architecture[:MAX_VALUE_LENGTH]
    yield from describe_triggers(path, metadata)
    base_name = base.name if base is not None else None
    yield from describe_few_step(path, metadata, base_name)
    yield from describe_header(path, metadata, header).items()


def describe_modules(groups: KeyGroups, ranks: Iterable[int]) -> str:
    """Count the modules that a file changes, by component: `denoiser 2 modules, rank 4, 8`."""
    counts = Counter(module.component for module in groups.modules)
    facts = [f"{component} {count_noun(count, 'module')}" for component, count in counts.items()]
    rank_list = ", ".join(str(rank) for rank in ranks)
    if rank_list:
        facts.append(f"rank {rank_list}")
    return ", ".join(facts)


def describe_types(groups: KeyGroups) -> Iterator[Row]:
    """Describe the adapter types, and the keys that cannot be applied."""
    types: Counter[str] = Counter()
    for module in groups.modules:
        for part in module.by_part:
            if part in ADAPTER_TYPES:
                types[ADAPTER_TYPES[part]] += 1
    type_counts = ", ".join(f"{count} × {name}" for name, count in types.items())
    yield "adapter types", type_counts or "none that can be applied"

    reasons = Counter(groups.skipped.values())
    if reasons:
        left_out = [f"{count_noun(count, 'key')}: {reason}" for reason, count in reasons.items()]
        yield "cannot be applied", "; ".join(left_out)
    unread = list_unread_types(reasons)
    if unread:
        yield "what to do", describe_unread_types(unread)


def find_ranks(path: Path, header: Header) -> list[int]:
    """Find the ranks of low-rank pairs, in ascending order.

    Raises:
        FileError: for a pair without a shape.
    """
    ranks = set()
    for key, entry in header.items():
        if parse_key(key).part != "down":
            continue
        if not entry["shape"]:
            raise FileError(f"{path}: {key} has shape []; a low-rank pair has two dimensions")
        ranks.add(entry["shape"][0])
    return sorted(ranks)


def describe_triggers(path: Path, metadata: Mapping[str, str]) -> Iterator[Row]:
    """Describe the trigger words, the most reliable ones first."""
    triggers = list(iter_trigger_words(path, metadata))
    if not triggers:
        yield "trigger words", "not named"
    for trigger in triggers[:MAX_TRIGGERS]:
        source = trigger.source
        if trigger.is_guessed:
            source = f"{source}, from its training data"
        yield "trigger words", f"{', '.join(trigger.words)} ({source})"


def describe_few_step(path: Path, metadata: Mapping[str, str], base: str | None) -> Iterator[Row]:
    """Describe the few-step preset whose name the file bears, if any.

    Args:
        path: of the file.
        metadata: of its header.
        base: name of the base model that it is made for; None where that is unknown.
    """
    preset = few_step.detect_preset(path, metadata, base)
    if preset is not None:
        yield "few steps", f"looks like preset {preset}: set few_step: {preset} at its adapter"
        return
    other_preset = few_step.detect_preset(path, metadata)
    if other_preset is not None:
        yield "few steps", f"named like preset {other_preset}, which is not made for this base model"
