"""Key mappings: the names that an architecture's authors use, and the names of the same parts in diffusers.

They are read from `key_mappings/*.yaml`. The state dict adapter applies them to checkpoints, the matching of
LoRA files to adapters, and the text encoders to their files. Nothing here knows about tensors or files of
weights. A file of key mappings:

    # model classes that it is for; "*": all; the name of a text encoder: the names in its files
    classes: [FluxTransformer2DModel]
    # what files written for other programs put before every name; without this field nothing
    prefix: "net."
    # modules of every model that has these names; a model without them cannot be written under them
    needs: [down.0.resnets.1.conv1]
    # modules that no such model has
    lacks: [down.0.resnets.2.conv1]
    # the authors' name of a module: its name in the model
    names:
      img_in: x_embedder
      # * is a number, the same on both sides; ** is any rest, at any one place of a name
      double_blocks.*.img_attn.proj: transformer_blocks.*.attn.to_out.0
      time_in.**: time_embed.**
      # one matrix there, several here: its rows in this order
      double_blocks.*.img_attn.qkv: [transformer_blocks.*.attn.to_q, ...]
      # several matrices there, one here: this is the first of its two equal parts
      double_blocks.*.img_mlp.up_proj: { to: transformer_blocks.*.ff.net.0.proj, part: 1/2 }
      # the two halves of the rows change places; `last`: only in the block with the greatest number
      final_layer.adaLN_modulation.1: { to: norm_out.linear, swap_halves: true }
      # written so only for a model that has no such module
      out.1.conv: { to: up.0.conv, without: up.0.attentions.** }
    # more names of modules, which only LoRA files use
    lora_names:
      double_blocks.*.qkv_lora1: double_blocks.*.img_attn.qkv
    # the same for whole keys, where the last part differs or stands for no module
    parameters:
      "**.key_norm.scale": "**.key_norm.weight"
      "**.attn.in_proj_weight": ["**.self_attn.q_proj.weight", ...]
      # the shape that it has there; the values keep their order
      blocks.*.mod.lin: { to: transformer_blocks.*.scale_shift_table, shape: [-1] }
      # a matrix there, its transpose here
      text_projection: { to: text_projection.weight, transposed: true }
    # keys of such files that the model has no place for: the reason
    drop:
      norm_final.weight: never used by its authors

Mappings apply one after the other, so one for blocks and one for what is inside them make names together.
Where several fit a name, the first counts, when a file is read and when one is written: the first mapping
for a module gives the name that is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import ConfigError
from int8run.models.key_mapping_checks import (
    check_classes,
    check_drop,
    check_fields,
    check_module_lists,
    check_options,
    check_part,
    check_prefix,
    check_shape,
    check_swap_halves,
    check_wildcards,
    check_without,
)
from int8run.models.name_pattern import is_name_pattern

MAPPING_FOLDER = Path(__file__).parent / "key_mappings"
ANY_CLASS = "*"
# what a mapping of each section may have besides `to`
SECTION_OPTIONS = {
    "names": ("swap_halves", "without", "part"),
    "lora_names": ("swap_halves", "without"),
    "parameters": ("shape", "transposed"),
}


@dataclass(frozen=True)
class KeyMapping:
    """One name of the authors and what it is in the model; a line of a file of key mappings.

    Args:
        original: the pattern of the authors' name.
        targets: patterns of the modules (or parameters) in the model whose rows it holds, in their order.
        swap_halves: exchange the halves of the rows: True, False, or `last`: only where the first `*` is the
            greatest.
        shape: the shape of the values in the authors' files, -1 for the number that follows from the rest;
            None: that of the model.
        without: only models in which no module has a name of this pattern use this name.
        whole_key: the names are whole keys, of parameters; else they are those of modules.
        transposed: the authors' matrix is the transpose of the model's.
        part: index and count where it holds one of several equal parts of the target's rows; None: all.
    """

    original: str
    targets: tuple[str, ...]
    swap_halves: bool | str = False
    shape: tuple[int, ...] | None = None
    without: str = ""
    whole_key: bool = False
    transposed: bool = False
    part: tuple[int, int] | None = None

    def extract_name(self, key: str) -> str:
        """Return what of a key the mapping is about: all of it, or its module."""
        return key if self.whole_key else key.rpartition(".")[0]

    def complete_key(self, name: str, key: str) -> str:
        """Return what becomes of `key` when the name that `extract_name` found in it becomes `name`."""
        return name if self.whole_key else f"{name}.{key.rpartition('.')[2]}"


@dataclass(frozen=True)
class KeyMappingSet:
    """What one file of key mappings holds.

    Args:
        names: mappings of modules.
        lora_names: mappings of modules that only LoRA files use.
        parameters: mappings of whole keys.
        drop: patterns of keys that the model has no place for, with the reason.
        prefix: what files for other programs put before every name.
        needs: modules that every model with these names has.
        lacks: modules that none of them has.
    """

    names: tuple[KeyMapping, ...] = ()
    lora_names: tuple[KeyMapping, ...] = ()
    parameters: tuple[KeyMapping, ...] = ()
    drop: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


def load_lora_mappings(class_name: str, folder: Path = MAPPING_FOLDER) -> tuple[KeyMapping, ...]:
    """Return the mappings of modules that LoRA files may use.

    These are the class's own, those that only LoRA files use, those of parameters that are not the weight or
    bias of a module, and those of all classes.

    Raises:
        ConfigError: for a malformed file of key mappings.
    """
    own = load_mappings(class_name, folder)
    common = load_mappings(ANY_CLASS, folder)
    parameters = tuple(
        # the weight of one of the authors' modules is called like that module
        replace(mapping, original=mapping.original.removesuffix(".weight"))
        for mapping in own.parameters
        if is_own_parameter(mapping)
    )
    return own.names + own.lora_names + parameters + common.names


def is_own_parameter(mapping: KeyMapping) -> bool:
    """Return whether a mapping renames a parameter that is not a module's, and leaves its values alone."""
    attribute = mapping.targets[0].rpartition(".")[2]
    is_plain = len(mapping.targets) == 1 and mapping.shape is None and not mapping.transposed
    return is_plain and attribute not in ("weight", "bias", "**")


