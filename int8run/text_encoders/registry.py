"""What is known about text encoders, from `encoders/*.yaml`.

That is how a file is recognized, how its tensors are called, and its configuration. A file is called by its
encoder's name and holds the fields of `EncoderFamily`. One without classes only has fingerprints: a file of
it is rejected by name, and not taken for another encoder. Canonical names are those of ComfyUI's stand-alone
files; other names are in `models/key_mappings/text_*.yaml`, under the encoders' names.

Sizes in `config` are read from a file's shapes:

    # rows, or columns, of a tensor by its canonical name
    hidden_size: { rows: model.norm.weight }
    # divided by a number, or by another field
    num_heads: { rows: model.layers.0.self_attn.q_proj.weight, over: head_dim }
    # how many such tensors there are; the default where there is none
    depth: { count: visual.blocks.*.norm1.weight, default: 32 }
    # whether the file lacks the tensor
    tie_word_embeddings: { absent: lm_head.weight }

Everything else about text encoders builds on this module; it knows nothing of files and models.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import ConfigError, suggest_similar
from int8run.models.family import parse_items
from int8run.models.fingerprint import SizedFingerprint
from int8run.models.key_mapping import KeyMappingSet, load_mappings
from int8run.models.state_dict_adapter import resolve_key
from int8run.models.tensor_part import TensorPart

ENCODER_FOLDER = Path(__file__).parent / "encoders"
# a field of `config` with one of these is read from a file
SIZE_KEYS = {"rows", "columns", "count", "absent"}


@dataclass(frozen=True)
class OptionalModules:
    """Modules that text does not need: not every class has them, and many files lack them.

    They are taken out of a model where the file lacks them.

    Args:
        pattern: fnmatch pattern of canonical names of parameters. A file has all of them or none.
        reason: why the file can lack them.
        pass_through: once taken out, the module returns its input as it is; else calling it is an error.
        required: a class that has them needs them, so they are never taken out.
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
        reason: why, as shown to people.
        formats: of `clip=`, in which they do; none: in all.
    """

    pattern: str
    reason: str
    formats: Sequence[str] = ()

    def applies_to(self, format_name: str) -> bool:
        """Return whether the rule is about weights of this format."""
        return not self.formats or format_name in self.formats

    def matches_any(self, names: Iterable[str]) -> bool:
        """Return whether any of these layers is one of the rule's."""
        return any(fnmatch.fnmatchcase(name, self.pattern) for name in names)


@dataclass(frozen=True)
class ConfigVariant:
    """Fields of a configuration that differ for some sizes.

    Args:
        rows: tensors and how many rows they have.
        config: the fields.
    """

    rows: Mapping[str, int]
    config: Mapping[str, Any]


# fields of an encoder that are lists of these; YAML has their items as mappings
ITEM_TYPES: Mapping[str, type] = {
    "fingerprints": SizedFingerprint,
    "ignore": EncoderIgnoreRule,
    "optional_modules": OptionalModules,
    "variants": ConfigVariant,
}


@dataclass(frozen=True)
class EncoderFamily:
    """One text encoder, of one size or of several.

    Items of its lists may be given as mappings, as YAML has them.

    Args:
        name: the name of its file, and in messages.
        classes: of transformers that hold such weights, the usual one first; none: known and not supported.
        fingerprints: of files that hold it; one of them matches.
        ignore: rules for layers, by canonical names, that stay float when weights are quantized here; the
            first that matches counts.
        float_embeddings: fnmatch patterns of embeddings whose weight the model reads, besides looking rows
            up; quantized ones are floats in memory.
        optional_modules: what text does not need, and files may lack.
        tied_weights: names of tensors that are the same as others, and the names of those.
        drop: canonical names that have no place in this encoder: the reason.
        num_tokens: of a usual call.
        tokenizer: where it is on the hub: `location` and `subfolder`.
        config: of its classes; sizes as in the module's docstring.
        variants: what of the config is different for some sizes.
        gguf_architecture: `general.architecture` of GGUF files that hold it, where their names are those of
            another encoder.
    """

    name: str
    classes: Sequence[str] = ()
    fingerprints: Sequence[SizedFingerprint] = ()
    ignore: Sequence[EncoderIgnoreRule] = ()
    float_embeddings: Sequence[str] = ()
    optional_modules: Sequence[OptionalModules] = ()
    tied_weights: Mapping[str, str] = field(default_factory=dict)
    drop: Mapping[str, str] = field(default_factory=dict)
    num_tokens: int = 77
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    variants: Sequence[ConfigVariant] = ()
    gguf_architecture: str = ""

    def __post_init__(self) -> None:
        for name, item_type in ITEM_TYPES.items():
            items = parse_items(item_type, getattr(self, name), f"{self.name}.{name}")
            object.__setattr__(self, name, items)  # the class is frozen

    @property
    def key_mappings(self) -> KeyMappingSet:
        """Other names of its parts."""
        return load_mappings(self.name)

    def to_canonical(self, key: str) -> tuple[TensorPart, ...]:
        """Return the canonical tensors that a key of a file holds, one after the other.

        A key that is not a name of this encoder stands for itself.
        """
        return resolve_key(key, self.key_mappings)

    def get_canonical_name(self, key: str) -> str:
        """Return the canonical name of the tensor of a key, the first of several."""
        return self.to_canonical(key)[0].key

    def needs_float_embedding(self, layer: str) -> bool:
        """Return whether the model reads the weight of an embedding itself.

        Args:
            layer: its name in a file or in the model, without `.weight`.
        """
        name = self.get_canonical_name(f"{layer}.weight").removesuffix(".weight")
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.float_embeddings)

    def find_skip_reason(self, layer: str, format_name: str) -> str | None:
        """Return the reason why a layer stays float, or None when it is quantized.

        Args:
            layer: its name in a file or in the model, without `.weight`.
            format_name: as in `clip=`.
        """
        names = [part.key.removesuffix(".weight") for part in self.to_canonical(f"{layer}.weight")]
        for rule in self.ignore:
            if rule.applies_to(format_name) and rule.matches_any(names):
                return rule.reason
        return None


@cache
def load_encoders(folder: Path = ENCODER_FOLDER) -> Mapping[str, EncoderFamily]:
    """Return all encoders that are known by name; read only by jobs that need them."""
    encoders = {}
    for file in sorted(folder.glob("*.yaml")):
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
        encoders[file.stem] = EncoderFamily(name=file.stem, **fields)
    return encoders


def list_supported_encoders() -> dict[str, EncoderFamily]:
    """Return the encoders that can be loaded, by name."""
    return {name: encoder for name, encoder in load_encoders().items() if encoder.classes}


def find_gguf_encoder(metadata: Mapping[str, str]) -> EncoderFamily | None:
    """Return the supported encoder that a GGUF file says it holds; None where names and shapes decide.

    Args:
        metadata: of the file.
    """
    architecture = metadata.get("general.architecture", "")
    for encoder in list_supported_encoders().values():
        if architecture and encoder.gguf_architecture == architecture:
            return encoder
    return None


def get_encoder(name: str) -> EncoderFamily:
    """Return a supported encoder by its name.

    Raises:
        ConfigError: for an unknown name.
    """
    supported = list_supported_encoders()
    if name not in supported:
        suggestion = suggest_similar(name, supported)
        raise ConfigError(f"no text encoder called {name!r}; {suggestion}choose from {', '.join(supported)}")
    return supported[name]
