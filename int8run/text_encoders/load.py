"""Text encoders for other programs: load a quantized file of any format, and build its transformers model.

Its two functions are public. The tensors and the metadata between them are plain values:

    from int8run import build_text_encoder, load_text_encoder

    state_dict, metadata = load_text_encoder("t5xxl_fp8_e4m3fn_scaled.safetensors")
    encoder = build_text_encoder(state_dict, metadata)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.errors import check_choice
from int8run.models.pipeline_index import read_json
from int8run.models.resolve_weights import CONFIG_NAME
from int8run.models.tensor_part import TensorPart
from int8run.text_encoders.base import list_kernel_backends
from int8run.text_encoders.build import build_encoder, check_missing, check_unused, fit_weights
from int8run.text_encoders.kernels import Kernels
from int8run.text_encoders.loaded_state import EncoderState, describe_layer, name_layer_tensors
from int8run.text_encoders.model_config import build_config
from int8run.text_encoders.registry import get_encoder, list_supported_encoders
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.state_dict_adapter import map_canonical_names
from int8run.text_encoders.weights import EncoderFile, name_file_in_errors, read_parts
from int8run.utils.paths import expand_path


@dataclass
class LoadedTensors:
    """What was read of a text encoder.

    Args:
        state_dict: tensors by canonical names.
        layers: for each quantized layer how it is read, of `describe_layer`.
        read_as_float: the formats of layers that are quantized in the file and float here.
    """

    state_dict: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    read_as_float: dict[str, str] = field(default_factory=dict)


def load_text_encoder(
    path: str | Path,
    quant_format: str = "auto",
    kernel_backend: str = "auto",
    which: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a text encoder as it is stored.

    It may be in ComfyUI's single file, in a full checkpoint, or in a folder of transformers.
    What the file is and how each layer is stored is read from its header, and nothing is guessed. Layers stay
    quantized.

    Args:
        path: a `.safetensors` file, its index, or a folder.
        quant_format: `auto`, or the format that the layers must have; it also decides what a file leaves
            open, such as the order of nibbles in nvfp4.
        kernel_backend: how the layers are to run, for `build_text_encoder`.
        which: of a checkpoint with several encoders the one that is meant, such as `clip_l`.
        config: of the transformers model, as its config.json has it; None: the folder's own, else one that is
            derived from the shapes. Pass it where an error says that a size cannot be derived.

    Returns:
        The tensors by the names of ComfyUI's stand-alone files: `L.weight` (quantized, or float),
        `L.weight_scale`, `L.weight_scale_2`, biases, norms, embeddings. And what is known of them: `encoder`,
        `classes` and `config` of transformers (a folder's own, else derived from the shapes), `prefix`,
        `quant_format` (asked, found), `formats` (how many layers each), `layers` (how each quantized one is
        read), `read_as_float`, `dropped`, `tokenizer`, `files`.

    Raises:
        ConfigError: for an unknown format or backend, or a format that contradicts the file.
        FileError: for a file that cannot be read, is damaged, or holds no text encoder that int8run knows.
    """
    check_choice("kernel_backend", kernel_backend, list_kernel_backends())
    folder = expand_path(path)
    own_config = read_own_config(folder, config)
    class_name = find_class_name(own_config)
    # a file that holds one encoder among others is looked through by names; a folder is of one class
    class_of_all = class_name if folder.is_dir() else ""
    source = EncoderFile(folder, quant_format, which, class_of_all)
    # the class that the folder names comes first
    classes = sorted(source.encoder.classes, key=lambda name: name != class_name)
    with source.files:
        with name_file_in_errors(source.where):
            complete_config = own_config or build_config(source.encoder, source.shapes)
            check_fits(source, classes[0], complete_config)
            names, dropped = map_canonical_names(source.encoder, source.shapes)
        loaded = read_tensors(source, names)
    return loaded.state_dict, {
        "encoder": source.encoder.name,
        "classes": classes,
        "config": complete_config,
        "prefix": source.prefix,
        "quant_format": {"asked": quant_format, "found": source.found_format},
        "kernel_backend": kernel_backend,
        "formats": dict(source.format_counts),
        "layers": loaded.layers,
        "read_as_float": loaded.read_as_float,
        "dropped": dict(dropped),
        "tokenizer": dict(source.encoder.tokenizer),
        "files": [str(file) for file in source.files.files],
    }


def read_own_config(folder: Path, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the config that was passed, else that of the folder; empty where there is none."""
    if config is not None:
        return dict(config)
    file = folder / CONFIG_NAME
    return dict(read_json(file)) if file.is_file() else {}


def find_class_name(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that a config names, if a supported encoder has it; else nothing."""
    supported: set[str] = set()
    for encoder in list_supported_encoders().values():
        supported.update(encoder.classes)
    for name in config.get("architectures") or ():
        if name in supported:
            return str(name)
    return ""


def check_fits(source: EncoderFile, class_name: str, config: Mapping[str, Any]) -> None:
    """Check that a file has all tensors of a model, of its sizes, and no others.

    Args:
        source: the file.
        class_name: of transformers.
        config: of that class.

    Raises:
        ConfigError: for a class that transformers does not have.
        FileError: when it has not.
    """
    layout = fit_weights(source, build_skeleton(class_name, config, torch.bfloat16))
    check_missing(source, layout)
    check_unused(source, layout)


def read_tensors(source: EncoderFile, names: Mapping[str, tuple[TensorPart, ...]]) -> LoadedTensors:
    """Read all tensors of a text encoder; layers stay quantized where that is possible.

    Args:
        source: an open file.
        names: for each canonical tensor what it is made of.
    """
    loaded = LoadedTensors()
    for key, parts in names.items():
        name = key.removesuffix(WEIGHT)
        source_layer = parts[0].key.removesuffix(WEIGHT)
        source_format = source.get_format(source_layer)
        is_one_weight = key.endswith(WEIGHT) and len(parts) == 1
        layer = source.read_packed(source_layer) if is_one_weight else None
        if layer is not None:
            loaded.state_dict |= name_layer_tensors(name, layer)
            loaded.layers[name] = describe_layer(layer, source_format)
            continue
        if source_format:
            loaded.read_as_float[name] = source_format
        loaded.state_dict[key] = read_parts(source, parts)
    return loaded


def build_text_encoder(
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    class_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    rows: int | None = None,
) -> nn.Module:
    """Build the transformers model of what `load_text_encoder` returned; quantized layers stay quantized.

    Args:
        state_dict: the tensors.
        metadata: what is known of them.
        class_name: one of `metadata["classes"]`; None: the usual one of the encoder.
        config: of that class; None: `metadata["config"]`.
        dtype: of what is float, and of what comes out.
        device: where the model is to run.
        rows: tokens of a usual call, with which `kernel_backend="auto"` measures; None: those of the encoder.

    Raises:
        ConfigError: for a class that does not hold such weights.
        FileError: when tensors are missing or of another size than the config says.
        BackendError: when the kernels cannot run here.
    """
    encoder = get_encoder(metadata["encoder"])
    name = class_name or encoder.classes[0]
    check_choice("class_name", name, encoder.classes)
    if config is None:
        config = metadata["config"]
    skeleton = build_skeleton(name, dict(config), dtype)
    weights = EncoderState(encoder, state_dict, metadata)
    target_device = torch.device(device)
    kernels = Kernels(metadata["kernel_backend"], target_device, num_tokens=rows or encoder.num_tokens)
    built = build_encoder(skeleton, weights, target=None, kernels=kernels)
    return built.module.to(target_device)
