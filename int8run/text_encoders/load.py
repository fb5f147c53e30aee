"""Text encoders for programs of one's own: load a quantized file of any format, and put it into its transformers class.

from int8run import build_text_encoder, load_text_encoder

state_dict, metadata = load_text_encoder("t5xxl_fp8_e4m3fn_scaled.safetensors")
encoder = build_text_encoder(state_dict, metadata)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.errors import check_choice
from int8run.models.resolve_weights import CONFIG_NAME, read_json
from int8run.text_encoders.base import list_kernel_backends
from int8run.text_encoders.build import Kernels, build_encoder, check_complete, fit_weights
from int8run.text_encoders.model_config import build_config
from int8run.text_encoders.registry import get_encoder, list_supported_encoders
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.state_dict_adapter import map_canonical_names
from int8run.text_encoders.weights import (
    EncoderFile,
    EncoderState,
    check_finite,
    describe_layer,
    name_file_in_errors,
    name_layer_tensors,
)


def load_text_encoder(
    path: str | Path, quant_format: str = "auto", kernel_backend: str = "auto", which: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A text encoder as it lies in its file: ComfyUI's single file, a full checkpoint, or a folder of transformers.

    What the file is and how each layer is stored is told by its header, and nothing is guessed. Layers stay
    quantized.

    Args:
        path: a `.safetensors` file, its index, or a folder.
        quant_format: `auto`, or the format that the layers must have; it also settles what a file leaves
            open, such as the order of nibbles in nvfp4.
        kernel_backend: how the layers are to run, for `build_text_encoder`.
        which: of a checkpoint with several encoders the one that is meant, such as `clip_l`.

    Returns:
        The tensors by the names of ComfyUI's stand-alone files: `L.weight` (codes, or floats),
        `L.weight_scale`, `L.weight_scale_2`, biases, norms, tables. And what is known of them: `encoder`,
        `classes` and `config` of transformers (a folder's own, else told by the shapes), `prefix`,
        `quant_format` (asked, found), `formats` (how many layers each), `layers` (how each quantized one is
        read), `dropped`, `tokenizer`, `files`.

    Raises:
        ConfigError: for a format or backend that is none, or a format that contradicts the file.
        FileError: for a file that cannot be read, is damaged, or holds no text encoder that int8run knows.
    """
    check_choice("kernel_backend", kernel_backend, list_kernel_backends())
    place = Path(path).expanduser()
    config = dict(read_json(place / CONFIG_NAME)) if (place / CONFIG_NAME).is_file() else {}
    named = next(
        (
            name
            for name in config.get("architectures") or ()
            for known in list_supported_encoders().values()
            if name in known.classes
        ),
        "",
    )
    source = EncoderFile(place, quant_format, which, named)
    classes = sorted(
        source.encoder.classes, key=lambda name: name != named
    )  # the one that the folder names is the usual one
    with source.files:
        with name_file_in_errors(source.where):
            config = config or build_config(source.encoder, source.shapes)
            layout = fit_weights(source, build_skeleton(classes[0], config, torch.bfloat16))
            check_complete(source, layout)
            names, dropped = map_canonical_names(source.encoder, source.shapes)
        state: dict[str, Tensor] = {}
        layers: dict[str, Any] = {}
        read_as_float: dict[str, str] = {}
        for key, parts in names.items():
            name = key.removesuffix(WEIGHT)
            stored = parts[0].key.removesuffix(WEIGHT)
            layer = source.read_packed(stored) if key.endswith(WEIGHT) and len(parts) == 1 else None
            if layer is not None:
                state |= name_layer_tensors(name, layer)
                layers[name] = describe_layer(layer, source.get_format(stored))
                continue
            if word := source.get_format(stored):
                read_as_float[name] = word
            read = [
                part.extract(check_finite(source.where, part.key, source.read_tensor(part.key)))
                for part in parts
            ]
            state[key] = torch.cat(read) if len(read) > 1 else read[0].contiguous()
    tokenizer = source.encoder.tokenizer
    return state, {
        "encoder": source.encoder.name,
        "classes": classes,
        "config": config,
        "prefix": source.prefix,
        "quant_format": {"asked": quant_format, "found": source.found},
        "kernel_backend": kernel_backend,
        "formats": dict(source.counts),
        "layers": layers,
        "read_as_float": read_as_float,
        "dropped": dict(dropped),
        "tokenizer": dict(tokenizer),
        "files": [str(file) for file in source.files.files],
    }


def build_text_encoder(
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    class_name: str | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    rows: int | None = None,
) -> nn.Module:
    """The transformers model of what `load_text_encoder` returned; quantized layers stay quantized.

    Args:
        class_name: one of `metadata["classes"]`; None: the first.
        config: of that class; None: what the file's shapes and the encoder's family say.
        dtype: of what is float, and of what comes out.
        device: where it is to run.
        rows: tokens of a usual call, which `kernel_backend="auto"` measures with; None: the family's.

    Raises:
        ConfigError: for a class that does not hold such weights.
        FileError: when tensors are missing or of another size than the config says.
        BackendError: when the kernels cannot run here.
    """
    encoder = get_encoder(metadata["encoder"])
    name = class_name or encoder.classes[0]
    check_choice("class_name", name, encoder.classes)
    place = torch.device(device)
    model = build_skeleton(name, dict(metadata["config"] if config is None else config), dtype)
    kernels = Kernels(metadata["kernel_backend"], place, rows or encoder.num_tokens)
    return build_encoder(model, EncoderState(encoder, state_dict, metadata), None, kernels).module.to(place)
