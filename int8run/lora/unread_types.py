"""Adapter types that are not applied, and other files that are taken for LoRAs: each by its name.

`unread_types.yaml` lists how their keys look and what a user can do instead. `parse_key` asks for every key,
`int8run.lora.match` writes the messages.
"""

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

TABLE_FILE = Path(__file__).with_name("unread_types.yaml")
# what a row can tell its type by
SIGNATURE_FIELDS = ("parts", "endings", "prefixes", "keys", "weights")
BESIDE_A_LORA = "keys_beside_a_lora"
ADAPTER_REASON, OTHER_REASON = "unsupported adapter type: ", ", not a LoRA"


@dataclass(frozen=True)
class UnreadType:
    """What a file holds that is not applied; a row of `unread_types.yaml`.

    Args:
        name: for people.
        convert: what can be done instead, as the end of a sentence.
        is_adapter: it changes modules of a model; False: the file is no LoRA.
    """

    name: str
    convert: str
    is_adapter: bool

    @property
    def reason(self) -> str:
        """Why its keys are not applied."""
        return f"{ADAPTER_REASON}{self.name}" if self.is_adapter else f"{self.name}{OTHER_REASON}"


@dataclass(frozen=True)
class Signatures:
    """How keys tell each type.

    Args:
        types: by reason, in the order of the table.
        by_part: piece of a key between dots -> type.
        by_ending: ending of a key -> type.
        by_prefix: beginning of a key -> type.
        by_key: whole key -> type.
        by_weight: piece of the key of a plain weight -> type.
        beside_a_lora: whole keys of plain weights, which all stand in a file that has a LoRA as well -> type.
    """

    types: Mapping[str, UnreadType]
    by_part: Mapping[str, UnreadType]
    by_ending: Mapping[str, UnreadType]
    by_prefix: Mapping[str, UnreadType]
    by_key: Mapping[str, UnreadType]
    by_weight: Mapping[str, UnreadType]
    beside_a_lora: Mapping[frozenset[str], UnreadType]


@functools.cache
def load_signatures() -> Signatures:
    """The content of `unread_types.yaml`."""
    table = yaml.safe_load(TABLE_FILE.read_text(encoding="utf-8"))
    types: dict[str, UnreadType] = {}
    by_field: dict[str, dict[str, UnreadType]] = {field: {} for field in SIGNATURE_FIELDS}
    beside_a_lora: dict[frozenset[str], UnreadType] = {}
    for section in ("adapters", "others"):
        for row in table[section]:
            unread = UnreadType(row["name"], row["convert"], is_adapter=section == "adapters")
            types[unread.reason] = unread
            for field, by_text in by_field.items():
                by_text.update(dict.fromkeys(row.get(field, ()), unread))
            if BESIDE_A_LORA in row:
                beside_a_lora[frozenset(row[BESIDE_A_LORA])] = unread
    return Signatures(
        types=types,
        by_part=by_field["parts"],
        by_ending=by_field["endings"],
        by_prefix=by_field["prefixes"],
        by_key=by_field["keys"],
        by_weight=by_field["weights"],
        beside_a_lora=beside_a_lora,
    )


def find_unread_type(key: str) -> tuple[UnreadType, str] | None:
    """The type that a key belongs to, and the name before the part that tells it; None: no such type."""
    signatures = load_signatures()
    if key in signatures.by_key:
        return signatures.by_key[key], key
    for prefix, unread in signatures.by_prefix.items():
        if key.startswith(prefix):
            return unread, key
    for ending, unread in signatures.by_ending.items():
        if key.endswith(ending):
            return unread, key.removesuffix(ending)
    return find_piece(key, signatures.by_part)


def find_unread_weight(key: str) -> UnreadType | None:
    """The type that the plain weight of this key belongs to; None: no such type."""
    found = find_piece(key, load_signatures().by_weight)
    return None if found is None else found[0]


def find_types_beside_a_lora(keys: Collection[str]) -> dict[str, str]:
    """Why plain weights of a file that holds a LoRA are not applied, by key; those of known types alone.

    In a file without a LoRA such keys are a model's own.

    Args:
        keys: of the file.
    """
    reasons: dict[str, str] = {}
    for together, unread in load_signatures().beside_a_lora.items():
        if together <= set(keys):
            reasons |= dict.fromkeys(together, unread.reason)
    return reasons


def find_piece(key: str, types: Mapping[str, UnreadType]) -> tuple[UnreadType, str] | None:
    """The type of the last piece between dots that is listed, and what stands before that piece."""
    pieces = key.split(".")
    for i in reversed(range(len(pieces))):
        if pieces[i] in types:
            return types[pieces[i]], ".".join(pieces[:i])
    return None


def list_unread_types(reasons: Iterable[str]) -> list[UnreadType]:
    """The types that these reasons name, in the order of the table."""
    named = set(reasons)
    return [unread for reason, unread in load_signatures().types.items() if reason in named]


def describe_unread_types(types: Iterable[UnreadType]) -> str:
    """What can be done about each: `VeRA is not applied: merge it …`."""
    return "; ".join(f"{unread.name} is not applied: {unread.convert}" for unread in types)