def load_mappings(class_name: str, folder: Path = MAPPING_FOLDER) -> KeyMappingSet:
    """Return the key mappings of a model class; an empty set where no file names the class.

    Raises:
        ConfigError: for a malformed file of key mappings.
    """
    return read_mapping_folder(folder).get(class_name, KeyMappingSet())


@cache
def read_mapping_folder(folder: Path) -> Mapping[str, KeyMappingSet]:
    """Return the key mappings of all files of a folder by class name.

    Raises:
        ConfigError: for a malformed file, or a class that two files name.
    """
    by_class: dict[str, KeyMappingSet] = {}
    for file in sorted(folder.glob("*.yaml")):
        classes, mappings = read_mapping_file(file)
        for name in classes:
            if name in by_class:
                raise ConfigError(
                    f"{file.name}: class {name} has rules in another file as well; name it in one file only"
                )
            by_class[name] = mappings
    return by_class


def read_mapping_file(file: Path) -> tuple[list[str], KeyMappingSet]:
    """Return the classes and the key mappings of one file.

    Raises:
        ConfigError: for anything but the layout in the module's docstring; the message names the file, and
            the field or rule.
    """
    data = read_yaml(file)
    check_fields(file.name, data)
    check_classes(file.name, data["classes"])
    check_prefix(file.name, data)
    check_drop(file.name, data.get("drop", {}))
    check_module_lists(file.name, data)
    mappings = KeyMappingSet(
        names=parse_section(file.name, "names", data["names"]),
        lora_names=parse_section(file.name, "lora_names", data.get("lora_names", {})),
        parameters=parse_section(file.name, "parameters", data.get("parameters", {})),
        drop=data.get("drop", {}),
        prefix=data.get("prefix", ""),
        needs=tuple(data.get("needs", ())),
        lacks=tuple(data.get("lacks", ())),
    )
    return data["classes"], mappings


