"""From the shapes of a file to a transformers model without weights, and its tokenizer."""

import copy
import fnmatch
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from int8run.errors import ConfigError, FileError
from int8run.models.state_dict_adapter import Shape
from int8run.text_encoders.registry import (
    SIZE_KEYS,
    EncoderFamily,
    count_rows,
    map_canonical_names,
    split_dropped,
)

log = logging.getLogger(__name__)


def remove_optional_modules(
    encoder: EncoderFamily, shapes: Mapping[str, Shape], model: nn.Module
) -> dict[str, str]:
    """Take out of a model what a text does not need and the file lacks altogether.

    Args:
        encoder: that the file holds.
        shapes: as for `encoder_layout`.
        model: is changed.

    Returns:
        The modules that were taken out, with the reason.
    """
    there = {part.key for key in split_dropped(encoder, shapes)[0] for part in encoder.to_canonical(key)}
    held = {
        name: (encoder.to_canonical(name)[0].key, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    filled = {id(parameter) for key, parameter in held.values() if key in there}
    taken: dict[str, str] = {}
    for rule in encoder.optional_modules:
        spare = {
            name: parameter
            for name, (key, parameter) in held.items()
            if fnmatch.fnmatchcase(key, rule.pattern)
        }
        if not spare or rule.required or any(id(parameter) in filled for parameter in spare.values()):
            continue
        place = find_common_module(spare)
        parent, _, child = place.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            nn.Identity() if rule.pass_through else RemovedModule(place, rule.reason),
        )
        taken[place] = rule.reason
    for place, why in taken.items():
        log.info("%s is not in the file: %s", place, why)
    return taken


def find_common_module(names: Iterable[str]) -> str:
    """The innermost module that all these parameters are in."""
    paths = [name.split(".")[:-1] for name in names]
    same = [words[0] for words in zip(*paths, strict=False) if len(set(words)) == 1]
    depth = next((i for i, words in enumerate(zip(*paths, strict=False)) if len(set(words)) > 1), len(same))
    return ".".join(paths[0][:depth])


class RemovedModule(nn.Module):
    """The place of a module that is not there."""

    def __init__(self, name: str, why: str):
        super().__init__()
        self.name, self.reason = name, why

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            FileError: always.
        """
        raise FileError(f"{self.name} is needed and was not in the text encoder's file: {self.reason}")


def build_config(encoder: EncoderFamily, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The configuration of transformers for what a file holds: sizes from its shapes, the rest as the encoder was published.

    Args:
        shapes: as for `canonical_names`.

    Raises:
        FileError: when a tensor is missing that says a size, or sizes do not fit each other.
    """
    parts, _ = map_canonical_names(encoder, shapes)
    sizes: dict[str, Shape] = {}
    for name, (part, *_) in parts.items():
        shape = tuple(shapes[part.key])
        shape = shape if part.rows is None else (part.rows.stop - part.rows.start, *shape[1:])
        sizes[name] = shape[::-1] if part.transposed else shape
    config = SizeReader(encoder.name, sizes).resolve(encoder.config)
    for variant in encoder.variants:
        if all(key in sizes and count_rows(sizes[key]) == n for key, n in variant.rows.items()):
            config = merge_config(config, variant.config)
    return config


@dataclass(frozen=True)
class SizeReader:
    """Reads sizes from shapes.

    Args:
        name: of the encoder, for messages.
        shapes: by canonical names.
    """

    name: str
    shapes: Mapping[str, Shape]

    def resolve(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with its sizes."""
        return {name: self.value(config, name) for name in config}

    def value(self, config: Mapping[str, Any], name: str) -> Any:
        """One field; others may be read for it."""
        value = config[name]
        if not isinstance(value, Mapping):
            return value
        if not SIZE_KEYS & set(value):
            return self.resolve(value)
        if "absent" in value:
            return value["absent"] not in self.shapes
        number = self.number(value)
        if not number:
            if "default" not in value:
                key = value.get("count") or value.get("rows") or value["columns"]
                raise FileError(
                    f"the file has no {key}, which says the {name} of {self.name}; it is incomplete"
                )
            return self.referred(config, value["default"])
        if "over" not in value:
            return number
        over = self.referred(config, value["over"])
        if number % over:
            key = value.get("rows") or value["columns"]
            raise FileError(
                f"{key} has {number} rows, no multiple of {over}: the {name} of this {self.name} cannot be told from the file; pass the "
                "config of its model"
            )
        return number // over

    def number(self, value: Mapping[str, Any]) -> int:
        """What a size asks for, 0 where the file does not have it."""
        if "count" in value:
            head, _, tail = value["count"].partition("*")
            numbered = re.compile(re.escape(head) + r"\d+" + re.escape(tail))
            return sum(numbered.fullmatch(key) is not None for key in self.shapes)
        key, dim = (value["rows"], 0) if "rows" in value else (value["columns"], 1)
        shape = self.shapes.get(key, ())
        return (
            shape[dim] if len(shape) > dim and 0 not in shape else 0
        )  # a table of no width may claim any number of rows

    def referred(self, config: Mapping[str, Any], value: Any) -> Any:
        """A number, or the field that is named."""
        return self.value(config, value) if isinstance(value, str) else value


def merge_config(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some fields replaced, inner ones too."""
    inner = {
        name: merge_config(config[name], value)
        for name, value in more.items()
        if isinstance(value, Mapping) and isinstance(config.get(name), Mapping)
    }
    return {**config, **more, **inner}


def build_skeleton(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A text encoder whose parameters have shapes and no values; buffers that no checkpoint holds are there.

    Args:
        class_name: of transformers.
        config: of the class; a class for text alone takes its part of the config of a model that sees.

    Raises:
        ConfigError: for a class that transformers does not have.
        FileError: when the class does not take the config.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError

    cls, own = get_model_class(class_name), config
    kind = cls.config_class
    if "text_config" in config and "text_config" not in kind.sub_configs:
        own = {name: config[name] for name in ("tie_word_embeddings",) if name in config} | dict(
            config["text_config"]
        )
    try:
        with init_empty_weights(include_buffers=False):
            model = cls(
                kind.from_dict(copy.deepcopy(dict(own)))
            )  # transformers completes inner ones in place
        model.tie_weights()  # parameters without values were made one by one
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        AssertionError,
        ZeroDivisionError,
        StrictDataclassError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileError(
            f"the config does not fit {class_name}: {reason}; take the one of its model"
        ) from error
    full = set(getattr(cls, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:  # as transformers' loader does
        full |= set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not full & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def get_model_class(class_name: str) -> Any:
    """A model's class of transformers.

    Raises:
        ConfigError: when transformers does not have it.
    """
    import transformers

    cls = getattr(transformers, class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ConfigError(f"transformers {transformers.__version__} has no model class {class_name!r}")
    return cls


def load_tokenizer(tokenizer: Mapping[str, str]) -> Any:
    """The tokenizer of an encoder.

    Args:
        tokenizer: `location` and `subfolder`, as `Encoder.tokenizer` and the metadata of a loaded file have them.

    Raises:
        FileError: when it is not here and cannot be fetched.
    """
    from transformers import AutoTokenizer

    location, subfolder = tokenizer["location"], tokenizer.get("subfolder", "")
    try:
        return AutoTokenizer.from_pretrained(location, subfolder=subfolder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileError(
            f"the tokenizer {location}{f' ({subfolder})' if subfolder else ''} is not on this machine and could not be fetched: {reason}; "
            "take the one of your pipeline, or log in where the model is gated: hf auth login"
        ) from error
