"""A text encoder's weights: in a file, read tensor by tensor, or in memory as `load_text_encoder` gives them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from int8run.checkpoints.comfy_formats import GLOBAL_SCALE
from int8run.checkpoints.comfy_int8 import FACTOR, SCALE, WEIGHT
from int8run.checkpoints.detect import is_scaled_fp8_marker, read_layers
from int8run.checkpoints.layer import FLOAT, CheckpointLayer, get_hadamard
from int8run.checkpoints.provenance import read_provenance
from int8run.checkpoints.quant_metadata import METADATA_KEY
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError, check_choice
from int8run.kernels.hadamard.reference import Rotation
from int8run.layers.weight_only import PackedLayer
from int8run.outlier.base import OutlierTransform
from int8run.quant.formats import FORMATS
from int8run.quant.packed_weight import PackedWeight, is_fp8
from int8run.text_encoders.detect import detect_encoder, find_encoder_of_class
from int8run.text_encoders.registry import EncoderFamily, list_supported_encoders

AUTO, NO_FORMAT, MIXED = "auto", "none", "mixed"
# ComfyUI's word for all INT8 layers with a scale for the layer or for each row
TENSORWISE = ("int8_tensorwise", "int8_rowwise", "int8_convrot")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# the first code without its sign that is no number
NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}


class EncoderWeights(Protocol):
    """Where the weights of one encoder come from. Names are those of the source, without a prefix."""

    encoder: EncoderFamily

    @property
    def where(self) -> str:
        """The file, for people."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Logical shapes of all tensors but those that belong to quantized weights."""
        ...

    def resolve_padded_shapes(self, model: nn.Module) -> None:
        """Take the shapes of padded weights from the model that they are for."""
        ...

    def get_format(self, name: str) -> str:
        """The format of a layer's weight, for people; empty for a float one."""
        ...

    def is_packable(self, name: str) -> bool:
        """Whether a quantized layer can stay as it is stored; nothing is read."""
        ...

    def read_packed(self, name: str) -> PackedLayer | None:
        """A quantized layer as it is stored, without its bias; None for a float one, or one whose numbers cannot stay as they are."""
        ...

    def read_tensor(self, key: str) -> Tensor:
        """A tensor's numbers; of a quantized weight what its codes stand for, in float32."""
        ...