def read_yaml(file: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        ConfigError: when it cannot be parsed, or gives a key twice.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file.name} is not readable YAML: {' '.join(str(error).split())}") from error


def parse_section(file: str, section: str, content: Any) -> tuple[KeyMapping, ...]:
    """Return the key mappings of one section of a file.

    Args:
        file: its name, for messages.
        section: `names`, `lora_names` or `parameters`.
        content: what the file has there.

    Raises:
        ConfigError: for anything but a mapping, and for a malformed rule.
    """
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file}: {section} is {content!r}; it takes a mapping of a name elsewhere to a name in the model"
        )
    mappings = tuple(parse_mapping(file, section, original, value) for original, value in content.items())
    check_all_parts(file, mappings)
    return mappings


def check_all_parts(file: str, mappings: Sequence[KeyMapping]) -> None:
    """Raise ConfigError where only some parts of a module have rules: the rest of its rows would be lost."""
    parts: dict[tuple[str, ...], set[tuple[int, int]]] = {}
    for mapping in mappings:
        if mapping.part is not None:
            parts.setdefault(mapping.targets, set()).add(mapping.part)
    for targets, found in parts.items():
        counts = {count for _, count in found}
        count = max(counts)
        if len(counts) > 1 or len(found) < count:
            there = ", ".join(f"{index + 1}/{count}" for index, count in sorted(found))
            raise ConfigError(
                f"{file}: {targets[0]} has rules for its parts {there}; all parts from 1/{count} to "
                f"{count}/{count} need one"
            )


def parse_mapping(file: str, section: str, original: Any, value: Any) -> KeyMapping:
    """Return one key mapping, checked: strings, known options, the same wildcards on both sides.

    Args:
        file: its name, for messages.
        section: `names`, `lora_names` or `parameters`.
        original: the name elsewhere.
        value: the target, a list of targets, or a mapping with `to` and options.

    Raises:
        ConfigError: with the file, the rule and what it takes.
    """
    where = f"{file}: rule {original!r}"
    options = value if isinstance(value, dict) else {"to": value}
    check_options(where, options, allowed=SECTION_OPTIONS[section])
    targets = options["to"] if isinstance(options["to"], list) else [options["to"]]
    if not targets or not all(map(is_name_pattern, [original, *targets])):
        raise ConfigError(f"{where} points to {options['to']!r}; it takes a module name or a list of them")
    check_shape(where, options, targets)
    check_swap_halves(where, options.get("swap_halves", False), original, targets)
    check_without(where, options)
    check_part(where, options, targets)
    check_wildcards(where, original, targets)
    shape = options.get("shape")
    return KeyMapping(
        original=original,
        targets=tuple(targets),
        swap_halves=options.get("swap_halves", False),
        shape=None if shape is None else tuple(shape),
        without=options.get("without", ""),
        whole_key=section == "parameters",
        transposed=options.get("transposed", False),
        part=parse_part(options["part"]) if "part" in options else None,
    )


def parse_part(text: str) -> tuple[int, int]:
    """`1/2` -> (0, 2): the index and the count of equal parts."""
    number, count = text.split("/")
    return int(number) - 1, int(count)


class UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that rejects a key given twice; YAML's own takes the last one silently."""

    def construct_mapping(
        self,
        node: yaml.MappingNode,
        deep: bool = False,  # noqa: FBT001, FBT002 # the signature is yaml's
    ) -> dict[Any, Any]:
        """Return the mapping of a node.

        Raises:
            yaml.YAMLError: for a repeated key.
        """
        keys = [key.value for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.YAMLError(f"the key {repeated[0]!r} is given twice")
        return super().construct_mapping(node, deep)
