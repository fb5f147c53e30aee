"""Write a denoiser with INT8 layers to a file or a folder, one tensor at a time.

`pipeline.store_layers` calls it with a model that is in memory; `stream_quantizer` makes the same files
without one. Both write what stands beside a weight by `weight_layers`.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.checkpoints.comfy_grouped import (
    describe_codes,
    find_marker_obstacle,
    iterate_code_rows,
    iterate_code_tables,
    plan_grouped_entries,
)
from int8run.checkpoints.comfy_int8 import SCALE, WEIGHT, plan_int8_entries, sibling_key
from int8run.checkpoints.data_hash import add_placeholder
from int8run.checkpoints.provenance import PROVENANCE_KEY
from int8run.checkpoints.writer import StreamWriter, TensorEntry
from int8run.errors import ConfigError
from int8run.export.weight_layers import find_weight_layer, iterate_transform_tensors
from int8run.layers.int8_conv import Int8Layer
from int8run.models.original_names import to_original
from int8run.models.resolve_weights import CONFIG_NAME, WEIGHTS_NAME
from int8run.models.tensor_part import TensorPart, join_shapes
from int8run.quant.grouped_weight import GroupedWeight, LayerWeight
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
FOLDER_ADVICE = "save to a folder, which keeps diffusers' own layers: save=my-int8/"
KeyParts = Mapping[str, tuple[TensorPart, ...]]


def keep_own_names(parameters: Iterable[str]) -> KeyParts:
    """Every parameter under its own name."""
    return {name: (TensorPart(name),) for name in parameters}


def save_denoiser(
    location: str,
    model: nn.Module,
    layers: Mapping[str, Int8Layer],
    note: Mapping[str, object],
    config: Mapping[str, Any],
) -> Path:
    """Write one denoiser to a file or a folder.

    A path that ends in `.safetensors` gets the original names of the layers, which ComfyUI reads. Anything
    else becomes a diffusers folder.

    Args:
        location: where to write.
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
    state = {}  # what stays float
    for name, tensor in model.state_dict().items():
        if find_weight_layer(layers, name) is None:
            state[name] = tensor
    shapes = list_shapes(state)
    for name, layer in layers.items():
        shapes[name + WEIGHT] = layer.weight_shape
    if path.suffix == ".safetensors":
        write_tensors(path, to_original(shapes, type(model).__name__), layers, state, note)
        return path
    write_tensors(path / WEIGHTS_NAME, keep_own_names(shapes), layers, state, note)
    (path / CONFIG_NAME).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    return path / WEIGHTS_NAME


def list_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def find_fused_layers(model: nn.Module) -> list[list[str]]:
    """Modules that are one layer in a file with the authors' names."""
    original_keys = to_original(list_shapes(model.state_dict()), type(model).__name__)
    fused = []
    for key, parts in original_keys.items():
        if len(parts) > 1 and key.endswith(WEIGHT):
            fused.append([part.key.removesuffix(WEIGHT) for part in parts])
    return fused


def write_tensors(
    path: Path,
    names: KeyParts,
    layers: Mapping[str, Int8Layer],
    state: Mapping[str, Tensor],
    note: Mapping[str, object],
) -> None:
    """Write tensors under these names.

    Args:
        path: of the file.
        names: key in the file -> the parameters that it holds, one after the other.
        layers: the INT8 layers by module name.
        state: everything else by name.
        note: how it was made, for the header.

    Raises:
        ConfigError: when parameters under one key cannot be one tensor.
    """
    entries: list[TensorEntry] = []
    shapes = list_shapes(state)
    for key, parts in names.items():
        int8_parts = get_int8_parts(key, parts, layers)
        if int8_parts:
            pairs = zip(parts, int8_parts, strict=True)
            rows = sum(part.count_rows(layer.out_features) for part, layer in pairs)
            entries += plan_layer_entries(key, rows, int8_parts)
        else:
            dtype_name = DTYPE_NAMES[get_joined_dtype(parts, state)]
            entries.append(TensorEntry(key, dtype_name, join_shapes(parts, shapes) or ()))
    metadata = {"format": "pt", PROVENANCE_KEY: json.dumps(add_placeholder(note))}
    with StreamWriter(path, entries, metadata) as writer:
        for key, parts in names.items():
            for name, data in iterate_pieces(key, parts, layers, state):
                writer.write(name, data)
        writer.finish()


