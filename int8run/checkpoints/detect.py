"""Find out how each weight of a checkpoint is stored: float, fp8, mxfp8, nvfp4, INT8 or GGUF, of any maker.

Names, shapes and markers decide. Everything that determines what the numbers mean is checked before any
weight is read. What is found is named or refused; nothing is guessed, padded or cut. Where a maker's label
and the shape of the scale disagree the shape counts, because labels are often wrong.

`read_layers` is what others call. It returns a `CheckpointLayer` (`layer.py`) for each weight.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from int8run.checkpoints import block_layout, block_scaled, quip
from int8run.checkpoints.block_formats import BLOCK_FORMATS
from int8run.checkpoints.classify import CLEAR_SUFFIXES, classify_weight
from int8run.checkpoints.declared_format import AUTO, UNDECLARED, DeclaredFormat
from int8run.checkpoints.format_names import CONVROT, name_granularity, promised_granularities
from int8run.checkpoints.int8_transform import is_transformed_by_tensors
from int8run.checkpoints.layer import FP8, INT8, CheckpointLayer
from int8run.checkpoints.plain_casts import check_casts
from int8run.checkpoints.products import check_products
from int8run.checkpoints.quant_metadata import Marker, read_markers
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.rotation_evidence import warn_rotations
from int8run.checkpoints.sdnq import find_sdnq_method
from int8run.checkpoints.unsupported import check_supported, read_quant_method
from int8run.errors import ConfigError, FileError
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
QUANTIZED_DTYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2")  # of weights
# last words of the keys of tensors that may be int8
INT8_SUFFIXES = ("weight", "weight_packed", quip.HADAMARD_FLAG)
# a tensor of a whole file that says: the fp8 weights below its prefix have scales. lightx2v writes it into
# int8 files too
SCALED_FP8 = "scaled_fp8"
# comfy-quants' entry in the header, and `quant_method` in a config.json, that say the same
SCALE_METADATA = "scale_granularity"
SCALED_FP8_METHODS = ("fp8", "fbgemm_fp8", "bfl")


def read_layers(
    files: TensorFiles,
    prefix: str = "",
    declared: DeclaredFormat = UNDECLARED,
) -> dict[str, CheckpointLayer]:
    """Find out what every weight below a prefix is: all with 2 dimensions, fp8 and GGUF's with any.

    Only headers, markers and scales are read, and fp8 weights without a scale, whose numbers must be those of
    a plain cast. What lies outside of the prefix (a full checkpoint's text encoders and VAE) is not looked
    at.

    Args:
        files: the checkpoint.
        prefix: of the keys that belong to the model.
        declared: what the user says of it; it decides what the file leaves open.

    Returns:
        Layer name -> the layer, in the file's order.

    Raises:
        FileError: a weight that cannot be read, with its name and the reason; scales and markers without a
            weight.
    """
    check_supported(files, prefix)
    markers = read_markers(files, prefix)
    check_orphans(files, prefix)
    names = list_layer_names(files, prefix)
    has_int8_marker = any(name in markers and files[f"{name}.weight"].dtype == "I8" for name in names)
    assume_rotated = declared.quant_format == CONVROT and not has_int8_marker

    sdnq_method = find_sdnq_method(files, names, declared)
    layers = {}
    for name in names:
        layer = classify_weight(
            files, name, markers.get(name), assume_rotated=assume_rotated, sdnq=sdnq_method
        )
        if layer is not None:
            layers[name] = layer
    layers |= resolve_block_layers(files, layers, markers, declared.quant_format)
    check_consistency(files, prefix, layers, markers)
    check_products(files, layers)
    layers |= check_casts(files, layers, declared.quant_format)
    warn_rotations(files, layers)

    warn_wrong_labels(files, layers, markers)
    n_scalars = sum("scalar" in layer.part_keys for layer in layers.values())
    if n_scalars:
        log.info(
            "%s: %s one more scale for the whole weight; the scales of the blocks are used",
            files.path,
            count_noun(n_scalars, "mxfp8 layer", "have"),
        )
    return layers


def list_layer_names(files: TensorFiles, prefix: str) -> list[str]:
    """The keys of all weights below a prefix, without `.weight`."""
    keys = [key for key in files if key.startswith(prefix) and key.endswith(".weight")]
    return [key.removesuffix(".weight") for key in keys]


def list_quantized_weights(files: TensorFiles) -> list[str]:
    """The keys of weights with two dimensions and more that are not floats; no tensor is read."""
    return [
        key
        for key, info in files.items()
        if key.endswith(".weight") and len(info.shape) > 1 and info.dtype in QUANTIZED_DTYPES
    ]


def read_denoiser_layers(
    files: TensorFiles,
    prefix: str,
    declared: DeclaredFormat = UNDECLARED,
) -> dict[str, CheckpointLayer]:
    """Find out what every weight of a denoiser is, as `read_layers` does.

    Args:
        files: the checkpoint.
        prefix: of the denoiser's keys.
        declared: what the user says of it.

    Raises:
        ConfigError: when no layer has that format.
        FileError: see `read_layers`.
    """
    layers = read_layers(files, prefix, declared)
    if declared.quant_format == AUTO:
        return layers
    held = Counter(layer.format_name or layer.label for layer in layers.values())
    if not held.keys().isdisjoint(declared.accepted_formats):
        return layers
    formats = ", ".join(f"{count} × {name}" for name, count in held.most_common())
    raise ConfigError(
        f"model.quant_format={declared.quant_format}, and {files.path} has no such layer: it holds "
        f"{formats or 'no matrix'}; model.quant_format=auto takes what there is"
    )


def get_logical_shapes(
    files: TensorFiles, layers: Mapping[str, CheckpointLayer]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor as a model has it, as far as the file says.

    Of a weight with two numbers in a byte that is [N, K], not [N, K / 2].
    """
    shapes = {key: info.shape for key, info in files.items()}
    for layer in layers.values():
        if len(layer.shape) == 2:
            shapes[layer.key] = (layer.rows, layer.columns)
    return shapes


def check_orphans(files: TensorFiles, prefix: str) -> None:
    """Raise FileError for a scale or marker without a weight, and for int8 numbers that are not a weight."""
    for key in files:
        if not key.startswith(prefix):
            continue
        layer, _, suffix = key.rpartition(".")
        has_weight = f"{layer}.weight" in files or (layer.endswith(".weight") and layer in files)
        if suffix in CLEAR_SUFFIXES and not has_weight:
            raise FileError(
                f"{files[key].file}: {key} belongs to no weight, {layer}.weight is missing; the file is "
                "incomplete"
            )
        if files[key].dtype == "I8" and suffix not in INT8_SUFFIXES:
            raise FileError(
                f"{files[key].file}: {key} is I8 and not the weight of a layer; int8run reads int8 weights "
                "of layers"
            )


def resolve_block_layers(
    files: TensorFiles,
    layers: Mapping[str, CheckpointLayer],
    markers: Mapping[str, Marker],
    quant_format: str,
) -> dict[str, CheckpointLayer]:
    """The layers in mxfp8 and nvfp4 among these, with the format name that says how their scales lie.

    Raises:
        FileError: nothing decides which it is, or scales that are NaN or negative.
    """
    resolved = {}
    for storage_dtype in BLOCK_FORMATS:
        own = {name: layer for name, layer in layers.items() if layer.storage_dtype == storage_dtype}
        if not own:
            continue
        format_name = block_layout.resolve_format_name(files, storage_dtype, own, markers, quant_format)
        for name, layer in own.items():
            block_scaled.check_block_scales(files, files[layer.key], format_name, layer.part_keys["scale"])
            resolved[name] = replace(layer, format_name=format_name, label=format_name)
    return resolved


def check_consistency(
    files: TensorFiles, prefix: str, layers: Mapping[str, CheckpointLayer], markers: Mapping[str, Marker]
) -> None:
    """Raise FileError for layers that make no sense beside the others."""
    check_markers_complete(files, layers, markers)
    for key in files:
        if key.startswith(prefix) and is_scaled_fp8_marker(key):
            check_scales_exist(files, key, key.removesuffix(SCALED_FP8), layers)
    label = find_scale_label(files)
    if label:
        check_scales_exist(files, label, prefix, layers)


def check_markers_complete(
    files: TensorFiles, layers: Mapping[str, CheckpointLayer], markers: Mapping[str, Marker]
) -> None:
    """Raise FileError for an INT8 layer that nothing describes, where others have markers."""
    int8_layers = [layer for layer in layers.values() if layer.storage_dtype == INT8]
    if not any(layer.name in markers for layer in int8_layers):
        return
    for layer in int8_layers:
        describes_itself = layer.name in markers or is_transformed_by_tensors(layer.part_keys)
        if not describes_itself:
            raise FileError(
                f"{files.path}: {layer.name} has no comfy_quant marker and other INT8 layers have one, so "
                "it is unclear whether it is rotated; the file is damaged"
            )


def check_scales_exist(
    files: TensorFiles, label: str, prefix: str, layers: Mapping[str, CheckpointLayer]
) -> None:
    """Raise FileError when a label of a whole file promises scales and no fp8 layer below it has one.

    Args:
        files: the checkpoint.
        label: what promises scales, for the error.
        prefix: of the layers that it speaks of.
        layers: all of the file.
    """
    fp8_layers = [
        layer for layer in layers.values() if layer.storage_dtype == FP8 and layer.name.startswith(prefix)
    ]
    if fp8_layers and not any("scale" in layer.part_keys for layer in fp8_layers):
        raise FileError(
            f"{files.path}: {label} says that fp8 weights have scales, and none has one "
            f"({fp8_layers[0].name}); the scales were lost, download the file again"
        )


def find_scale_label(files: TensorFiles) -> str:
    """What says that the fp8 weights of a file have scales, besides markers; empty where nothing does."""
    if SCALE_METADATA in files.metadata:
        return f"{SCALE_METADATA} in the header"
    method = read_quant_method(files)
    return f"the config beside it (quant_method {method})" if method in SCALED_FP8_METHODS else ""


def is_scaled_fp8_marker(key: str) -> bool:
    """Whether a key marks a whole fp8 file.

    It belongs to no layer and must not stand beside int8 weights that are written.
    """
    return key == SCALED_FP8 or key.endswith(f".{SCALED_FP8}")


def warn_wrong_labels(
    files: TensorFiles, layers: Mapping[str, CheckpointLayer], markers: Mapping[str, Marker]
) -> None:
    """Log one warning for each kind of label that the shape of the scale contradicts."""
    wrong: Counter[tuple[str, str]] = Counter()  # label and granularity -> layers
    for name, layer in layers.items():
        marker = markers.get(name)
        if marker is None or not layer.granularity:
            continue
        granularity = name_granularity(layer.granularity, layer.rows, layer.columns, marker)
        per_row = marker.fields.get("per_row")
        if granularity not in promised_granularities(marker):
            wrong[marker.format_name or "int8", granularity] += 1
        elif per_row is not None and per_row != (granularity == "row"):
            wrong[f"per_row={per_row}", granularity] += 1
    for (label, granularity), count in wrong.items():
        log.warning(
            "%s: %s labeled %s, with scales by %s; the shape of the scales counts",
            files.path,
            count_noun(count, "layer", "are"),
            label,
            granularity,
        )
