"""What is known about text encoders, from `encoders/*.yaml`: which one a file holds, how its parts are called, and its configuration.

A file of an encoder is called by its name and holds the fields of `Encoder`. One without classes is known by its names alone: a file
of it is refused by name, and not taken for another. Canonical names are those of ComfyUI's stand-alone files; other spellings are in
`models/key_mappings/text_*.yaml`, under the encoders' names.

Sizes in `config` are read from a file:

    hidden_size: { rows: model.norm.weight } # or columns; of a tensor by its canonical name
    num_heads: { rows: model.layers.0.self_attn.q_proj.weight, over: head_dim } # divided by another field, or by a number
    depth: { count: visual.blocks.*.norm1.weight, default: 32 } # as many as there are; what holds where there is none
    tie_word_embeddings: { absent: lm_head.weight } # whether the file lacks it
"""

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from int8run.errors import ConfigError, FileError, suggest_similar
from int8run.models.detect_family import has_match
from int8run.models.family import parse_item
from int8run.models.key_mapping import KeyMappingSet, load_mappings
from int8run.models.state_dict_adapter import (
    Shape,
    StateDictLayout,
    TensorPart,
    find_drop_reason,
    resolve_key,
    to_model,
)

log = logging.getLogger(__name__)
ENCODER_FOLDER = Path(__file__).parent / "encoders"
SIZE_KEYS = {"rows", "columns", "count", "absent"}