def plan_layer_entries(key: str, rows: int, layers: Sequence[Int8Layer]) -> list[TensorEntry]:
    """List the tensors of a weight that INT8 layers make, one below the other.

    Args:
        key: of the weight.
        rows: of all.
        layers: of one transform and one number of bits.

    Raises:
        ConfigError: for codes that no file can hold as one weight, or not under this transform.
    """
    first = layers[0]
    weight = first.read_stored_weight() if first.bits != 8 else None
    if not isinstance(weight, GroupedWeight):
        return plan_int8_entries(key, (rows, *first.weight_shape[1:]), first.transform)
    obstacle = find_marker_obstacle(first.transform)
    if obstacle is not None:
        raise ConfigError(f"{key} cannot be saved with int8.bits={first.bits}: {obstacle}")
    codes = describe_codes(weight)
    for layer in layers[1:]:
        if not fits_codes(layer.read_stored_weight(), weight):
            raise ConfigError(
                f"{key} is one layer in the file, and its parts have codes of other levels; {FOLDER_ADVICE}"
            )
    return plan_grouped_entries(key, (rows, first.in_features), codes, first.transform)


def fits_codes(weight: LayerWeight, first: GroupedWeight) -> bool:
    """Whether the codes of a weight can stand below another's: laid out alike, with the same levels."""
    if not isinstance(weight, GroupedWeight) or describe_codes(weight) != describe_codes(first):
        return False
    if weight.codebook is None or first.codebook is None:
        return weight.codebook is first.codebook
    return torch.equal(weight.codebook, first.codebook)


def iterate_pieces(
    key: str, parts: tuple[TensorPart, ...], layers: Mapping[str, Int8Layer], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Any]]:
    """The data of one key and of what stands beside it, in pieces."""
    int8_parts = get_int8_parts(key, parts, layers)
    if not int8_parts:
        dtype = get_joined_dtype(parts, state)
        for part in parts:
            tensor = state[part.key].detach().to("cpu", dtype)
            yield key, part.extract(tensor).contiguous()
        return
    if int8_parts[0].bits != 8:
        yield from iterate_codes(key, parts, int8_parts)
        return
    for part, layer in zip(parts, int8_parts, strict=True):
        weight = layer.read_quantized_weight()
        yield key, part.extract(weight.qdata.cpu()).contiguous()
        yield sibling_key(key, SCALE), part.extract(weight.scale.float().cpu()).contiguous()
    yield from iterate_transform_tensors(key, int8_parts[0].transform, int8_parts[0].weight_shape)


def iterate_codes(
    key: str, parts: tuple[TensorPart, ...], layers: Sequence[Int8Layer]
) -> Iterator[tuple[str, Any]]:
    """The same of layers of 4 or 6 bits; arguments as of `iterate_pieces`."""
    corrections = []
    codebook = None
    group_size = 0
    for part, layer in zip(parts, layers, strict=True):
        weight = layer.read_stored_weight()
        assert isinstance(weight, GroupedWeight), "layers of one key have one number of bits"
        rows = weight.map_rows(part.extract)
        yield from iterate_code_rows(key, rows)
        codebook, group_size = rows.codebook, rows.group_size
        if rows.correction is not None:
            corrections.append(rows.correction.cpu())
    correction = torch.cat(corrections, dim=1) if corrections else None
    yield from iterate_code_tables(key, codebook, correction, group_size, layers[0].transform)


def get_int8_parts(
    key: str, parts: tuple[TensorPart, ...], layers: Mapping[str, Int8Layer]
) -> list[Int8Layer]:
    """The INT8 layers whose rows a key holds; empty when it holds float numbers.

    Raises:
        ConfigError: when only some are INT8, or they were treated differently.
    """
    made = [find_weight_layer(layers, part.key) for part in parts]
    found = [layer for layer in made if layer is not None]
    if not found:
        return []
    if len(found) < len(parts):
        lone = parts[made.index(None)].key
        raise ConfigError(
            f"{key} is one layer in the file, and {lone} of it is float where the rest is INT8; "
            f"{FOLDER_ADVICE}"
        )
    first, *others = found
    if any(layer.bits != first.bits for layer in others):
        bits = ", ".join(str(layer.bits) for layer in found)
        raise ConfigError(
            f"{key} is one layer in the file, and its parts have different bits ({bits}); {FOLDER_ADVICE}"
        )
    if not all(layer.transform.has_same_input_transform(first.transform) for layer in others):
        labels = ", ".join(dict.fromkeys(layer.transform.label for layer in found))
        raise ConfigError(
            f"{key} is one layer in the file, and its parts were treated differently ({labels}); "
            f"{FOLDER_ADVICE}"
        )
    return found


def get_joined_dtype(parts: tuple[TensorPart, ...], state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of one tensor that holds several."""
    return functools.reduce(torch.promote_types, [state[part.key].dtype for part in parts])
