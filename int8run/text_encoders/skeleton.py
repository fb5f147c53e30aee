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
from int8run.models.tensor_part import Shape
from int8run.text_encoders.registry import EncoderFamily, OptionalModules
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
    cls = get_model_class(class_name)
    # transformers completes inner configs in place
    own_config = copy.deepcopy(select_config(cls.config_class, config))
    try:
        model = build_on_meta(cls, own_config)
    except list_config_errors() as error:
        reason = shorten_error(error)
        raise FileError(
            f"the config does not fit {class_name}: {reason}; take the one of its model"
        ) from error
    in_float32 = list_float32_modules(cls, dtype)
    for name, parameter in model.named_parameters():
        if in_float32.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(requires_grad=False)


def build_on_meta(cls: Any, config: Mapping[str, Any]) -> nn.Module:
    """Build a model of a class of transformers; its parameters have shapes and no values.

    Args:
        cls: the class.
        config: of that class.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = cls(cls.config_class.from_dict(config))
    # parameters without values were made one by one
    model.tie_weights()
    assert isinstance(model, nn.Module)
    return model


def list_config_errors() -> tuple[type[Exception], ...]:
    """Return what classes of transformers raise for a config that does not fit them."""
    from huggingface_hub.errors import StrictDataclassError

    return (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        AssertionError,
        ZeroDivisionError,
        StrictDataclassError,
    )


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
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {name: encoder.get_canonical_name(name) for name in parameters}
    filled = find_filled(encoder, shapes, parameters, names)
    removed: dict[str, str] = {}
    for modules in encoder.optional_modules:
        optional = [name for name in parameters if fnmatch.fnmatchcase(names[name], modules.pattern)]
        if not optional or modules.required or not filled.isdisjoint(optional):
            continue
        common = find_common_module(optional)
        take_out(model, common, modules)
        removed[common] = modules.reason
    for name, reason in removed.items():
        log.info("%s is not in the file: %s", name, reason)
    return removed


def find_filled(
    encoder: EncoderFamily,
    shapes: Mapping[str, Shape],
    parameters: Mapping[str, nn.Parameter],
    names: Mapping[str, str],
) -> set[str]:
    """Return the parameters that a file has values for; one of two tied parameters in the file is enough.

    Args:
        encoder: that the file holds.
        shapes: as of `remove_optional_modules`.
        parameters: of the model by name; tied ones are the same object.
        names: the canonical name of each.
    """
    kept, _ = split_dropped(encoder, shapes)
    in_file = {part.key for key in kept for part in encoder.to_canonical(key)}
    filled_ids = {id(parameters[name]) for name, canonical in names.items() if canonical in in_file}
    return {name for name, parameter in parameters.items() if id(parameter) in filled_ids}


def take_out(model: nn.Module, name: str, modules: OptionalModules) -> None:
    """Put a stand-in in the place of a module.

    Args:
        model: is changed.
        name: of the module.
        modules: what is known of it.
    """
    stand_in: nn.Module = RemovedModule(name, modules.reason)
    if modules.pass_through:
        stand_in = nn.Identity()
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, stand_in)


def find_common_module(names: Iterable[str]) -> str:
    """Return the innermost module that all these parameters are in."""
    paths = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)
