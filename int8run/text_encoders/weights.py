"""A text encoder's weights: what `build` needs of them, and how they are read from a file, tensor by tensor.

`loaded_state` has the same for weights in memory, as `load_text_encoder` gives them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from int8run.checkpoints.checkpoint_files import TensorInfo
from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.checkpoints.declared_format import AUTO, DeclaredFormat
from int8run.checkpoints.detect import is_scaled_fp8_marker, read_layers
from int8run.checkpoints.header import FLOATS, FP8
from int8run.checkpoints.layer import FLOAT, GGUF
from int8run.checkpoints.provenance import read_provenance
from int8run.checkpoints.quant_metadata import METADATA_KEY
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError, check_choice
from int8run.layers.weight_only import PackedLayer
from int8run.models.tensor_part import Shape, TensorPart
from int8run.quant.formats import FORMATS, list_fallbacks
from int8run.quant.packed_weight import PackedWeight, is_fp8
from int8run.text_encoders.cut_rows import add_cut_rows, find_cut_shapes, may_lack_rows
from int8run.text_encoders.detect import detect_encoder, find_encoder_of_class
from int8run.text_encoders.registry import EncoderFamily, find_gguf_encoder, list_supported_encoders
from int8run.utils.plurals import count_noun

NO_FORMAT, MIXED = "none", "mixed"
FLOAT_DTYPES = (*FLOATS, *FP8)
# the smallest byte, without its sign, that is NaN or infinity
NOT_FINITE_BYTES = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}


class EncoderWeights(Protocol):
    """Where the weights of one encoder come from. Names are those of the source, without a prefix."""

    encoder: EncoderFamily

    @property
    def where(self) -> str:
        """The file, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Logical shapes of all tensors but those that belong to quantized weights, such as scales."""
        ...

    def resolve_padded_shapes(self, model: nn.Module) -> None:
        """Take the shapes of padded weights from the model that they are for."""
        ...

    def get_format(self, name: str) -> str:
        """Return the format of a layer's weight, for messages; empty for a float one."""
        ...

    def is_packable(self, name: str) -> bool:
        """Return whether a quantized layer can stay as it is stored; nothing is read."""
        ...

    def read_packed(self, name: str) -> PackedLayer | None:
        """Return a quantized layer as it is stored, without its bias; None for one that cannot stay so."""
        ...

    def read_tensor(self, key: str) -> Tensor:
        """Return a tensor; a quantized weight dequantized, in float32."""
        ...


