"""For which base model a LoRA was made, told from its header: names and shapes of its tensors first, then what its tags say."""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import LoraError
from int8run.lora.key_parsing import DENOISER, parse_key

TABLE_FILE = Path(__file__).with_name("bases.yaml")
TAG_KEYS = ("ss_base_model_version", "modelspec.architecture")
MAX_TAG = 100
BLOCK = re.compile(r"([a-z_]+?)_(\d{1,4})_.*")

LayerSize = tuple[int | None, int | None]  # inputs, outputs; None: not told


@dataclass(frozen=True)
class LoraBase:
    """The base model that a file was made for.

    Args:
        name: a key of `bases.yaml`; models use the same words as their `lora_base`.
        by: `shapes`, which are sure, or `tag`, which is often wrong.
        detail: the size that shows it, such as `hidden 6144`; empty where none does.
        others: bases that a file like this could be for as well.
        tag: what the header says, where it contradicts the shapes.
    """

    name: str
    evidence: str
    detail: str = ""
    alternatives: tuple[str, ...] = ()
    tag: str | None = None

    def __str__(self) -> str:
        titles = " or ".join(get_title(name) for name in (self.name, *self.alternatives))
        return f"{titles} ({', '.join(filter(None, (self.detail, f'by its {self.evidence}', self.tag and f'its tag says {self.tag}')))})"


@functools.cache
def load_table() -> Mapping[str, Any]:
    """What `bases.yaml` says."""
    return yaml.safe_load(TABLE_FILE.read_text(encoding="utf-8"))


def detect_lora_base(header: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]) -> LoraBase | None:
    """The base model of a LoRA file, or None when neither names and shapes nor tags tell.

    Args:
        header: tensor name -> entry with its `shape`, as `read_header` gives it.
    """
    possible = find_possible_bases(read_layer_sizes(header))
    tag, named = read_tag(metadata)
    if not possible:
        return LoraBase(named[0], "tag", "", tuple(named[1:])) if named else None
    # a tag may choose between bases of the same shapes, and no other
    likely = sorted(possible, key=lambda name: name not in named)
    shown = describe_main_size(likely[0]) if len({describe_main_size(name) for name in likely}) == 1 else ""
    return LoraBase(
        likely[0], "shapes", shown, tuple(likely[1:]), tag if named and likely[0] not in named else None
    )


def check_lora_base(path: Path, found: LoraBase | None, wanted: str) -> str | None:
    """A warning where a file may not suit the model's base, or None.

    Args:
        found: what `base_of` says of the file.
        wanted: the model's `lora_base`; one that `bases.yaml` does not know is never refused.

    Raises:
        LoraError: when its shapes surely are those of another base.
    """
    if found is None or wanted not in load_table()["bases"]:
        return None
    possible = (found.name, *found.alternatives)
    if wanted in possible:
        if found.tag is None:
            return None
        return f"{path.name}: its header says {found.tag!r}, its shapes are those of {get_title(found.name)}; the shapes count"
    for name in possible:
        if (partly := load_table()["partly_fits"].get(name, {}).get(wanted)) is not None:
            return f"{path.name} was made for {get_title(name)}, the model is {get_title(wanted)}: {partly}"
    names = " or ".join(get_title(name) for name in possible)
    if found.evidence == "tag":
        return f"{path.name}: its header says that it was made for {names}, the model is {get_title(wanted)}"
    raise LoraError(
        f"{path.name} was made for {names} ({found.detail or 'by the names in it'}), the model is {get_title(wanted)} ({describe_main_size(wanted)}); "
        f"choose a LoRA made for {get_title(wanted)}, or the model that this one was made for"
    )


def get_title(name: str) -> str:
    """The name of a base for messages."""
    return load_table()["bases"][name]["title"]


def describe_main_size(name: str) -> str:
    """The size that tells a base from its neighbours."""
    known = load_table()["bases"][name]["sizes"]
    return f"hidden {known['h']}" if "h" in known else f"text width {known['t']}"


# -- names and shapes --------------------------------------------------------------------------------------------------


def read_layer_sizes(header: Mapping[str, Mapping[str, Any]]) -> dict[str, LayerSize]:
    """Inputs and outputs of the denoiser's modules in a file, by name with every `.` as `_`."""
    modules: dict[str, dict[str, Sequence]] = {}
    for key, entry in header.items():
        component, name, part, _ = parse_key(key)
        if component == DENOISER:
            modules.setdefault(name.replace(".", "_"), {})[part or ""] = entry["shape"]
    return {name: infer_layer_size(parts) for name, parts in modules.items()}