class EncoderFile:
    """A safetensors file, or a folder of them, opened: only headers, markers and scales have been read.

    Args:
        path: a file, its index, or a folder.
        quant_format: `auto`, or the format that the layers must have; it also settles what a file leaves
            open.
        which: of a checkpoint with several encoders the one that is meant.
        class_name: of transformers, where a folder's config names it; empty: the encoder is told by names and
            shapes.

    Raises:
        ConfigError: for a format that is none, or that contradicts the file.
        FileError: when the file cannot be read or holds no text encoder.
    """

    def __init__(self, path: Path, quant_format: str = AUTO, which: str | None = None, class_name: str = ""):
        check_choice("quant_format", quant_format, (AUTO, *FORMATS))
        self.asked = quant_format
        self.files = TensorFiles.open(path)
        self.encoder, self.prefix = detect_file_encoder(self.files, class_name, which)
        layers = read_layers(self.files, self.prefix, None if quant_format == AUTO else quant_format)
        self.layers = {name.removeprefix(self.prefix): layer for name, layer in layers.items()}
        beside = {key for layer in layers.values() for key in layer.sibling_keys}
        keys = [
            key
            for key in self.files
            if key.startswith(self.prefix) and key not in beside and not is_scaled_fp8_marker(key)
        ]
        self.shapes = {key.removeprefix(self.prefix): self.files[key].shape for key in keys}
        self.shapes |= {
            name + WEIGHT: (x.rows, x.columns) for name, x in self.layers.items() if len(x.shape) == 2
        }
        empty = [key for key, shape in self.shapes.items() if 0 in shape]
        if empty:
            raise FileError(
                f"{self.where}: {empty[0]} has the shape {list(self.shapes[empty[0]])}, it is empty; the file is damaged"
            )
        self.check_note()
        self.check_asked()

    @property
    def where(self) -> str:
        """The file, for people."""
        return str(self.files.path)

    @property
    def quantized(self) -> dict[str, CheckpointLayer]:
        """The layers that are not float, by name."""
        return {name: layer for name, layer in self.layers.items() if layer.storage_dtype != FLOAT}

    @property
    def counts(self) -> Counter[str]:
        """How many layers each format has."""
        return Counter(self.get_format(name) for name in self.quantized)

    @property
    def found(self) -> str:
        """The one format of the quantized layers, `mixed`, or `none`. Casts beside layers with scales are usual and do not count."""
        words = {
            word
            for word in self.counts
            if word.removesuffix("_cast") == word or word.removesuffix("_cast") not in self.counts
        }
        return words.pop() if len(words) == 1 else MIXED if words else NO_FORMAT

    def check_note(self) -> None:
        """Refuse a file of ours that lost what says how its layers were made: a rotation is in no shape.

        Raises:
            FileError: with the format that it had.
        """
        made = FORMATS.get(str(read_provenance(self.files.path, self.files.metadata).get("format")))
        told = METADATA_KEY in self.files.metadata or any(
            "marker" in layer.part_keys for layer in self.layers.values()
        )
        if made is not None and made.marker_format and self.counts and not told:
            raise FileError(
                f"{self.where} was made as {made.name}, and the comfy_quant markers of its layers are not there, so nobody knows how to "
                "read them; make it again"
            )

    def check_asked(self) -> None:
        """Refuse a format that the file does not have.

        Raises:
            ConfigError: naming both.
        """
        if self.asked == AUTO:
            return
        meant = TENSORWISE if self.asked == TENSORWISE[0] else (self.asked,)
        # beside them casts, and layers whose shape it refuses
        allowed = {*meant, f"{self.asked}_cast", FORMATS[self.asked].fallback}
        if not any(word in self.counts for word in meant) or any(word not in allowed for word in self.counts):
            if not self.counts:
                raise ConfigError(
                    f"{self.where} holds no quantized layer, and {self.asked} was asked for; `int8run task=quantize "
                    f"task.component=text_encoder clip={self.asked} model.location=FILE save=NEW` quantizes it"
                )
            held = ", ".join(f"{n} layers {word}" for word, n in self.counts.items())
            raise ConfigError(
                f"{self.where} holds {held}, and {self.asked} was asked for; clip=auto (quant_format in a program) takes what there is"
            )

    def get_format(self, name: str) -> str:
        layer = self.layers.get(name)
        return "" if layer is None or layer.storage_dtype == FLOAT else layer.format_name or layer.label

    def resolve_padded_shapes(self, model: nn.Module) -> None:
        padded = {name: layer for name, layer in self.layers.items() if layer.is_padded}
        if not padded:
            return
        wanted = {
            self.encoder.to_canonical(name)[0].key: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
        }
        for name, layer in padded.items():
            shape = wanted.get(self.encoder.to_canonical(name + WEIGHT)[0].key)
            if shape is not None and layer.fits_shape(shape):
                self.shapes[name + WEIGHT] = shape

    def is_packable(self, name: str) -> bool:
        return name in self.layers and self.layers[name].is_packable

    def read_packed(self, name: str) -> PackedLayer | None:
        if not self.is_packable(name):
            return None
        layer = self.layers[name]
        weight, transform = layer.read_packed_weight(self.files, self.shape_of(layer, name))
        if is_fp8(weight.qdata) and bool(
            (weight.qdata.view(torch.uint8) & 0x7F >= NOT_FINITE[weight.qdata.dtype]).any()
        ):
            raise FileError(f"{self.where}: {name + WEIGHT} holds NaN or infinity; the file is damaged")
        return PackedLayer(weight, transform, None)

    def read_tensor(self, key: str) -> Tensor:
        name, info = key.removesuffix(WEIGHT), self.files[self.prefix + key]
        layer = self.layers.get(name) if key.endswith(WEIGHT) else None
        if layer is not None and layer.storage_dtype != FLOAT:
            return layer.read_weight(self.files, shape=self.shape_of(layer, name))
        if info.dtype not in FLOATS:
            raise FileError(
                f"{self.where}: {info.key} is {info.dtype} where numbers are {', '.join(FLOATS)}; the file is damaged"
            )
        return self.files.read(info.key)

    def shape_of(self, layer: CheckpointLayer, name: str) -> tuple[int, int] | None:
        """N and K of a padded weight; None for others, which have their own."""
        if not layer.is_padded:
            return None
        rows, columns = self.shapes[name + WEIGHT]
        return rows, columns


def detect_file_encoder(files: TensorFiles, class_name: str, which: str | None) -> tuple[EncoderFamily, str]:
    """The encoder that files hold, and what stands before its names.

    Raises:
        FileError: when nobody knows.
    """
    shapes = {key: info.shape for key, info in files.items()}
    if not class_name:
        with name_file_in_errors(str(files.path)):
            found = detect_encoder(shapes, which)
        return found.encoder, found.prefix
    encoder = find_encoder_of_class(class_name, shapes)
    if encoder is None:
        known = ", ".join(
            dict.fromkeys(name for known in list_supported_encoders().values() for name in known.classes)
        )
        raise FileError(
            f"{files.path} is a {class_name}; int8run quantizes {known}; leave it out: clip.components names the others"
        )
    return encoder, ""


