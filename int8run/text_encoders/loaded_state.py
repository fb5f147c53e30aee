"""A text encoder in memory: the tensors and metadata that `load_text_encoder` returns.

`build_text_encoder` takes them. How a quantized layer is described is fixed: programs may keep the two on
disk and build from them later.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from int8run.checkpoints.comfy_formats import GLOBAL_SCALE
from int8run.checkpoints.comfy_int8 import FACTOR, SCALE, WEIGHT
from int8run.checkpoints.grouped import CODEBOOK, CORRECTION, GROUP_SCALE, PART_SUFFIXES, ROW_SCALE
from int8run.checkpoints.layer import get_hadamard
from int8run.errors import ConfigError
from int8run.kernels.hadamard.reference import Rotation
from int8run.layers.weight_only import PackedLayer
from int8run.models.tensor_part import Shape
from int8run.outlier.base import OutlierTransform
from int8run.quant.grouped_weight import GROUPED_BITS, GroupedWeight
from int8run.quant.packed_weight import PackedWeight
from int8run.text_encoders.registry import EncoderFamily

# field of a weight in codes -> the last word of its key; the scales of rows are [N, 1] here
GROUPED_SUFFIXES = {
    "group_scale": PART_SUFFIXES[GROUP_SCALE],
    "scale": PART_SUFFIXES[ROW_SCALE],
    "codebook": PART_SUFFIXES[CODEBOOK],
    "correction": PART_SUFFIXES[CORRECTION],
}


class EncoderState:
    """Weights in memory; an `EncoderWeights` of what `load_text_encoder` returned.

    Args:
        encoder: that they are of.
        state_dict: tensors by canonical names.
        metadata: of `load_text_encoder`.

    Raises:
        ConfigError: when the two do not belong together.
    """

    def __init__(self, encoder: EncoderFamily, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]):
        self.encoder = encoder
        self.state = state_dict
        self.layers: Mapping[str, Any] = metadata["layers"]
        self.where = ", ".join(map(str, metadata["files"]))
        self.check_layers()
        self.shapes = self.collect_shapes()

    def check_layers(self) -> None:
        """Raise ConfigError, naming the first, for a layer that is described and has no weight."""
        for name in self.layers:
            if name + WEIGHT not in self.state:
                raise ConfigError(
                    f"the metadata describes {name}, and the state_dict has no weight of it; "
                    "pass what was loaded together"
                )

    def collect_shapes(self) -> dict[str, Shape]:
        """Return the logical shapes of all tensors but those that belong to quantized weights."""
        suffixes = (SCALE, GLOBAL_SCALE, FACTOR, *GROUPED_SUFFIXES.values())
        not_weights = {f"{name}.{suffix}" for name in self.layers for suffix in suffixes}
        shapes: dict[str, Shape] = {}
        for key, tensor in self.state.items():
            if key not in not_weights:
                shapes[key] = tuple(tensor.shape)
        for name, description in self.layers.items():
            shapes[name + WEIGHT] = tuple(description["shape"])
        return shapes

    def resolve_padded_shapes(self, model: nn.Module) -> None:
        """Do nothing: the metadata has the shapes without padding."""

    def get_format(self, name: str) -> str:
        """Return the format of a layer's weight, for messages; empty for a float one."""
        if name not in self.layers:
            return ""
        return str(self.layers[name]["format"])

    def is_packable(self, name: str) -> bool:
        """Return whether a layer is quantized: such layers stay as they are."""
        return name in self.layers

    def read_packed(self, name: str) -> PackedLayer | None:
        """Return a quantized layer, without its bias; None for a float one."""
        if name not in self.layers:
            return None
        return restore_layer(self.state, name, self.layers[name])

    def read_tensor(self, key: str) -> Tensor:
        """Return a tensor; a quantized weight dequantized, in float32."""
        layer = None
        if key.endswith(WEIGHT):
            layer = self.read_packed(key.removesuffix(WEIGHT))
        if layer is None:
            return self.state[key]
        return layer.transform.restore_weight(layer.weight.dequantize())


def describe_layer(layer: PackedLayer, format_name: str) -> dict[str, Any]:
    """Return what must be known of a layer besides its tensors, in plain values; `restore_layer` reads it.

    Args:
        layer: quantized.
        format_name: for messages.
    """
    weight, transform = layer.weight, layer.transform
    description = {
        "format": format_name,
        "kind": weight.storage_dtype,
        "shape": list(weight.shape),
        "outlier": transform.method,
        "settings": transform.settings,
        "group_size": transform.group_size,
        "sylvester": transform.sylvester,
        "centered": transform.centered,
    }
    if isinstance(weight, PackedWeight):
        description["block"] = weight.block_size
        description["swizzled"] = weight.is_swizzled
        description["high_first"] = weight.high_nibble_first
    return description


def name_layer_tensors(name: str, layer: PackedLayer) -> dict[str, Tensor]:
    """Return a layer's tensors by the names that ComfyUI gives them."""
    tensors = {f"{name}.{FACTOR}": layer.transform.factor}
    weight = layer.weight
    if isinstance(weight, GroupedWeight):
        tensors[name + WEIGHT] = weight.codes
        for field, suffix in GROUPED_SUFFIXES.items():
            tensors[f"{name}.{suffix}"] = getattr(weight, field)
    else:
        tensors[name + WEIGHT] = weight.qdata
        tensors[f"{name}.{SCALE}"] = weight.scale
        tensors[f"{name}.{GLOBAL_SCALE}"] = weight.global_scale
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def restore_layer(state_dict: Mapping[str, Tensor], name: str, description: Mapping[str, Any]) -> PackedLayer:
    """Return the layer of which `name_layer_tensors` and `describe_layer` gave the parts, without its bias.

    Args:
        state_dict: has its tensors.
        name: of the layer.
        description: of `describe_layer`.
    """
    weight = restore_weight(state_dict, name, description)
    group_size, is_sylvester = description["group_size"], description["sylvester"]
    rotation = None
    if group_size:
        rotation = Rotation(get_hadamard(group_size, is_sylvester=is_sylvester), is_sylvester)
    transform = OutlierTransform(
        method=description["outlier"],
        settings=description["settings"],
        factor=state_dict.get(f"{name}.{FACTOR}"),
        rotation=rotation,
        centered=description["centered"],
    )
    return PackedLayer(weight, transform, None)


def restore_weight(
    state_dict: Mapping[str, Tensor], name: str, description: Mapping[str, Any]
) -> PackedWeight | GroupedWeight:
    """Return the weight of such a layer; arguments as of `restore_layer`."""
    bits = GROUPED_BITS.get(description["kind"])
    if bits is not None:
        parts = {field: state_dict.get(f"{name}.{suffix}") for field, suffix in GROUPED_SUFFIXES.items()}
        return GroupedWeight(codes=state_dict[name + WEIGHT], bits=bits, **parts)  # type: ignore[arg-type]
    return PackedWeight(
        qdata=state_dict[name + WEIGHT],
        scale=state_dict.get(f"{name}.{SCALE}"),
        shape=tuple(description["shape"]),
        global_scale=state_dict.get(f"{name}.{GLOBAL_SCALE}"),
        block_size=description["block"],
        is_swizzled=description["swizzled"],
        high_nibble_first=description["high_first"],
    )
