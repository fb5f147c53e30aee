"""Naming rules: how an architecture's modules and parameters are called outside diffusers, read from `key_mappings/*.yaml`.

A file of rules:

    classes: [FluxTransformer2DModel] # classes of models that the rules are for; "*": all; a text encoder's own name: names in files of it
    prefix: "net." # what files written for other programs put before every name; without this field nothing
    needs: [down.0.resnets.1.conv1] # modules of every model that has these names; one without them cannot be written under them
    lacks: [down.0.resnets.2.conv1] # modules that no such model has
    names: # name of a module elsewhere: name in the model
      img_in: x_embedder
      double_blocks.*.img_attn.proj: transformer_blocks.*.attn.to_out.0 # * is a number, the same on both sides
      time_in.**: time_embed.** # ** is any rest, at any one place of a name
      double_blocks.*.img_attn.qkv: [transformer_blocks.*.attn.to_q, ...] # one matrix there, several here: its rows in this order
      final_layer.adaLN_modulation.1: { to: norm_out.linear, swap_halves: true } # the two halves of the rows change places
      out.1.conv: { to: up.0.conv, without: up.0.attentions.** } # written so only for a model that has no such module
    lora_names: # more names of modules, which only LoRA files use
    parameters: # the same for whole keys, where the last word differs or stands for no module
      "**.key_norm.scale": "**.key_norm.weight"
      blocks.*.mod.lin: { to: transformer_blocks.*.scale_shift_table, shape: [-1] } # its shape there; the values stay in their order
      text_projection: { to: text_projection.weight, transposed: true } # a matrix there, its transpose here
      "**.attn.in_proj_weight": ["**.self_attn.q_proj.weight", ...] # rows of several, as with names
    drop: # keys of such files that the model has no place for: the reason
      norm_final.weight: never used by its authors

`swap_halves: last` swaps only in the block with the greatest number. Rules apply one after the other, so a rule for blocks and a
rule for what is inside them make names together. Where several fit a name, the first counts: in a file's own names as in the
model's, so the first rule for a module gives the name that is written.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import ConfigError

MAPPING_FOLDER = Path(__file__).parent / "key_mappings"
ANY_CLASS = "*"
SWAP_CHOICES = (False, True, "last")
SECTIONS = ("names", "lora_names", "parameters")
MODULE_LISTS = ("needs", "lacks")
FIELDS = {"classes", "prefix", "drop", *SECTIONS, *MODULE_LISTS}
OPTIONS = {
    "names": ("swap_halves", "without"),
    "lora_names": ("swap_halves", "without"),
    "parameters": ("shape", "transposed"),
}


@dataclass(frozen=True)
class KeyMapping:
    """One line of a file of rules.

    Args:
        native: the pattern of a name outside diffusers.
        targets: patterns of the modules whose rows it holds, in their order; of a parameter: that one.
        swap_halves: exchange the halves of the rows: True, False, or `last`: only where the first `*` is the greatest.
        shape: the shape of the values outside diffusers, -1 for the number that follows from the rest; None: the same on both sides.
        without: this name is given only by models in which no module has a name of this pattern.
        transposed: the matrix outside is the transpose of the one in the model.
        whole_key: the names are whole keys, parameters; else modules.
    """

    original: str
    targets: tuple[str, ...]
    swap_halves: bool | str = False
    shape: tuple[int, ...] | None = None
    without: str = ""
    whole_key: bool = False
    transposed: bool = False

    def extract_name(self, key: str) -> str:
        """What of a key the rule is about: all of it, or its module."""
        return key if self.whole_key else key.rpartition(".")[0]

    def complete_key(self, name: str, key: str) -> str:
        """The key that becomes of `key` when the rule calls its subject `name`."""
        return name if self.whole_key else f"{name}.{key.rpartition('.')[2]}"


@dataclass(frozen=True)
class KeyMappingSet:
    """What one file of rules says.

    Args:
        names: rules for modules.
        lora_names: rules for modules, for names that only LoRA files use.
        parameters: rules for whole keys.
        drop: patterns of keys that the model has no place for, with the reason.
        prefix: what stands before every name in a file for other programs.
        needs: modules of every model that is called so.
        lacks: modules of none of them.
    """

    names: tuple[KeyMapping, ...] = ()
    lora_names: tuple[KeyMapping, ...] = ()
    parameters: tuple[KeyMapping, ...] = ()
    drop: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


def load_lora_mappings(class_name: str, folder: Path = MAPPING_FOLDER) -> tuple[KeyMapping, ...]:
    """The rules for modules of a model class as LoRA files may use them: its own, those of LoRA files only, those of all classes.

    Raises:
        ConfigError: for a malformed file of rules.
    """
    own = load_mappings(class_name, folder)
    return own.names + own.lora_names + load_mappings(ANY_CLASS, folder).names


def load_mappings(class_name: str, folder: Path = MAPPING_FOLDER) -> KeyMappingSet:
    """What is known about the names of a model class; nothing where no file names it.

    Raises:
        ConfigError: for a malformed file of rules.
    """
    return read_mapping_folder(folder).get(class_name, KeyMappingSet())


@cache
def read_mapping_folder(folder: Path) -> Mapping[str, KeyMappingSet]:
    """All files of a folder: rules by class name.

    Raises:
        ConfigError: for a malformed file, or a class that two files name.
    """
    by_class: dict[str, KeyMappingSet] = {}
    for file in sorted(folder.glob("*.yaml")):
        classes, rules = read_mapping_file(file)
        for name in classes:
            if name in by_class:
                raise ConfigError(
                    f"{file.name}: class {name} has rules in another file as well; name it in one file only"
                )
            by_class[name] = rules
    return by_class


def read_mapping_file(file: Path) -> tuple[list[str], KeyMappingSet]:
    """The classes and the rules of one file.

    Raises:
        ConfigError: for anything but the layout above; the message names file and rule.
    """
    try:
        data = yaml.load(file.read_text(), Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file.name} is no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not {"classes", "names"} <= set(data) <= FIELDS:
        more = ", ".join(sorted(FIELDS - {"classes", "names"}))
        raise ConfigError(
            f"{file.name}: a file of naming rules is a mapping with classes and names, and may have {more}"
        )
    classes, drop, prefix = data["classes"], data.get("drop", {}), data.get("prefix", "")
    if not isinstance(classes, list) or not classes or not all(isinstance(c, str) for c in classes):
        raise ConfigError(f"{file.name}: classes is {classes!r}; it takes a list of class names")
    if not isinstance(prefix, str) or ("prefix" in data and not re.fullmatch(r"([^.*]+\.)+", prefix)):
        raise ConfigError(
            f"{file.name}: prefix is {prefix!r}; it takes the beginning of a name up to a dot, such as 'net.'"
        )
    if not isinstance(drop, dict) or not all(isinstance(reason, str) and reason for reason in drop.values()):
        raise ConfigError(
            f"{file.name}: drop is {drop!r}; it takes a mapping of a key's pattern to the reason"
        )
    for pattern in drop:
        if not is_name_pattern(pattern) or count_wildcards(pattern)[1] > 1:
            raise ConfigError(
                f"{file.name}: drop has the pattern {pattern!r}; it takes a key with * for numbers and one ** at most"
            )
    for kind in MODULE_LISTS:
        if not isinstance(data.get(kind, []), list) or not all(map(is_name_pattern, data.get(kind, []))):
            raise ConfigError(f"{file.name}: {kind} is {data[kind]!r}; it takes a list of module names")
    names, lora_names, parameters = (parse_section(file.name, kind, data.get(kind, {})) for kind in SECTIONS)
    needs, lacks = (tuple(data.get(kind, ())) for kind in MODULE_LISTS)
    return classes, KeyMappingSet(names, lora_names, parameters, drop, prefix, needs, lacks)


def parse_section(file: str, kind: str, section: object) -> tuple[KeyMapping, ...]:
    """The rules of one mapping of a file; `kind` is its name.

    Raises:
        ConfigError: for anything but a mapping, and for a rule that is none.
    """
    if not isinstance(section, dict):
        raise ConfigError(
            f"{file}: {kind} is {section!r}; it takes a mapping of a name elsewhere to a name in the model"
        )
    return tuple(parse_mapping(file, native, value, kind) for native, value in section.items())


def parse_mapping(file: str, native: object, value: Any, kind: str = "names") -> KeyMapping:
    """One rule of the mapping `kind`, checked: strings, known fields, the same wildcards on both sides.

    Raises:
        ConfigError: with the file, the rule and what it takes.
    """
    where = f"{file}: rule {native!r}"
    options = value if isinstance(value, dict) else {"to": value}
    allowed = OPTIONS[kind]
    if "to" not in options or not set(options) <= {"to", *allowed}:
        raise ConfigError(
            f"{where} has the fields {', '.join(map(str, options))}; it takes to, and may have {' or '.join(allowed)}"
        )
    targets = options["to"] if isinstance(options["to"], list) else [options["to"]]
    patterns = [native, *targets]
    if not targets or not all(map(is_name_pattern, patterns)):
        raise ConfigError(f"{where} points to {options['to']!r}; it takes a module name or a list of them")
    swap, shape, without = options.get("swap_halves", False), options.get("shape"), options.get("without", "")
    transposed = options.get("transposed", False)
    if len(targets) > 1 and ("shape" in options or transposed):
        raise ConfigError(f"{where} changes the shape of several parameters; only a rule with one can")
    if swap not in SWAP_CHOICES or (isinstance(swap, int) and not isinstance(swap, bool)):
        raise ConfigError(f"{where} has swap_halves {swap!r}; choose true, false or last")
    if swap and len(targets) > 1:
        raise ConfigError(f"{where} swaps the halves of several modules; only a rule with one module can")
    if swap == "last" and "*" not in str(native).split("."):
        raise ConfigError(f"{where} swaps halves in the last block but has no * for its number")
    if "shape" in options and not is_target_shape(shape):
        raise ConfigError(
            f"{where} has the shape {shape!r}; it takes a list of whole numbers above 0, and -1 for one of them"
        )
    if not isinstance(transposed, bool):
        raise ConfigError(f"{where} has transposed {transposed!r}; choose true or false")
    if "without" in options and (not is_name_pattern(without) or count_wildcards(without)[1] > 1):
        raise ConfigError(f"{where} has without {without!r}; it takes the pattern of a module name")
    if len(set(map(count_wildcards, patterns))) > 1 or count_wildcards(str(native))[1] > 1:
        raise ConfigError(f"{where}: both sides need the same number of *, and the same ** (one at most)")
    shape = None if shape is None else tuple(shape)
    return KeyMapping(str(native), tuple(targets), swap, shape, without, kind == "parameters", transposed)


def is_name_pattern(pattern: object) -> bool:
    """A name whose parts between dots are not empty."""
    return isinstance(pattern, str) and all(pattern.split("."))


def is_target_shape(shape: object) -> bool:
    """A list of sizes, one of them at most -1."""
    if not isinstance(shape, list) or not shape or shape.count(-1) > 1:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and (n > 0 or n == -1) for n in shape)


def count_wildcards(pattern: str) -> tuple[int, int]:
    """How many `*` and `**` a pattern has; any other use of the star counts as a `**` too many."""
    segments = pattern.split(".")
    odd = sum("*" in s and s not in ("*", "**") for s in segments)
    return segments.count("*"), segments.count("**") + 2 * odd


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern; a group for each wildcard."""
    groups = {"*": r"(?P<n{}>\d+)", "**": "(?P<rest>.+)"}
    parts = [groups[s].format(i) if s in groups else re.escape(s) for i, s in enumerate(pattern.split("."))]
    return re.compile(r"\.".join(parts))