def infer_layer_size(parts: Mapping[str, Sequence]) -> LayerSize:
    """Inputs and outputs of the layer that these parts of a change belong to."""

    def axis(part: str, index: int) -> int | None:
        shape = parts.get(part, ())
        return shape[index] if len(shape) > 1 and type(shape[index]) is int else None

    def product(*factors: int | None) -> int | None:
        return None if None in factors else functools.reduce(int.__mul__, factors)  # type: ignore[arg-type]

    if "down" in parts or "up" in parts:
        return axis("down", 1), axis("up", 0)
    if "hada_w1_a" in parts and "hada_t1" not in parts:
        return axis("hada_w1_b", 1), axis("hada_w1_a", 0)
    if any(part.startswith("lokr_") for part in parts) and "lokr_t2" not in parts:
        inputs = [axis(w, 1) or axis(f"{w}_b", 1) for w in ("lokr_w1", "lokr_w2")]
        outputs = [axis(w, 0) or axis(f"{w}_a", 0) for w in ("lokr_w1", "lokr_w2")]
        return product(*inputs), product(*outputs)
    whole = "diff" if "diff" in parts else "weight"
    return axis(whole, 1), axis(whole, 0)


def find_possible_bases(modules: Mapping[str, LayerSize]) -> list[str]:
    """Bases that a file with these modules can be for, the likeliest first."""
    last: dict[str, int] = {}
    kinds: dict[tuple[str, LayerSize], str] = {}  # one module for all blocks that are alike
    for name, size in modules.items():
        if block := BLOCK.fullmatch(name):
            last[block[1]] = max(last.get(block[1], 0), int(block[2]))
        kinds.setdefault((BLOCK.sub(lambda m: m[0].replace(m[2], "#", 1), name), size), name)
    claims = [(size, claimed) for (_, size), name in kinds.items() if (claimed := find_architectures(name))]
    found = {}
    for name, base in load_table()["bases"].items():
        mine = [(size, claimed.get(base["architecture"])) for size, claimed in claims]
        blocks = {prefix: count for prefix, count in base.get("blocks", {}).items() if prefix in last}
        if (
            mine
            and all(has_expected_size(size, wishes, base["sizes"]) for size, wishes in mine)
            and all(last[p] < n for p, n in blocks.items())
        ):
            found[name] = sum(last[prefix] == count - 1 for prefix, count in blocks.items())
    return sorted(found, key=lambda name: -found[name])


def find_architectures(module: str) -> dict[str, list[Sequence]]:
    """The architectures that have a module of this name, each with the sizes that it has there."""
    claims: dict[str, list[Sequence]] = {}
    for architecture, pattern, wish in load_module_patterns():
        if pattern.fullmatch(module):
            claims.setdefault(architecture, []).append(wish)
    return claims


@functools.cache
def load_module_patterns() -> list[tuple[str, re.Pattern, Sequence]]:
    """Every row of the architectures: its name, the pattern and the sizes."""
    return list(iter_module_patterns())


def iter_module_patterns() -> Iterator[tuple[str, re.Pattern, Sequence]]:
    """The rows, one after the other."""
    for architecture, entry in load_table()["architectures"].items():
        for pattern, wish in entry["modules"].items():
            yield architecture, re.compile(pattern.replace("#", r"\d+")), wish


def has_expected_size(size: LayerSize, wishes: Sequence[Sequence] | None, letters: Mapping[str, int]) -> bool:
    """Whether a module has the sizes that an architecture gives it; None: it has no such module."""
    if wishes is None:
        return False
    wanted = [
        (measured, resolve_size(wish, letters))
        for row in wishes
        for measured, wish in zip(size, row, strict=True)
    ]
    return all(measured is None or wish is None or measured == wish for measured, wish in wanted)


def resolve_size(wish: str | int | None, letters: Mapping[str, int]) -> int | None:
    """`3h` with h = 3072 -> 9216."""
    if not isinstance(wish, str):
        return wish
    return int(wish[:-1] or 1) * letters[wish[-1]] if wish[-1] in letters else None


# -- tags --------------------------------------------------------------------------------------------------------------


def read_tag(metadata: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The header's tag as it stands there, and the bases that it means."""
    for key in TAG_KEYS:
        raw = metadata.get(key, "")[:MAX_TAG]
        words = re.sub(r"[^a-z0-9]+", "-", raw.lower()).strip("-") + "-"
        fitting = {
            name: max((len(tag) for tag in base["tags"] if words.startswith(f"{tag}-")), default=0)
            for name, base in load_table()["bases"].items()
        }
        if longest := max(fitting.values()):
            return " ".join(re.sub(r"[^ -~]", " ", raw).split()), [
                name for name, length in fitting.items() if length == longest
            ]
    return None, []