class EncoderFile:
    """A safetensors or GGUF file, or a folder, opened: only headers, markers and scales have been read.

    Args:
        path: a file, its index, or a folder.
        quant_format: `auto`, or the format that the layers must have; it also decides what a file leaves
            open.
        which: of a checkpoint with several encoders the one that is meant.
        class_name: of transformers, where a folder's config names it; empty: the encoder is detected by names
            and shapes.

    Raises:
        ConfigError: for an unknown format, or one that contradicts the file.
        FileError: when the file cannot be read or holds no text encoder.
    """

    def __init__(self, path: Path, quant_format: str = AUTO, which: str | None = None, class_name: str = ""):
        check_choice("quant_format", quant_format, (AUTO, *FORMATS))
        self.declared = DeclaredFormat(quant_format)
        self.files = TensorFiles.open(path)
        self.encoder, self.prefix = detect_file_encoder(self.files, class_name, which)
        layers = read_layers(self.files, self.prefix, self.declared)
        self.layers = {name.removeprefix(self.prefix): layer for name, layer in layers.items()}
        self.shapes = self.collect_shapes()
        self.check_shapes()
        self.check_markers()
        self.check_requested_format()

    def collect_shapes(self) -> dict[str, Shape]:
        """Return the logical shapes of the encoder's tensors, but those that belong to quantized weights."""
        not_weights: set[str] = set()
        for layer in self.layers.values():
            not_weights.update(layer.sibling_keys)
        shapes: dict[str, Shape] = {}
        for key, info in self.files.items():
            if not key.startswith(self.prefix) or key in not_weights or is_scaled_fp8_marker(key):
                continue
            shapes[key.removeprefix(self.prefix)] = info.shape
        for name, layer in self.layers.items():
            is_matrix = len(layer.shape) == 2
            if is_matrix:
                shapes[name + WEIGHT] = (layer.rows, layer.columns)
        return shapes

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(self.files.path)

    @property
    def format_counts(self) -> Counter[str]:
        """How many layers each format has; float ones do not count."""
        quantized = [name for name, layer in self.layers.items() if layer.storage_dtype != FLOAT]
        return Counter(self.get_format(name) for name in quantized)

    @property
    def found_format(self) -> str:
        """The one format of the quantized layers, `mixed`, or `none`.

        Casts beside layers of the same type with scales are usual and do not count.
        """
        counts = self.format_counts
        formats = [name for name in counts if not is_cast_beside_scaled(name, counts)]
        if not formats:
            return NO_FORMAT
        if len(formats) > 1:
            return MIXED
        return formats[0]

    def check_shapes(self) -> None:
        """Raise FileError, naming the first, for a tensor without numbers."""
        for key, shape in self.shapes.items():
            if 0 in shape:
                raise FileError(
                    f"{self.where}: {key} has the shape {list(shape)}, it is empty; the file is damaged"
                )

    def check_markers(self) -> None:
        """Check that a file of ours has the markers that say how its layers were made.

        Without them a rotation would go unnoticed: it does not show in shapes.

        Raises:
            FileError: with the format that it had.
        """
        provenance = read_provenance(self.files.path, self.files.metadata)
        written = FORMATS.get(str(provenance.get("format")))
        if written is None or not written.marker_format or not self.format_counts:
            return
        if self.has_markers:
            return
        raise FileError(
            f"{self.where} was made as {written.name}, and the comfy_quant markers of its layers are not "
            "there, so it is not known how to read them; make it again"
        )

    @property
    def has_markers(self) -> bool:
        """Whether the header or a tensor says how a layer was made."""
        if METADATA_KEY in self.files.metadata:
            return True
        return any("marker" in layer.part_keys for layer in self.layers.values())

    def check_requested_format(self) -> None:
        """Check that the file has the format that was asked for, and no other.

        Raises:
            ConfigError: naming both.
        """
        requested, counts = self.declared.quant_format, self.format_counts
        if requested == AUTO or fits_declared(counts, self.declared):
            return
        held = ", ".join(f"{count_noun(count, 'layer')} {name}" for name, count in counts.items())
        if all(layer.storage_dtype in (FLOAT, GGUF) for layer in self.layers.values()):
            content = f"GGUF's {held}, which are read as floats" if counts else "no quantized layer"
            raise ConfigError(
                f"{self.where} holds {content}, and {requested} was asked for; "
                f"`int8run task=quantize task.component=text_encoder clip={requested} "
                "model.location=FILE save=NEW` quantizes it"
            )
        raise ConfigError(
            f"{self.where} holds {held}, and {requested} was asked for; "
            "clip=auto (quant_format in a program) takes what there is"
        )

    def resolve_padded_shapes(self, model: nn.Module) -> None:
        """Take the shapes of padded weights from the model that they are for."""
        padded = {name: layer for name, layer in self.layers.items() if layer.is_padded}
        if not padded and not any(may_lack_rows(info) for info in self.files.values()):
            return
        model_shapes: dict[str, Shape] = {}
        for name, parameter in model.named_parameters():
            model_shapes[self.encoder.get_canonical_name(name)] = tuple(parameter.shape)
        for name, layer in padded.items():
            shape = model_shapes.get(self.encoder.get_canonical_name(name + WEIGHT))
            if shape is not None and layer.fits_shape(shape):
                self.shapes[name + WEIGHT] = shape
        cut_shapes = find_cut_shapes(self.list_named_infos(), model_shapes)
        self.shapes |= {key.removeprefix(self.prefix): shape for key, shape in cut_shapes.items()}

    def list_named_infos(self) -> list[tuple[str, TensorInfo]]:
        """The canonical name of each tensor of the encoder, and where it is."""
        return [(self.encoder.get_canonical_name(key), self.files[self.prefix + key]) for key in self.shapes]

    def get_format(self, name: str) -> str:
        """Return the format of a layer's weight, for messages; empty for a float one."""
        layer = self.layers.get(name)
        if layer is None or layer.storage_dtype == FLOAT:
            return ""
        return layer.format_name or layer.label

    def is_packable(self, name: str) -> bool:
        """Return whether a quantized layer can stay as it is stored; nothing is read."""
        return name in self.layers and self.layers[name].is_packable

    def read_packed(self, name: str) -> PackedLayer | None:
        """Return a quantized layer as it is stored, without its bias; None for one that cannot stay so.

        Raises:
            FileError: when it holds NaN or infinity.
        """
        if not self.is_packable(name):
            return None
        layer = self.layers[name]
        weight, transform = layer.read_packed_weight(self.files, self.get_padded_shape(name))
        if isinstance(weight, PackedWeight) and is_fp8(weight.qdata) and has_not_finite(weight.qdata):
            raise FileError(f"{self.where}: {name + WEIGHT} holds NaN or infinity; the file is damaged")
        return PackedLayer(weight, transform, None)

    def read_tensor(self, key: str) -> Tensor:
        """Return a tensor; a quantized weight dequantized, in float32.

        Raises:
            FileError: when it is of a type that holds no numbers.
        """
        info = self.files[self.prefix + key]
        return add_cut_rows(self.read_stored(key), info, self.shapes.get(key, info.shape))

    def read_stored(self, key: str) -> Tensor:
        """Read a tensor as `read_tensor` does, with the rows that the file has."""
        name = key.removesuffix(WEIGHT)
        layer = self.layers.get(name) if key.endswith(WEIGHT) else None
        if layer is not None and layer.storage_dtype != FLOAT:
            return layer.read_weight(self.files, shape=self.get_padded_shape(name))
        info = self.files[self.prefix + key]
        if info.dtype not in FLOAT_DTYPES:
            raise FileError(
                f"{self.where}: {info.key} is {info.dtype} where numbers are {', '.join(FLOAT_DTYPES)}; "
                "the file is damaged"
            )
        return self.files.read(info.key)

    def get_padded_shape(self, name: str) -> tuple[int, int] | None:
        """Return N and K of a layer's padded weight; None for others, whose shape is that of the file."""
        if not self.layers[name].is_padded:
            return None
        rows, columns = self.shapes[name + WEIGHT]
        return rows, columns