def match_pattern(pattern: str, name: str) -> tuple[tuple[str, ...], str] | None:
    """What the wildcards of a pattern stand for in a name, numbers first; None when it does not match."""
    found = compile_pattern(pattern).fullmatch(name)
    if found is None:
        return None
    groups = found.groupdict()
    return tuple(v for k, v in groups.items() if k != "rest"), groups.get("rest", "")


def fill_pattern(pattern: str, values: tuple[Iterable[str], str]) -> str:
    """A pattern with its wildcards replaced by what `captures` found."""
    numbers, rest = iter(values[0]), values[1]
    return ".".join(
        {"*": lambda: next(numbers), "**": lambda: rest}.get(s, lambda s=s: s)() for s in pattern.split(".")
    )


def find_greatest_number(pattern: str, names: Iterable[str]) -> int:
    """The greatest number that the first `*` of a pattern stands for in names; -1 when none matches."""
    return max((int(values[0][0]) for name in names if (values := match_pattern(pattern, name))), default=-1)


class UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; YAML's own takes the last and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node.

        Raises:
            yaml.YAMLError: for a repeated key.
        """
        keys = [key.value for key, _ in node.value]
        repeated = sorted({str(k) for k in keys if keys.count(k) > 1})
        if repeated:
            raise yaml.YAMLError(f"the key {repeated[0]!r} is given twice")
        return super().construct_mapping(node, deep)
