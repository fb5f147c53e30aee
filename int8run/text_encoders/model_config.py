"""Derives a transformers configuration from the shapes of a file, and loads the tokenizer that belongs to it.

Single files have no `config.json`: sizes are read from their shapes, the rest is as it was published.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from int8run.errors import FileError
from int8run.models.fingerprint import has_rows
from int8run.models.tensor_part import Shape, TensorPart
from int8run.text_encoders.registry import SIZE_KEYS, EncoderFamily
from int8run.text_encoders.state_dict_adapter import map_canonical_names
from int8run.utils.text import shorten_error


def build_config(encoder: EncoderFamily, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the configuration of transformers for what a file holds.

    Args:
        encoder: that the file holds.
        shapes: as for `map_canonical_names`.

    Raises:
        FileError: when a tensor is missing that says a size, or sizes do not fit each other.
    """
    parts_by_name, _ = map_canonical_names(encoder, shapes)
    canonical: dict[str, Shape] = {}
    for name, (first_part, *_) in parts_by_name.items():
        canonical[name] = get_part_shape(first_part, shapes[first_part.key])
    config = SizeReader(encoder.name, canonical).resolve_config(encoder.config)
    for variant in encoder.variants:
        if all(has_rows(canonical, name, count) for name, count in variant.rows.items()):
            config = merge_config(config, variant.config)
    return config


def get_part_shape(part: TensorPart, shape: Shape) -> Shape:
    """Return the shape of a part of a tensor that has this shape."""
    if part.rows is not None:
        shape = (part.rows.stop - part.rows.start, *shape[1:])
    if part.transposed:
        shape = shape[::-1]
    return tuple(shape)


@dataclass(frozen=True)
class SizeReader:
    """Reads the sizes of a configuration from shapes; how they are written is in the docstring of `registry`.

    Args:
        name: of the encoder, for messages.
        shapes: by canonical names.
    """

    name: str
    shapes: Mapping[str, Shape]

    def resolve_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a configuration with numbers in the place of sizes that are to be read."""
        return {field: self.resolve_field(config, field) for field in config}

    def resolve_field(self, config: Mapping[str, Any], field: str) -> Any:
        """Return the value of one field.

        Args:
            config: the fields beside it, to which a size may refer.
            field: its name.

        Raises:
            FileError: when the file does not have the tensor that says it, or the number cannot be divided.
        """
        value = config[field]
        if not isinstance(value, Mapping):
            return value
        if not SIZE_KEYS & set(value):
            return self.resolve_config(value)
        if "absent" in value:
            return value["absent"] not in self.shapes
        size = self.read_size(value)
        if size == 0:
            return self.resolve_default(config, field)
        if "over" not in value:
            return size
        divisor = self.resolve_reference(config, value["over"])
        if size % divisor:
            key = value.get("rows") or value["columns"]
            raise FileError(
                f"{key} has {size} rows, not a multiple of {divisor}: the {field} of this {self.name} "
                "cannot be derived from the file; pass the config of its model: "
                "load_text_encoder(path, config=…)"
            )
        return size // divisor

    def resolve_default(self, config: Mapping[str, Any], field: str) -> Any:
        """Return the default of a size that the file does not say.

        Raises:
            FileError: when it has none.
        """
        value = config[field]
        if "default" in value:
            return self.resolve_reference(config, value["default"])
        key = value.get("count") or value.get("rows") or value["columns"]
        raise FileError(f"the file has no {key}, which says the {field} of {self.name}; it is incomplete")

    def resolve_reference(self, config: Mapping[str, Any], value: Any) -> Any:
        """Return a number as it is, and the value of a field that is named."""
        return self.resolve_field(config, value) if isinstance(value, str) else value

    def read_size(self, value: Mapping[str, Any]) -> int:
        """Return the size that `rows`, `columns` or `count` asks for; 0 where the file does not have it."""
        if "count" in value:
            return self.count_numbered(value["count"])
        if "rows" in value:
            key, dim = value["rows"], 0
        else:
            key, dim = value["columns"], 1
        shape = self.shapes.get(key, ())
        # an empty table may claim any number of rows
        if len(shape) <= dim or 0 in shape:
            return 0
        return shape[dim]

    def count_numbered(self, pattern: str) -> int:
        """Return how many tensors have a number in the place of the pattern's `*`."""
        before, _, after = pattern.partition("*")
        numbered = re.compile(re.escape(before) + r"\d+" + re.escape(after))
        return sum(numbered.fullmatch(key) is not None for key in self.shapes)


def merge_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with some fields replaced, those of inner configurations one by one."""
    merged = dict(config)
    for field, value in changes.items():
        inner = config.get(field)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            value = merge_config(inner, value)
        merged[field] = value
    return merged


def load_tokenizer(tokenizer: Mapping[str, str]) -> Any:
    """Load the tokenizer of an encoder.

    Args:
        tokenizer: `location` and `subfolder`, as `EncoderFamily.tokenizer` and the metadata of a loaded file
            have them.

    Raises:
        FileError: when it is not here and cannot be downloaded.
    """
    from transformers import AutoTokenizer

    location, subfolder = tokenizer["location"], tokenizer.get("subfolder", "")
    try:
        return AutoTokenizer.from_pretrained(location, subfolder=subfolder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = shorten_error(error, 160)
        name = f"{location} ({subfolder})" if subfolder else location
        raise FileError(
            f"the tokenizer {name} is not on this machine and could not be downloaded: {reason}; "
            "take the one of your pipeline, or log in where the model is gated: hf auth login"
        ) from error