class EncoderState:
    """The same out of what `load_text_encoder` returned.

    Raises:
        ConfigError: when the two do not belong together.
    """

    def __init__(self, encoder: EncoderFamily, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]):
        self.encoder, self.state, self.layers = encoder, state_dict, metadata["layers"]
        self.where = ", ".join(map(str, metadata["files"]))
        lacking = [name for name in self.layers if name + WEIGHT not in state_dict]
        if lacking:
            raise ConfigError(
                f"the metadata describes {lacking[0]}, and the state_dict has no weight of it; pass what was loaded together"
            )
        beside = {f"{name}.{suffix}" for name in self.layers for suffix in (SCALE, GLOBAL_SCALE, FACTOR)}
        self.shapes = {key: tuple(t.shape) for key, t in state_dict.items() if key not in beside}
        self.shapes |= {name + WEIGHT: tuple(about["shape"]) for name, about in self.layers.items()}

    def resolve_padded_shapes(self, model: nn.Module) -> None:
        """Nothing: what was loaded has been cut."""

    def get_format(self, name: str) -> str:
        return self.layers[name]["format"] if name in self.layers else ""

    def is_packable(self, name: str) -> bool:
        return name in self.layers

    def read_packed(self, name: str) -> PackedLayer | None:
        return restore_layer(self.state, name, self.layers[name]) if name in self.layers else None

    def read_tensor(self, key: str) -> Tensor:
        layer = self.read_packed(key.removesuffix(WEIGHT)) if key.endswith(WEIGHT) else None
        return self.state[key] if layer is None else layer.transform.restore_weight(layer.weight.dequantize())


@contextmanager
def name_file_in_errors(where: str) -> Iterator[None]:
    """Let errors about a file's tensors say which file it is.

    Raises:
        FileError: with the file before its words.
    """
    try:
        yield
    except FileError as error:
        raise FileError(f"{where}: {error}" if where not in str(error) else str(error)) from error


def describe_layer(layer: PackedLayer, word: str) -> dict[str, Any]:
    """What must be known of a layer besides its tensors; plain values, `read_back` reads them."""
    weight, transform = layer.weight, layer.transform
    return {
        "format": word,
        "kind": weight.storage_dtype,
        "shape": list(weight.shape),
        "block": weight.block_size,
        "swizzled": weight.is_swizzled,
        "high_first": weight.high_nibble_first,
        "outlier": transform.method,
        "settings": transform.settings,
        "group_size": transform.group_size,
        "sylvester": transform.sylvester,
        "centered": transform.centered,
    }


def name_layer_tensors(name: str, layer: PackedLayer) -> dict[str, Tensor]:
    """A layer's tensors by the names that ComfyUI gives them."""
    found = {
        name + WEIGHT: layer.weight.qdata,
        f"{name}.{SCALE}": layer.weight.scale,
        f"{name}.{GLOBAL_SCALE}": layer.weight.global_scale,
        f"{name}.{FACTOR}": layer.transform.factor,
    }
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def restore_layer(state: Mapping[str, Tensor], name: str, about: Mapping[str, Any]) -> PackedLayer:
    """The layer of `tensors_of` and `described`."""
    weight = PackedWeight(
        state[name + WEIGHT],
        state.get(f"{name}.{SCALE}"),
        tuple(about["shape"]),
        state.get(f"{name}.{GLOBAL_SCALE}"),
        about["block"],
        about["swizzled"],
        about["high_first"],
    )
    group, sylvester = about["group_size"], about["sylvester"]
    rotation = Rotation(get_hadamard(group, sylvester), sylvester) if group else None
    factor = state.get(f"{name}.{FACTOR}")
    return PackedLayer(
        weight,
        OutlierTransform(about["outlier"], about["settings"], factor, rotation, about["centered"]),
        None,
    )


def check_finite(where: str, key: str, tensor: Tensor) -> Tensor:
    """Refuse NaN and infinity, with which a model computes nothing. Returns the tensor.

    Raises:
        FileError: naming the tensor.
    """
    if (
        tensor.is_floating_point()
        and not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()
    ):
        raise FileError(f"{where}: {key} holds NaN or infinity; the file is damaged")
    return tensor
