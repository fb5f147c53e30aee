"""Write a denoiser with INT8 layers to a file or a folder, one tensor at a time."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.checkpoints.comfy_int8 import (
    FACTOR,
    SCALE,
    WEIGHT,
    encode_marker,
    plan_int8_entries,
    sibling_key,
)
from int8run.checkpoints.data_hash import add_placeholder
from int8run.checkpoints.provenance import PROVENANCE_KEY
from int8run.checkpoints.quant_metadata import MARKER
from int8run.checkpoints.writer import StreamWriter, TensorEntry
from int8run.errors import ConfigError
from int8run.layers.int8_linear import Int8Linear
from int8run.models.resolve_weights import CONFIG_NAME, WEIGHTS_NAME
from int8run.models.state_dict_adapter import TensorPart, join_shapes, to_original
from int8run.utils.paths import expand_path

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.int8: "I8",
}
KeyParts = Mapping[str, tuple[TensorPart, ...]]


def keep_own_names(parameters: Iterable[str]) -> KeyParts:
    """Every parameter under its own name."""
    return {name: (TensorPart(name),) for name in parameters}


def save_denoiser(
    location: str,
    model: nn.Module,
    layers: Mapping[str, Int8Linear],
    note: Mapping[str, object],
    config: Mapping[str, Any],
) -> Path:
    """Write one denoiser to a file or a folder.

    A path that ends in `.safetensors` gets the original names of the layers, which ComfyUI reads. Anything
    else becomes a diffusers folder.

    Args:
        model: float, with a value for everything that is not in `layers`.
        layers: the INT8 layers by module name.
        note: how it was made, for the header.
        config: of the model's class.

    Returns:
        The weights' file.

    Raises:
        ConfigError: when layers that are one in that naming were treated differently.
        FileError: when it cannot be written.
    """
    path = expand_path(location).absolute()
    state = {
        name: t
        for name, t in model.state_dict().items()
        if not (name.endswith(WEIGHT) and name.removesuffix(WEIGHT) in layers)
    }
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    shapes |= {name + WEIGHT: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    if path.suffix == ".safetensors":
        write_tensors(path, to_original(shapes, type(model).__name__), layers, state, note)
        return path
    write_tensors(path / WEIGHTS_NAME, keep_own_names(shapes), layers, state, note)
    (path / CONFIG_NAME).write_text(json.dumps(dict(config), indent=2) + "\n")
    return path / WEIGHTS_NAME


def find_fused_layers(model: nn.Module) -> list[list[str]]:
    """Modules that are one layer in a file with the authors' names."""
    names = to_original(
        {name: tuple(t.shape) for name, t in model.state_dict().items()}, type(model).__name__
    )
    return [
        [part.key.removesuffix(WEIGHT) for part in parts]
        for key, parts in names.items()
        if len(parts) > 1 and key.endswith(WEIGHT)
    ]


def write_tensors(
    path: Path,
    names: KeyParts,
    layers: Mapping[str, Int8Linear],
    state: Mapping[str, Tensor],
    note: Mapping[str, object],
) -> None:
    """Write tensors under these names.

    Args:
        names: key in the file -> the parameters that it holds, one after the other.

    Raises:
        ConfigError: when parameters under one key cannot be one tensor.
    """
    entries: list[TensorEntry] = []
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    for key, parts in names.items():
        made = get_int8_parts(key, parts, layers)
        if made:
            rows, columns = sum(layer.out_features for layer in made), made[0].in_features
            entries += plan_int8_entries(key, (rows, columns), made[0].transform)
        else:
            entries.append(
                TensorEntry(
                    key, DTYPE_NAMES[get_joined_dtype(parts, state)], join_shapes(parts, shapes) or ()
                )
            )
    metadata = {"format": "pt", PROVENANCE_KEY: json.dumps(add_placeholder(note))}
    with StreamWriter(path, entries, metadata) as writer:
        for key, parts in names.items():
            for name, data in iterate_pieces(key, parts, layers, state):
                writer.write(name, data)
        writer.finish()


def iterate_pieces(
    key: str, parts: tuple[TensorPart, ...], layers: Mapping[str, Int8Linear], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Any]]:
    """The data of one key and of what stands beside it, in pieces."""
    made = get_int8_parts(key, parts, layers)
    if not made:
        for part in parts:
            tensor = state[part.key]
            yield key, part.extract(tensor.detach().to("cpu", get_joined_dtype(parts, state))).contiguous()
        return
    for part, layer in zip(parts, made, strict=True):
        weight = layer.read_quantized_weight()
        yield key, part.extract(weight.qdata.cpu()).contiguous()
        yield sibling_key(key, SCALE), part.extract(weight.scale.float().cpu()).contiguous()
    yield sibling_key(key, MARKER), encode_marker(made[0].transform)
    if made[0].transform.factor is not None:
        yield sibling_key(key, FACTOR), made[0].transform.factor.float().cpu().contiguous()


def get_int8_parts(
    key: str, parts: tuple[TensorPart, ...], layers: Mapping[str, Int8Linear]
) -> list[Int8Linear]:
    """The INT8 layers whose rows a key holds; empty when it holds float numbers.

    Raises:
        ConfigError: when only some are INT8, or they were treated differently.
    """
    made = {
        part.key: layers.get(part.key.removesuffix(WEIGHT)) if part.key.endswith(WEIGHT) else None
        for part in parts
    }
    found = [layer for layer in made.values() if layer is not None]
    advice = "save to a folder, which keeps diffusers' own layers: save=my-int8/"
    if found and len(found) < len(parts):
        lone = next(name for name, layer in made.items() if layer is None)
        raise ConfigError(
            f"{key} is one layer in the file, and {lone} of it is float where the rest is INT8; {advice}"
        )
    for layer in found[1:]:
        if not layer.transform.has_same_input_transform(found[0].transform):
            labels = ", ".join(dict.fromkeys(layer.transform.label for layer in found))
            raise ConfigError(
                f"{key} is one layer in the file, and its parts were treated differently ({labels}); {advice}"
            )
    return found


def get_joined_dtype(parts: tuple[TensorPart, ...], state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of one tensor that holds several."""
    return functools.reduce(torch.promote_types, [state[part.key].dtype for part in parts])
