"""Checkpoints in several files with an index, for `oracle.py`: all of them as if they were one."""

import json
from pathlib import Path

from text_encoders.oracle_file import Tensor, Unreadable, need, reject_repeated_keys, tensors_of
from text_encoders.oracle_markers import read_header_layers

LAYERS = "_quantization_metadata"


def read_all_files(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, or of all files that an index names.

    Of metadata that several have the first counts; what they say of layers is put together.
    """
    if path.suffix != ".json":
        return tensors_of(path)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    layers: dict[str, object] = {}
    for name, keys in sorted(read_index(path).items()):
        shard = path.with_name(name)
        need(shard.is_file(), f"{name} is missing")
        found, about = tensors_of(shard)
        need(set(found) == keys, f"{name} holds other tensors than the index says")
        tensors |= found
        metadata = about | metadata
        for layer, entry in read_header_layers(about).items():
            need(layers.setdefault(layer, entry) == entry, f"two headers describe {layer}")
    if LAYERS in metadata:
        metadata[LAYERS] = json.dumps({"layers": layers})
    return tensors, metadata


def read_index(path: Path) -> dict[str, set[str]]:
    """The keys that an index gives to each of its files, which lie beside it."""
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=reject_repeated_keys)
    except (ValueError, RecursionError) as error:
        raise Unreadable("the index is no JSON") from error
    need(isinstance(index, dict), "the index is no object")
    keys_by_name: dict[str, set[str]] = {}
    weight_map = index.get("weight_map")
    need(isinstance(weight_map, dict) and weight_map, "no weight_map")
    for key, name in weight_map.items():
        need(isinstance(name, str), "the name of a shard")
        is_beside = "/" not in name and "\\" not in name and name.endswith(".safetensors")
        need(is_beside and not name.startswith(".."), f"{name} is not beside the index")
        keys_by_name.setdefault(name, set()).add(key)
    return keys_by_name
