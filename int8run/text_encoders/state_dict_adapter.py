"""Converts between the keys of a text encoder's file, canonical names, and the parameters of a model.

As `models/state_dict_adapter` does for denoisers, and by means of it. It works on names and shapes; tensors
are read by others.
"""

import fnmatch
from collections.abc import Mapping

from torch import Tensor, nn

from int8run.errors import FileError
from int8run.models.fingerprint import count_rows
from int8run.models.state_dict_adapter import StateDictLayout, find_drop_reason, to_model
from int8run.models.tensor_part import Shape, TensorPart
from int8run.text_encoders.registry import EncoderFamily


def map_canonical_names(
    encoder: EncoderFamily, shapes: Mapping[str, Shape]
) -> tuple[dict[str, tuple[TensorPart, ...]], dict[str, str]]:
    """Return the canonical names of a file's tensors.

    Args:
        encoder: that the file holds.
        shapes: logical shapes by names without prefix, without the keys that belong to quantized layers.

    Returns:
        What each canonical tensor is made of; and the keys that have no place, with the reason.

    Raises:
        FileError: when two tensors are the same one, or rows cannot be shared out.
    """
    kept, dropped = split_dropped(encoder, shapes)
    canonical: dict[str, tuple[TensorPart, ...]] = {}
    for key, shape in kept.items():
        parts = encoder.to_canonical(key)
        check_divisible(encoder, key, shape, parts)
        num_rows = count_rows(shape) // len(parts)
        for i, part in enumerate(parts):
            if part.key in canonical:
                raise FileError(
                    f"the file holds {part.key} of {encoder.name} twice: "
                    f"as {canonical[part.key][0].key} and as {key}; remove one"
                )
            rows = None
            if len(parts) > 1:
                rows = slice(i * num_rows, (i + 1) * num_rows)
            canonical[part.key] = (TensorPart(key, rows=rows, transposed=part.transposed),)
    return canonical, dropped


def check_divisible(encoder: EncoderFamily, key: str, shape: Shape, parts: tuple[TensorPart, ...]) -> None:
    """Raise FileError when the rows of a tensor cannot be shared out equally, or it cannot be transposed."""
    has_rest = len(parts) > 1 and count_rows(shape) % len(parts) != 0
    is_matrix = len(shape) == 2
    cannot_be_transposed = parts[0].transposed and not is_matrix
    if has_rest or cannot_be_transposed:
        held = " + ".join(part.key for part in parts)
        raise FileError(
            f"{key} holds {held} of {encoder.name}, but its shape is {list(shape)}; the file is damaged"
        )


def split_dropped(
    encoder: EncoderFamily, shapes: Mapping[str, Shape]
) -> tuple[dict[str, Shape], dict[str, str]]:
    """Return the tensors that an encoder may have a place for, and the keys of the others with the reason."""
    kept: dict[str, Shape] = {}
    dropped: dict[str, str] = {}
    for key, shape in shapes.items():
        reason = find_encoder_drop_reason(encoder, key, shapes)
        if reason is None:
            kept[key] = shape
        else:
            dropped[key] = reason
    return kept, dropped


def find_encoder_drop_reason(encoder: EncoderFamily, key: str, shapes: Mapping[str, Shape]) -> str | None:
    """Return the reason why a key of a file has no place in an encoder; None when it may have one."""
    reason = find_drop_reason(key, encoder.key_mappings)
    if reason is not None:
        return reason
    reason = encoder.drop.get(encoder.get_canonical_name(key))
    if reason is not None:
        return reason
    tied_to = encoder.tied_weights.get(key)
    if tied_to not in shapes:
        return None
    return f"the same as {tied_to}"


def build_encoder_layout(
    encoder: EncoderFamily, shapes: Mapping[str, Shape], model: nn.Module
) -> StateDictLayout:
    """Find a model's parameters in a file.

    Args:
        encoder: that the file holds.
        shapes: logical shapes by names without prefix, without the keys that belong to quantized layers.
        model: of one of the encoder's classes, after `remove_optional_modules`.

    Returns:
        Parts for every parameter and buffer of its `state_dict()`. Names that the model ties have the same
        parts, also where the file holds them only once.

    Raises:
        FileError: when a tensor has another shape than its parameter, or two tensors are one parameter.
    """
    tensors = model.state_dict(keep_vars=True)
    names = {name: encoder.get_canonical_name(name) for name in tensors}
    kept, dropped = split_dropped(encoder, shapes)
    parameters = {names[name]: tuple(tensor.shape) for name, tensor in tensors.items()}
    found = to_model(kept, parameters, encoder.name)

    parts = assign_parts(tensors, names, found.parts)
    optional = [key for key in found.unused if is_optional(encoder, key)]
    no_place = dict.fromkeys(optional, f"the {type(model).__name__} has no place for it")
    return StateDictLayout(
        parts=parts,
        unused=tuple(key for key in found.unused if key not in no_place),
        missing=tuple(name for name in tensors if name not in parts),
        dropped={**dropped, **found.dropped, **no_place},
    )


def assign_parts(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], found: Mapping[str, tuple[TensorPart, ...]]
) -> dict[str, tuple[TensorPart, ...]]:
    """Return the parts of each parameter of a model; one without its own takes those of one tied to it.

    Args:
        tensors: of the model by name; tied ones are the same object.
        names: the canonical name of each.
        found: parts by canonical name.
    """
    by_tensor: dict[int, tuple[TensorPart, ...]] = {}
    for name, tensor in tensors.items():
        if names[name] in found:
            by_tensor.setdefault(id(tensor), found[names[name]])
    assigned: dict[str, tuple[TensorPart, ...]] = {}
    for name, tensor in tensors.items():
        parts = found.get(names[name], by_tensor.get(id(tensor)))
        if parts is not None:
            assigned[name] = parts
    return assigned


def is_optional(encoder: EncoderFamily, key: str) -> bool:
    """Return whether a key of a file belongs to modules that not every class of an encoder has."""
    name = encoder.get_canonical_name(key)
    return any(fnmatch.fnmatchcase(name, modules.pattern) for modules in encoder.optional_modules)