def fits_declared(counts: Mapping[str, int], declared: DeclaredFormat) -> bool:
    """Whether layers have the format that the user says they have.

    Casts to the same fp8 type, and layers whose shape the format does not take, may be beside them.

    Args:
        counts: how many layers each format has.
        declared: its `quant_format` is not `auto`.
    """
    accepted = set(declared.accepted_formats)  # `int8_tensorwise` stands for three
    if accepted.isdisjoint(counts):
        return False
    format_name = declared.quant_format
    allowed = {*accepted, find_cast_name(format_name), *list_fallbacks(format_name)}
    return allowed.issuperset(counts)


def find_cast_name(format_name: str) -> str | None:
    """The format of plain casts to the type that an fp8 format stores; None for all other formats."""
    scaled = FORMATS.get(format_name)
    if scaled is None or scaled.storage_dtype != "fp8":
        return None
    for cast in FORMATS.values():
        if not cast.granularity and cast.qdata_dtype == scaled.qdata_dtype:
            return cast.name
    return None


def is_cast_beside_scaled(format_name: str, counts: Mapping[str, int]) -> bool:
    """Whether a format is that of casts, and there are layers of the same type with scales.

    Args:
        format_name: one of `counts`.
        counts: how many layers each format has.
    """
    return any(other != format_name and find_cast_name(other) == format_name for other in counts)


def detect_file_encoder(files: TensorFiles, class_name: str, which: str | None) -> tuple[EncoderFamily, str]:
    """Return the encoder that files hold, and what stands before its names.

    Args:
        files: with their headers read.
        class_name: of transformers, where a config names it; else empty.
        which: of several encoders the one that is meant.

    Raises:
        FileError: when they hold none that is supported.
    """
    shapes = {key: info.shape for key, info in files.items()}
    named = find_gguf_encoder(files.metadata)
    if named is not None:
        return named, ""
    if not class_name:
        with name_file_in_errors(str(files.path)):
            found = detect_encoder(shapes, which)
        return found.encoder, found.prefix
    encoder = find_encoder_of_class(class_name, shapes)
    if encoder is not None:
        return encoder, ""
    classes: dict[str, None] = {}  # in order, each once
    for supported in list_supported_encoders().values():
        classes.update(dict.fromkeys(supported.classes))
    raise FileError(
        f"{files.path} is a {class_name}; int8run quantizes {', '.join(classes)}; "
        "leave it out: clip.components names the others"
    )


@contextmanager
def name_file_in_errors(where: str) -> Iterator[None]:
    """Put the file before the message of a FileError that does not name it."""
    try:
        yield
    except FileError as error:
        message = str(error)
        if where not in message:
            message = f"{where}: {message}"
        raise FileError(message) from error


def read_parts(weights: EncoderWeights, parts: Sequence[TensorPart]) -> Tensor:
    """Read the parts of one parameter, dequantized, one after the other.

    Raises:
        FileError: when one holds NaN or infinity.
    """
    tensors: list[Tensor] = []
    for part in parts:
        tensor = check_finite(weights.where, part.key, weights.read_tensor(part.key))
        tensors.append(part.extract(tensor))
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0].contiguous()


def check_finite(where: str, key: str, tensor: Tensor) -> Tensor:
    """Return a tensor after a check that it holds neither NaN nor infinity.

    Raises:
        FileError: naming the tensor.
    """
    if not tensor.is_floating_point():
        return tensor
    # torch has no isfinite for fp8
    numbers = tensor.float() if tensor.itemsize == 1 else tensor
    if not torch.isfinite(numbers).all():
        raise FileError(f"{where}: {key} holds NaN or infinity; the file is damaged")
    return tensor


def has_not_finite(qdata: Tensor) -> bool:
    """Return whether fp8 numbers have NaN or infinity among them."""
    without_sign = qdata.view(torch.uint8) & 0x7F
    return bool((without_sign >= NOT_FINITE_BYTES[qdata.dtype]).any())
