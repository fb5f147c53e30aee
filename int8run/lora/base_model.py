"""For which base model a LoRA was made, told from its header before anything is loaded.

Names and shapes of the tensors count first: they are compared with `bases.yaml`, which lists architectures
and the models that have them. Then come the tags of the metadata, which are often wrong.
`lora/header_info.py` rejects files of other base models with it, `task=inspect` shows what it finds.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import LoraError
from int8run.lora.find import get_file_title
from int8run.lora.layer_sizes import LayerSize, read_layer_sizes

TABLE_FILE = Path(__file__).with_name("bases.yaml")
TAG_KEYS = ("ss_base_model_version", "modelspec.architecture")
MAX_TAG_CHARS = 100
# a module in a list of blocks: name of the list, index
BLOCK_PATTERN = re.compile(r"([a-z_]+?)_(\d{1,4})_.*")
# sizes of a layer in `bases.yaml`, inputs and outputs: numbers, multiples of a letter (`3h`), or None for any
ExpectedSize = Sequence[str | int | None]


@dataclass(frozen=True)
class LoraBase:
    """The base model that a file was made for.

    Args:
        name: a key of `bases.yaml`; models use the same words as their `lora_base`.
        evidence: `shapes`, which are sure, or `tag`, which is often wrong.
        detail: the size that shows it, such as `hidden 6144`; empty where none does.
        alternatives: bases that a file like this could be for as well.
        tag: what the header says, where it contradicts the shapes.
    """

    name: str
    evidence: str
    detail: str = ""
    alternatives: tuple[str, ...] = ()
    tag: str | None = None

    @property
    def possible_names(self) -> tuple[str, ...]:
        """All bases that the file could be for, the likeliest first."""
        return self.name, *self.alternatives

    def __str__(self) -> str:
        reasons = [self.detail] if self.detail else []
        reasons.append(f"by its {self.evidence}")
        if self.tag:
            reasons.append(f"its tag says {self.tag}")
        return f"{format_titles(self.possible_names)} ({', '.join(reasons)})"


@functools.cache
def load_table() -> Mapping[str, Any]:
    """The content of `bases.yaml`."""
    table: Mapping[str, Any] = yaml.safe_load(TABLE_FILE.read_text(encoding="utf-8"))
    return table


def detect_lora_base(header: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]) -> LoraBase | None:
    """The base model of a LoRA file.

    Args:
        header: tensor name -> entry with its `shape`, as `read_header` returns it.
        metadata: of the header, untrusted.

    Returns:
        None when neither names and shapes nor tags tell.
    """
    possible = find_possible_bases(read_layer_sizes(header))
    tag, tagged = read_tag(metadata)
    if not possible and not tagged:
        return None
    if not possible:
        return LoraBase(tagged[0], "tag", alternatives=tuple(tagged[1:]))

    # a tag may choose between bases of the same shapes, and cannot add one
    likely = sorted(possible, key=lambda name: name not in tagged)
    is_contradicted = bool(tagged) and likely[0] not in tagged
    return LoraBase(
        name=likely[0],
        evidence="shapes",
        detail=describe_common_size(likely),
        alternatives=tuple(likely[1:]),
        tag=tag if is_contradicted else None,
    )


def check_lora_base(path: Path, found: LoraBase | None, model_base: str) -> str | None:
    """Check that a file can be for the base of a model.

    Args:
        path: of the file, for messages.
        found: what `detect_lora_base` found for it.
        model_base: the model's `lora_base`; one that is not in `bases.yaml` is never rejected.

    Returns:
        A warning where the file may not suit the model, or None.

    Raises:
        LoraError: when its shapes surely are those of another base.
    """
    if found is None or model_base not in load_table()["bases"]:
        return None
    title, model_title = get_file_title(path), get_title(model_base)
    if model_base in found.possible_names and found.tag is None:
        return None
    if model_base in found.possible_names:
        return (
            f"{title}: its header says {found.tag!r}, its shapes are those of {get_title(found.name)}; "
            "the shapes count"
        )

    for name in found.possible_names:
        consequence = load_table()["partly_fits"].get(name, {}).get(model_base)
        if consequence is not None:
            return f"{title} was made for {get_title(name)}, the model is {model_title}: {consequence}"

    titles = format_titles(found.possible_names)
    if found.evidence == "tag":
        return f"{title}: its header says that it was made for {titles}, the model is {model_title}"
    reason = found.detail or "by the names in it"
    raise LoraError(
        f"{title} was made for {titles} ({reason}), "
        f"the model is {model_title} ({describe_main_size(model_base)}); "
        f"choose a LoRA made for {model_title}, or the model that this one was made for"
    )


def get_title(name: str) -> str:
    """The name of a base for messages."""
    title: str = load_table()["bases"][name]["title"]
    return title


def format_titles(names: Sequence[str]) -> str:
    """Names of several bases for messages."""
    return " or ".join(get_title(name) for name in names)


def describe_main_size(name: str) -> str:
    """The size that distinguishes a base from similar ones."""
    sizes = load_table()["bases"][name]["sizes"]
    return f"hidden {sizes['h']}" if "h" in sizes else f"text width {sizes['t']}"


def describe_common_size(names: Sequence[str]) -> str:
    """The size that distinguishes these bases from others; empty where they differ in it."""
    sizes = {describe_main_size(name) for name in names}
    if len(sizes) > 1:
        return ""
    return sizes.pop()


@dataclass(frozen=True)
class KnownLayer:
    """A layer of a file that some architecture has.

    Args:
        size: in the file.
        sizes_by_architecture: the sizes that it has in each architecture that has it.
    """

    size: LayerSize
    sizes_by_architecture: Mapping[str, Sequence[ExpectedSize]]

    def can_belong_to(self, base: Mapping[str, Any]) -> bool:
        """Whether a base of `bases.yaml` has such a layer, in this size."""
        expected_sizes = self.sizes_by_architecture.get(base["architecture"], ())
        return has_expected_size(self.size, expected_sizes, base["sizes"])


def find_possible_bases(layer_sizes: Mapping[str, LayerSize]) -> list[str]:
    """Bases that a file with these layers can be for, the likeliest first.

    Each layer that any architecture knows must be one of the base's own, with its size, and no block may be
    beyond the last one of the base. The likeliest base is the one whose last blocks are in the file.

    Args:
        layer_sizes: of the modules in the file, by name with every `.` as `_`.
    """
    last_blocks = find_last_blocks(layer_sizes)
    known_layers = []
    for name, size in drop_similar_blocks(layer_sizes).items():
        sizes_by_architecture = find_architectures(name)
        if sizes_by_architecture:
            known_layers.append(KnownLayer(size, sizes_by_architecture))
    if not known_layers:
        return []

    num_complete_lists: dict[str, int] = {}
    for name, base in load_table()["bases"].items():
        if not all(layer.can_belong_to(base) for layer in known_layers):
            continue
        num_blocks = {blocks: n for blocks, n in base.get("blocks", {}).items() if blocks in last_blocks}
        if any(last_blocks[blocks] >= n for blocks, n in num_blocks.items()):
            continue
        num_complete_lists[name] = sum(last_blocks[blocks] == n - 1 for blocks, n in num_blocks.items())
    return sorted(num_complete_lists, key=lambda name: -num_complete_lists[name])


def find_last_blocks(names: Iterable[str]) -> dict[str, int]:
    """The greatest index in each list of blocks."""
    last_blocks: dict[str, int] = {}
    for name in names:
        block = BLOCK_PATTERN.fullmatch(name)
        if block:
            blocks, index = block[1], int(block[2])
            last_blocks[blocks] = max(last_blocks.get(blocks, 0), index)
    return last_blocks


def drop_similar_blocks(layer_sizes: Mapping[str, LayerSize]) -> dict[str, LayerSize]:
    """One layer for all those that differ only in the index of their block: matching names is slow."""
    representatives: dict[tuple[str, LayerSize], str] = {}
    for name, size in layer_sizes.items():
        block = BLOCK_PATTERN.match(name)  # at the beginning: a search takes the square of the length
        without_index = name
        if block is not None:
            without_index = name[: block.start(2)] + "#" + name[block.end(2) :]
        representatives.setdefault((without_index, size), name)
    return {name: size for (_, size), name in representatives.items()}


def find_architectures(module: str) -> dict[str, list[ExpectedSize]]:
    """The architectures that have a module of this name, each with the sizes that it has there."""
    architectures: dict[str, list[ExpectedSize]] = {}
    for architecture, pattern, size in load_module_patterns():
        if pattern.fullmatch(module):
            architectures.setdefault(architecture, []).append(size)
    return architectures


@functools.cache
def load_module_patterns() -> list[tuple[str, re.Pattern[str], ExpectedSize]]:
    """Every row of the architectures: architecture, pattern of module names, size."""
    rows = []
    for architecture, entry in load_table()["architectures"].items():
        for pattern, size in entry["modules"].items():
            names = re.compile(pattern.replace("#", r"\d+"))  # `#` stands for the number of a block
            rows.append((architecture, names, size))
    return rows


def has_expected_size(
    size: LayerSize, expected_sizes: Sequence[ExpectedSize], letters: Mapping[str, int]
) -> bool:
    """Whether a layer has every size that an architecture gives it, as far as both are known.

    Args:
        size: in the file.
        expected_sizes: in the architecture; empty: it has no such layer.
        letters: the base's value of each letter.
    """
    if not expected_sizes:
        return False
    for expected_size in expected_sizes:
        for measured, expression in zip(size, expected_size, strict=True):
            expected = resolve_size(expression, letters)
            if measured is not None and expected is not None and measured != expected:
                return False
    return True


def resolve_size(expression: str | int | None, letters: Mapping[str, int]) -> int | None:
    """`3h` with h = 3072 -> 9216; None where the base does not have the letter."""
    if not isinstance(expression, str):
        return expression
    factor, letter = expression[:-1], expression[-1]
    if letter not in letters:
        return None
    return int(factor or 1) * letters[letter]


def read_tag(metadata: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The first known tag, in the order of TAG_KEYS, cut and made printable; and the bases that it names.

    Where it begins with several tags of `bases.yaml`, these are the bases whose tag is the longest.
    """
    for key in TAG_KEYS:
        raw = metadata.get(key, "")[:MAX_TAG_CHARS]
        matched_chars = count_matched_chars(raw)
        longest = max(matched_chars.values())
        if longest:
            printable = " ".join(re.sub(r"[^ -~]", " ", raw).split())
            return printable, [name for name, count in matched_chars.items() if count == longest]
    return None, []


def count_matched_chars(raw: str) -> dict[str, int]:
    """The length of each base's longest tag that a tag of the metadata begins with; 0 where none is.

    Args:
        raw: such as `flux-1-dev/lora`; only letters and digits count.
    """
    words = re.sub(r"[^a-z0-9]+", "-", raw.lower()).strip("-") + "-"
    matched_chars = {}
    for name, base in load_table()["bases"].items():
        tags = [tag for tag in base["tags"] if words.startswith(f"{tag}-")]
        matched_chars[name] = max(map(len, tags), default=0)
    return matched_chars