@dataclass(frozen=True)
class EncoderFingerprint:
    """How an encoder is known by the canonical names in a file.

    Args:
        all: fnmatch patterns; each matches some key.
        none: fnmatch patterns; none matches any key.
        rows: tensors and how many rows they have.
        not_rows: tensors and how many rows they do not have; one that the file lacks has none.
    """

    all: Sequence[str]
    none: Sequence[str] = ()
    rows: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    not_rows: Mapping[str, int | Sequence[int]] = field(default_factory=dict)

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether these are the tensors of such an encoder."""
        return (
            all(has_match(pattern, shapes) for pattern in self.all)
            and not any(has_match(pattern, shapes) for pattern in self.none)
            and all(
                key in shapes and count_rows(shapes[key]) in as_sequence(n) for key, n in self.rows.items()
            )
            and not any(
                key in shapes and count_rows(shapes[key]) in as_sequence(n)
                for key, n in self.not_rows.items()
            )
        )


@dataclass(frozen=True)
class OptionalModules:
    """What not every class has a place for, and many files lack, since no text needs it: it is taken out of a model where they do.

    Args:
        pattern: fnmatch pattern of canonical names of parameters. None of them is in such a file.
        why: the reason.
        passes: when it is taken out, what comes in goes on as it is; else a call is an error.
        required: a class that has it needs it, so it is never taken out.
    """

    pattern: str
    reason: str
    pass_through: bool = False
    required: bool = False


@dataclass(frozen=True)
class EncoderIgnoreRule:
    """Layers that stay float when weights are quantized here.

    Args:
        pattern: fnmatch pattern of canonical layer names.
        why: the reason, for people.
        formats: in which they do; none: in all.
    """

    pattern: str
    reason: str
    formats: Sequence[str] = ()


@dataclass(frozen=True)
class ConfigVariant:
    """What of a configuration depends on sizes.

    Args:
        rows: tensors and how many rows they have.
        config: fields that are other for them.
    """

    rows: Mapping[str, int]
    config: Mapping[str, Any]


# fields of an encoder that are rows of a table, and what a row is
ITEM_TYPES: Mapping[str, type] = {
    "fingerprints": EncoderFingerprint,
    "ignore": EncoderIgnoreRule,
    "optional_modules": OptionalModules,
    "variants": ConfigVariant,
}


@dataclass(frozen=True)
class EncoderFamily:
    """One text encoder, of one size or of several. The rows of its tables may be given as mappings, as YAML has them.

    Args:
        name: the word used for it everywhere.
        classes: of transformers that hold such weights, the usual one first; none: known and not supported.
        fingerprints: files that hold it; one of them fits.
        float_layers: rules for layers, by canonical names, that stay float when weights are quantized here; the first counts.
        tables: embeddings whose weight the model asks for, besides looking rows up; quantized ones are floats in memory.
        spare: what a text does not need, and files may lack.
        twins: names of tensors that are others once more, and of those.
        drop: canonical names that have no place in this encoder: the reason.
        tokens: of a usual call.
        tokenizer: where it is on the hub: `location` and `subfolder`.
        config: of its classes; sizes as in the module's docstring.
        variants: the same for some sizes.
    """

    name: str
    classes: Sequence[str] = ()
    fingerprints: Sequence[EncoderFingerprint] = ()
    ignore: Sequence[EncoderIgnoreRule] = ()
    float_embeddings: Sequence[str] = ()
    optional_modules: Sequence[OptionalModules] = ()
    tied_weights: Mapping[str, str] = field(default_factory=dict)
    drop: Mapping[str, str] = field(default_factory=dict)
    num_tokens: int = 77
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    variants: Sequence[ConfigVariant] = ()

    def __post_init__(self) -> None:
        for name, kind in ITEM_TYPES.items():
            rows = [
                parse_item(kind, row, f"{self.name}.{name}.{i}") for i, row in enumerate(getattr(self, name))
            ]
            object.__setattr__(self, name, tuple(rows))  # the class is frozen

    @property
    def key_mappings(self) -> KeyMappingSet:
        """Other spellings of its parts."""
        return load_mappings(self.name)

    def to_canonical(self, key: str) -> tuple[TensorPart, ...]:
        """The tensors that a key of a file holds, one after the other; what is no name of this encoder stays as it is."""
        return resolve_key(key, self.key_mappings, {}, ())

    def needs_float_embedding(self, layer: str) -> bool:
        """Whether the model asks for the weight of an embedding itself; names as in `why_float`."""
        name = self.to_canonical(f"{layer}.weight")[0].key.removesuffix(".weight")
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.float_embeddings)

    def find_skip_reason(self, layer: str, form: str) -> str | None:
        """The reason why a layer stays float, or None when it is quantized.

        Args:
            layer: its name in a file or in the model, without `.weight`.
            form: the format of `clip=`.
        """
        names = [part.key.removesuffix(".weight") for part in self.to_canonical(f"{layer}.weight")]
        rules = [rule for rule in self.ignore if not rule.formats or form in rule.formats]
        return next(
            (rule.reason for rule in rules if any(fnmatch.fnmatchcase(name, rule.pattern) for name in names)),
            None,
        )


@cache
def load_encoders(folder: Path = ENCODER_FOLDER) -> Mapping[str, EncoderFamily]:
    """All encoders that are known, by name. Read when a job needs them."""
    return {
        file.stem: EncoderFamily(name=file.stem, **yaml.safe_load(file.read_text(encoding="utf-8")))
        for file in sorted(folder.glob("*.yaml"))
    }


def get_encoder(name: str) -> EncoderFamily:
    """A supported encoder by its name.

    Raises:
        ConfigError: for a name that is none.
    """
    known = list_supported_encoders()
    if name not in known:
        raise ConfigError(
            f"no text encoder called {name!r}; {suggest_similar(name, known)}choose from {', '.join(known)}"
        )
    return known[name]


def list_supported_encoders() -> dict[str, EncoderFamily]:
    """The encoders that can be loaded."""
    return {name: encoder for name, encoder in load_encoders().items() if encoder.classes}


def map_canonical_names(
    encoder: EncoderFamily, shapes: Mapping[str, Shape]
) -> tuple[dict[str, tuple[TensorPart, ...]], dict[str, str]]:
    """The canonical names of a file's tensors.

    Args:
        shapes: logical shapes by names without prefix, without what belongs to quantized layers.

    Returns:
        What each canonical tensor is made of; and the keys that have no place, with the reason.

    Raises:
        FileError: when two tensors are one, or rows cannot be shared out.
    """
    kept, dropped = split_dropped(encoder, shapes)
    found: dict[str, tuple[TensorPart, ...]] = {}
    for key, shape in kept.items():
        parts = encoder.to_canonical(key)
        if (len(parts) > 1 and count_rows(shape) % len(parts)) or (parts[0].transposed and len(shape) != 2):
            what = " + ".join(part.key for part in parts)
            raise FileError(
                f"{key} holds {what} of {encoder.name}, but its shape is {list(shape)}; the file is damaged"
            )
        rows = count_rows(shape) // len(parts)
        for i, part in enumerate(parts):
            if part.key in found:
                raise FileError(
                    f"the file holds {part.key} of {encoder.name} twice: as {found[part.key][0].key} and as {key}; remove one"
                )
            cut = slice(i * rows, (i + 1) * rows) if len(parts) > 1 else None
            found[part.key] = (TensorPart(key, cut, transposed=part.transposed),)
    return found, dropped


def split_dropped(
    encoder: EncoderFamily, shapes: Mapping[str, Shape]
) -> tuple[dict[str, Shape], dict[str, str]]:
    """The tensors that an encoder may have a place for, and the others with the reason."""
    dropped: dict[str, str] = {}
    for key in shapes:
        reason = find_drop_reason(key, encoder.key_mappings) or next(
            (why for name, why in encoder.drop.items() if encoder.to_canonical(key)[0].key == name), None
        )
        twin = encoder.tied_weights.get(key)
        if reason is None and twin in shapes:
            reason = f"the same as {twin}"
        if reason is not None:
            dropped[key] = reason
    return {key: shape for key, shape in shapes.items() if key not in dropped}, dropped


def build_encoder_layout(
    encoder: EncoderFamily, shapes: Mapping[str, Shape], model: nn.Module
) -> StateDictLayout:
    """Find a model's parameters in a file.

    Args:
        encoder: that the file holds.
        shapes: logical shapes by names without prefix, without what belongs to quantized layers.
        model: of one of the encoder's classes; `take_out_spare` has seen it.

    Returns:
        Parts for every parameter and buffer of its `state_dict()`. Names that the model ties have the same parts, also where the file
        holds them only once.

    Raises:
        FileError: when a tensor has another shape than its parameter, or two tensors are one parameter.
    """
    held = model.state_dict(keep_vars=True)
    names = {name: encoder.to_canonical(name)[0].key for name in held}
    kept, dropped = split_dropped(encoder, shapes)
    found = to_model(kept, {names[name]: tuple(tensor.shape) for name, tensor in held.items()}, encoder.name)
    by_tensor = {
        id(tensor): found.parts[names[name]]
        for name, tensor in reversed(held.items())
        if names[name] in found.parts
    }
    parts = {name: found.parts.get(names[name], by_tensor.get(id(tensor))) for name, tensor in held.items()}
    patterns = [rule.pattern for rule in encoder.optional_modules]
    spare = {
        key
        for key in found.unused
        if any(fnmatch.fnmatchcase(encoder.to_canonical(key)[0].key, pattern) for pattern in patterns)
    }
    return StateDictLayout(
        {name: those for name, those in parts.items() if those is not None},
        tuple(key for key in found.unused if key not in spare),
        tuple(name for name, those in parts.items() if those is None),
        {**dropped, **found.dropped}
        | dict.fromkeys(spare, f"the {type(model).__name__} has no place for it"),
    )


def count_rows(shape: Shape) -> int:
    """How many rows; a single number has none."""
    return shape[0] if len(shape) else 0


def as_sequence(value: int | Sequence[int]) -> Sequence[int]:
    """A number as a list of one."""
    return [value] if isinstance(value, int) else value
