"""Builds transformers models without weights, and takes modules out of them that a file does not have.

The weights are filled in by `build`; configurations come from a folder or from `model_config`.
"""

import copy
import fnmatch
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from int8run.errors import ConfigError, FileError
from int8run.models.state_dict_adapter import Shape
from int8run.text_encoders.registry import EncoderFamily
from int8run.text_encoders.state_dict_adapter import split_dropped
from int8run.utils.text import shorten_error

log = logging.getLogger(__name__)


class RemovedModule(nn.Module):
    """Stands where a module was taken out of a model.

    Args:
        name: of the module that was here.
        reason: why it was taken out.
    """

    def __init__(self, name: str, reason: str):
        super().__init__()
        self.name, self.reason = name, reason

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise FileError: the module is needed after all."""
        raise FileError(f"{self.name} is needed and was not in the text encoder's file: {self.reason}")


def build_skeleton(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Return a text encoder whose parameters have shapes and no values (meta tensors).

    Buffers that no checkpoint holds have their values.

    Args:
        class_name: of transformers.
        config: of the class; a class for text alone takes its part of the config of a vision language model.
        dtype: of the parameters, but those that transformers keeps in float32.

    Raises:
        ConfigError: for a class that transformers does not have.
        FileError: when the class does not take the config.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError

    cls = get_model_class(class_name)
    # transformers completes inner configs in place
    own_config = copy.deepcopy(select_config(cls.config_class, config))
    try:
        with init_empty_weights(include_buffers=False):
            model = cls(cls.config_class.from_dict(own_config))
        # parameters without values were made one by one
        model.tie_weights()
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        AssertionError,
        ZeroDivisionError,
        StrictDataclassError,
    ) as error:
        reason = shorten_error(error)
        raise FileError(
            f"the config does not fit {class_name}: {reason}; take the one of its model"
        ) from error
    in_float32 = list_float32_modules(cls, dtype)
    for name, parameter in model.named_parameters():
        if not in_float32 & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def get_model_class(class_name: str) -> Any:
    """Return a model's class of transformers.

    Raises:
        ConfigError: when transformers does not have it.
    """
    import transformers

    cls = getattr(transformers, class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ConfigError(f"transformers {transformers.__version__} has no model class {class_name!r}")
    return cls


def select_config(config_class: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config for a class; of a class for text alone that is the text part of a larger config."""
    if "text_config" not in config or "text_config" in config_class.sub_configs:
        return dict(config)
    shared = {name: config[name] for name in ("tie_word_embeddings",) if name in config}
    return shared | dict(config["text_config"])


def list_float32_modules(cls: Any, dtype: torch.dtype) -> set[str]:
    """Return the modules that a class of transformers keeps in float32; its loader does the same."""
    names = set(getattr(cls, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    return names


def remove_optional_modules(
    encoder: EncoderFamily, shapes: Mapping[str, Shape], model: nn.Module
) -> dict[str, str]:
    """Take out of a model what text does not need and the file lacks altogether.

    Args:
        encoder: that the file holds.
        shapes: logical shapes by names without prefix, without the keys that belong to quantized layers.
        model: is changed.

    Returns:
        The modules that were taken out, with the reason.
    """
    kept, _ = split_dropped(encoder, shapes)
    in_file = {part.key for key in kept for part in encoder.to_canonical(key)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {name: encoder.get_canonical_name(name) for name in parameters}
    # one of two tied parameters in the file is enough
    filled = {id(parameters[name]) for name, canonical in names.items() if canonical in in_file}
    removed: dict[str, str] = {}
    for modules in encoder.optional_modules:
        optional = [name for name in parameters if fnmatch.fnmatchcase(names[name], modules.pattern)]
        is_in_file = any(id(parameters[name]) in filled for name in optional)
        if not optional or modules.required or is_in_file:
            continue
        name = find_common_module(optional)
        stand_in = nn.Identity() if modules.pass_through else RemovedModule(name, modules.reason)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, stand_in)
        removed[name] = modules.reason
    for name, reason in removed.items():
        log.info("%s is not in the file: %s", name, reason)
    return removed


def find_common_module(names: Iterable[str]) -> str:
    """Return the innermost module that all these parameters are in."""
    paths = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
