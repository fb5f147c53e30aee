"""The layers of a checkpoint as they lie in the file: float, fp8 or INT8 of any maker, told from names, shapes and markers.

Everything that decides what the numbers mean is checked before any weight is read. What is found is named or refused; nothing is
guessed, padded or cut. Where a maker's label and the shape of the scale disagree the shape counts, because labels are often wrong.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod

import torch
from torch import Tensor

from int8run.checkpoints import quip
from int8run.checkpoints.foreign import READERS, refuse_foreign, refused
from int8run.checkpoints.header import DTYPES
from int8run.checkpoints.markers import OURS, Marker, is_power_of_4, read_markers
from int8run.checkpoints.scales import SCALES, check_numbers, granularity_of
from int8run.checkpoints.tensors import TensorFiles, TensorInfo, row_range
from int8run.errors import FileError
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.layers.linear import QuantizedLayer
from int8run.outlier.base import NONE, OutlierTransform
from int8run.quant.weight import QuantizedWeight

log = logging.getLogger(__name__)
FLOAT, INT8, FP8 = "float", "int8", "fp8"
KINDS = {
    "F64": FLOAT, "F32": FLOAT, "F16": FLOAT, "BF16": FLOAT, "I8": INT8, "F8_E4M3": FP8, "F8_E5M2": FP8,
}  # fmt: skip
# what a tensor beside `L.weight` is for -> its names, `L.` in front
PARTS = {
    "scale": ("weight_scale", "scale_weight", "weight_scale_inv", "scale", "weight.scale", "weight.weight_scale"),
    "input": ("input_scale", "scale_input", "act_scale", "input.scale", "input.input_scale"),
    "marker": ("comfy_quant",),
    "factor": ("pre_quant_scale",),
    "matrix": ("quarot_hadamard",), "sigma": ("hadanorm_sigma",), "copy": ("weight_packed",),  # INT8-Toolkit
    **{name: (name,) for name in quip.PARTS},
}  # fmt: skip
# other tensors are called so as well, for example the weights of norms
COMMON = ("scale", "weight.scale", "input.scale")
# kind of weight -> the parts that it may have
ALLOWED = {
    FLOAT: {"scale", "input"},  # a scale of 1, which ComfyUI's own conversion leaves
    FP8: {"scale", "input", "marker", "factor"},
    INT8: set(PARTS),
}
# format of a marker -> kind of weight, and the granularities that its name promises
FORMATS = {
    "int8_tensorwise": (INT8, ("tensor", "row")),
    "int8_axiswise": (INT8, ("row",)),
    "int8_blockwise": (INT8, ("grid", "block3d", "group")),
    OURS: (INT8, ("row",)),
    "float8_e4m3fn": (FP8, ("tensor", "block3d")),
    "float8_e5m2": (FP8, ("tensor",)),
    "float8_e4m3fn_rowwise": (FP8, ("row",)),
    "float8_e4m3fn_blockwise": (FP8, ("grid",)),
    "float8_e4m3fn_block3d": (FP8, ("block3d",)),
}
WHOLE_FILE = "scaled_fp8"  # a tensor that says: the fp8 weights below its prefix have scales. lightx2v writes it into int8 files too
LARGEST_EXACT_GROUP = 1024  # the kernels rotate no larger ones


@dataclass(frozen=True)
class StoredLayer:
    """One weight of a file, and how to read it.

    Args:
        name: the weight's key without `.weight`.
        kind: float, int8 or fp8.
        granularity: which numbers share a scale: tensor, row, group (of a row), grid (square blocks), block3d (groups with a scale of
            3 dimensions) or transposed (rows of a weight that is stored as [K, N]); empty: no scale.
        rows, columns: N and K of the weight; of a padded one (see `padded`) those of the file.
        label: for people.
        method, settings: the outlier method that the numbers were made by, as far as the file tells.
        side_keys: all other keys of the file that belong to this weight; not its bias.
        shape: of the weight in the file. fp8 weights of convolutions and norms have another number of dimensions than 2; their
            columns are the product of all but the first.
        block: numbers that share a scale, of granularities with blocks.
        keys: what for -> key, of the tensors beside the weight.
        group, sylvester: of the rotation; group 0: none.
    """

    name: str
    kind: str
    granularity: str
    rows: int
    columns: int
    label: str
    shape: tuple[int, ...]
    method: str = NONE
    settings: Mapping[str, float] = field(default_factory=dict)
    block: int = 0
    keys: Mapping[str, str] = field(default_factory=dict)
    group: int = 0
    sylvester: bool = False
    centered: bool = False
    side_keys: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The weight's key."""
        return f"{self.name}.weight"

    @property
    def exact(self) -> bool:
        """Whether the integers can be taken as they are, so that nothing is rounded again."""
        return (
            self.kind == INT8
            and self.granularity in ("tensor", "row")
            and not quip.is_transformed(self.keys)
            and self.group <= LARGEST_EXACT_GROUP
        )

    @property
    def padded(self) -> bool:
        """Whether the file's shape is larger than the weight's, so that reading needs the model's shape (QuIP by Hadamard matrices)."""
        return quip.HADAMARD in self.keys

    def transform(self, files: TensorFiles) -> OutlierTransform:
        """What was done to the weight, for an INT8 layer that takes the integers as they are."""
        factor = None
        if "factor" in self.keys:
            factor = files.read(self.keys["factor"]).float()
        if "sigma" in self.keys:
            factor = 1 / files.read(self.keys["sigma"]).float()  # columns were multiplied by sigma; the factor divides the weight
        rotation = Rotation(hadamard(self.group, self.sylvester), self.sylvester) if self.group else None
        return OutlierTransform(self.method, self.settings, factor, rotation, self.centered)

    def weight(self, files: TensorFiles, rows: slice | None = None, shape: tuple[int, int] | None = None) -> Tensor:
        """The real weight: scales applied, rotation and factors undone.

        Args:
            rows: of the weight; None: all. Of a transposed or a QuIP weight everything is read for any row.
            shape: [N, K] of the model's layer, for padded weights.

        Returns:
            float32 [rows, K]; of a weight with another number of dimensions [rows, ...].

        Raises:
            FileError: a padded weight without `shape`, another shape than the file's, or a damaged file.
        """
        if shape is None and self.padded:
            raise FileError(
                f"{files.path}: {self.name} is padded to [{self.rows}, {self.columns}] and does not say to what shape it is cut; "
                "the model that it is for must be known"
            )
        n, k = shape or (self.rows, self.columns)
        if (n, k) != (self.rows, self.columns) and not (self.padded and quip.fits((n, k), (self.rows, self.columns))):
            raise FileError(
                f"{files.path}: {self.name} has the shape [{self.rows}, {self.columns}], the model's [{n}, {k}]; it is for another"
            )
        start, stop = row_range(self.key, n, rows)
        if self.granularity == "transposed":
            read = (files.read(self.key).float() * files.read(self.keys["scale"]).float()).T[start:stop]
        elif quip.is_transformed(self.keys):
            read = quip.restore(files, self.keys, self.scaled(files, 0, self.rows))[start:stop, :k]
        else:
            read = self.scaled(files, start, stop)
        if self.group or "factor" in self.keys or "sigma" in self.keys:
            read = self.transform(files).restore_weight(read)
        return read.reshape(stop - start, *self.shape[1:]) if len(self.shape) != 2 else read

    def scaled(self, files: TensorFiles, start: int, stop: int) -> Tensor:
        """Stored numbers times scales. Returns float32 [stop - start, columns of the file]."""
        count = stop - start
        codes = files.read(self.key, slice(start, stop)).float().reshape(count, prod(self.shape[1:]))
        if "scale" not in self.keys:
            return codes
        scale = self.scales(files, start, stop)  # [rows, blocks of a row]
        blocks = codes.view(count, scale.shape[1], codes.shape[1] // scale.shape[1])
        return blocks.mul_(scale[..., None]).view(codes.shape)

    def scales(self, files: TensorFiles, start: int, stop: int) -> Tensor:
        """The scales of some rows. Returns float32 [rows, blocks of a row]."""
        key = self.keys["scale"]
        if self.granularity == "tensor":
            return files.read(key).float().reshape(1, 1).expand(stop - start, 1)
        if self.granularity == "grid":
            return files.read(key).float()[torch.arange(start, stop) // self.block]
        return files.read(key, slice(start, stop)).float().reshape(stop - start, prod(files[key].shape[1:]))

    def int8(self, files: TensorFiles, rows: slice | None = None) -> QuantizedLayer:
        """The integers, one scale a row and the transform, without a bias; only of an exact layer.

        Raises:
            ValueError: for another.
        """
        if not self.exact:
            raise ValueError(f"{files.path}: the numbers of {self.name} ({self.label}) cannot be taken as they are; read `weight`")
        start, stop = row_range(self.key, self.rows, rows)
        weight = QuantizedWeight(files.read(self.key, slice(start, stop)), self.scales(files, start, stop).contiguous())
        return QuantizedLayer(weight, self.transform(files), None)


@cache
def hadamard(group: int, sylvester: bool) -> Tensor:
    """One matrix for all layers with groups of this size."""
    return sylvester_hadamard(group) if sylvester else regular_hadamard(group)


def stored_layers(files: TensorFiles, prefix: str = "") -> dict[str, StoredLayer]:
    """Every weight below a prefix: all with 2 dimensions, and fp8 ones with any. By name, in the file's order.

    Only headers, markers and scales are read. What lies outside of the prefix (a full checkpoint's text encoders and VAE) is not looked at.

    Raises:
        FileError: a weight that cannot be read, with its name and the reason; scales and markers without a weight.
    """
    refuse_foreign(files, prefix)
    markers = read_markers(files, prefix)
    refuse_orphans(files, prefix)
    names = [key.removesuffix(".weight") for key in files if key.startswith(prefix) and key.endswith(".weight")]
    found = {name: classify(files, name, markers.get(name)) for name in names}
    layers = {name: layer for name, layer in found.items() if layer is not None}
    refuse_mixtures(files, prefix, layers, markers)
    tell_wrong_labels(files, layers, markers)
    return layers


def refuse_orphans(files: TensorFiles, prefix: str) -> None:
    """Raise FileError for a scale, a marker or the like whose weight is not there, and for int8 numbers that are no weight."""
    suffixes = {name for part in PARTS.values() for name in part if name not in COMMON and "." not in name}
    for key in files:
        layer, _, suffix = key.rpartition(".")
        if not key.startswith(prefix):
            continue
        if suffix in suffixes and f"{layer}.weight" not in files and not (layer.endswith(".weight") and layer in files):
            raise FileError(f"{files[key].file}: {key} belongs to no weight, {layer}.weight is missing; the file is incomplete")
        if files[key].dtype == "I8" and suffix not in ("weight", "weight_packed", quip.HADAMARD):
            raise FileError(f"{files[key].file}: {key} is I8 and no layer's weight; int8run reads int8 weights of layers")


def classify(files: TensorFiles, name: str, marker: Marker | None) -> StoredLayer | None:
    """One weight; None for a float one that is no matrix."""
    info = files[f"{name}.weight"]
    kind = KINDS.get(info.dtype)
    if marker is not None and marker.format in READERS:
        raise refused(files, marker.format, f"{name} says so")
    if kind is None:
        raise FileError(f"{info.file}: {info.key} is {info.dtype}; int8run reads weights of {', '.join(KINDS)}")
    keys = parts_of(files, name, kind)
    strangers = [key for part, key in keys.items() if part not in ALLOWED[kind]]
    if strangers or (kind == FLOAT and marker is not None):
        what = strangers[0] if strangers else f"an entry in the header ({marker.format if marker else ''})"
        raise FileError(f"{info.file}: {info.key} is {info.dtype} and has {what}, which such a weight cannot have; the file is damaged")
    if kind == FLOAT:
        return float_layer(files, info, name, keys)
    if marker is not None:
        check_format(info, name, kind, marker)
    return int8_layer(files, info, name, keys, marker) if kind == INT8 else fp8_layer(files, info, name, keys, marker)


def parts_of(files: TensorFiles, name: str, kind: str) -> dict[str, str]:
    """The tensors beside a weight, by what they are for.

    Raises:
        FileError: two for the same.
    """
    found: dict[str, str] = {}
    for part, suffixes in PARTS.items():
        keys = [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in files and not (kind == FLOAT and suffix in COMMON)]
        if len(keys) > 1 and part == "scale":
            raise FileError(f"{files.path}: {name} has two scales, {keys[0]} and {keys[1]}; nobody knows which is true")
        if keys:
            found[part] = keys[0]
    return found


def check_format(info: TensorInfo, name: str, kind: str, marker: Marker) -> None:
    """Refuse a marker that is unknown or is of another kind of weight."""
    if marker.format not in FORMATS and not (marker.format == "" and kind == INT8):
        raise FileError(f"{marker.where} names the format {marker.format!r}; int8run reads {', '.join(FORMATS)}")
    if marker.format and FORMATS[marker.format][0] != kind:
        raise FileError(
            f"{marker.where} names the format {marker.format!r}, and {info.key} is {info.dtype}; they contradict each other, nobody knows "
            "what the scale is for"
        )
    if marker.fields.get("num_experts") is not None:
        raise FileError(f"{marker.where} describes a bank of experts; int8run reads layers with a matrix each")


def float_layer(files: TensorFiles, info: TensorInfo, name: str, keys: Mapping[str, str]) -> StoredLayer | None:
    """A weight that is not quantized."""
    if "scale" in keys:
        check_numbers(files, keys["scale"])
        if bool((files.read(keys["scale"]).float() != 1).any()):
            raise FileError(
                f"{info.file}: {info.key} is {info.dtype} and has {keys['scale']}, which is not 1; nobody knows whether it was applied"
            )
    if len(info.shape) != 2:
        return None
    rows, columns = info.shape
    return StoredLayer(name, FLOAT, "", rows, columns, DTYPES[info.dtype][1], info.shape, side_keys=tuple(keys.values()))


def fp8_layer(files: TensorFiles, info: TensorInfo, name: str, keys: dict[str, str], marker: Marker | None) -> StoredLayer | None:
    """An fp8 weight: a plain cast without a scale, else stored times scale. The label e4m3 or e5m2 is the tensor's dtype."""
    if marker is not None and marker.group():
        raise FileError(f"{marker.where} says that an fp8 weight is rotated; int8run knows no such format")
    if not info.shape:
        return None
    rows, columns = info.shape[0], prod(info.shape[1:])
    granularity, block = "", 0
    if "scale" in keys:
        granularity, block = granularity_of(files, info, keys["scale"], marker)
    if "factor" in keys:
        check_numbers(files, keys["factor"], (columns,))
    word = DTYPES[info.dtype][1]
    label = f"{word} scaled, {granularity}{f' {block}' if block else ''}" if granularity else f"{word} cast"
    return StoredLayer(
        name, FP8, granularity, rows, columns, label, info.shape, block=block, keys=keys, side_keys=tuple(keys.values()),
    )  # fmt: skip


def int8_layer(files: TensorFiles, info: TensorInfo, name: str, keys: dict[str, str], marker: Marker | None) -> StoredLayer:
    """An INT8 weight."""
    if len(info.shape) != 2 or 0 in info.shape:
        raise FileError(f"{info.file}: {info.key} is I8 {list(info.shape)}; int8run reads int8 weights [N, K]")
    if "scale" not in keys:
        raise FileError(
            f"{info.file}: {name} is INT8 and has no weight_scale, so its numbers mean nothing; the file is incomplete, download it again"
        )
    granularity, block = granularity_of(files, info, keys["scale"], marker)
    rows, columns = info.shape if granularity != "transposed" else info.shape[::-1]
    told = rotation_of(files, info, name, keys, marker)
    method, group, sylvester, centered = told
    if group and columns % group:
        raise FileError(
            f"{info.file}: {name} is rotated in groups of {group}, which do not divide its {columns} inputs; the file is damaged"
        )
    if quip.is_transformed(keys):
        if group or {"factor", "sigma"} & set(keys) or granularity == "transposed":
            raise FileError(f"{info.file}: {name} is transformed by QuIP and in another way too; int8run knows no such format")
        quip.check(files, keys, info)
        method = "quip"
    for part in ("factor", "sigma"):
        if part in keys:
            check_numbers(files, keys[part], (columns,))
    settings: Mapping[str, float] = {"group_size": group} if group else {}
    if marker is not None and marker.format == OURS:
        settings = marker.fields["settings"]
    words = [marker.format if marker and marker.format else "int8", f"{granularity}{f' {block}' if block else ''}"]
    words += [] if method == NONE else [f"{method}{f' {group}' if group else ''}"]
    return StoredLayer(
        name, INT8, granularity, rows, columns, ", ".join(words), info.shape, method, settings, block, keys, group, sylvester, centered,
        tuple(keys.values()),
    )  # fmt: skip


def rotation_of(
    files: TensorFiles, info: TensorInfo, name: str, keys: Mapping[str, str], marker: Marker | None
) -> tuple[str, int, bool, bool]:
    """Method, size of the rotated groups, whether by Sylvester's matrix, and whether tokens are centered."""
    group, sylvester = (0, False) if marker is None else (marker.group(), marker.sylvester())
    if marker is not None and marker.format == OURS:
        if marker.fields["factor"] != ("factor" in keys) or {"matrix", "sigma"} & set(keys):
            raise FileError(f"{marker.where} and the tensors of {name} contradict each other in their factors; the file is damaged")
        return marker.fields["outlier"], group, sylvester, marker.fields["centered"]
    if not {"matrix", "sigma"} & set(keys):
        plain = "smoothquant" if "factor" in keys else NONE
        return ("quarot" if sylvester else "convrot") if group else plain, group, sylvester, False
    # INT8-Toolkit: the matrix itself lies beside the weight
    if group or "factor" in keys:
        raise FileError(f"{info.file}: {name} is rotated by its marker and by the INT8-Toolkit's tensors; they contradict each other")
    if "matrix" in keys:
        group, sylvester = told_by_matrix(files, keys["matrix"])
    return "hadanorm" if "sigma" in keys else "quarot" if sylvester else "convrot", group, sylvester, "sigma" in keys


def told_by_matrix(files: TensorFiles, key: str) -> tuple[int, bool]:
    """Size and kind of a Hadamard matrix that a file holds."""
    info = files[key]
    size = info.shape[0] if len(info.shape) == 2 and info.shape[0] == info.shape[1] else 0
    if 2 <= size <= LARGEST_EXACT_GROUP and not size & (size - 1) and info.dtype in SCALES:
        matrix = files.read(key).float()
        for sylvester in (True, False):
            possible = sylvester or is_power_of_4(size)
            if possible and torch.allclose(matrix, hadamard(size, sylvester), atol=0.01 / size**0.5):  # half precision is good enough
                return size, sylvester
    raise FileError(f"{info.file}: {key} {info.dtype} {list(info.shape)} is no Hadamard matrix by Sylvester or a regular one")


def refuse_mixtures(files: TensorFiles, prefix: str, layers: Mapping[str, StoredLayer], markers: Mapping[str, Marker]) -> None:
    """Raise FileError for layers that make no sense beside the others."""
    int8 = [layer for layer in layers.values() if layer.kind == INT8]
    silent = [x for x in int8 if x.name not in markers and not quip.is_transformed(x.keys) and not {"matrix", "sigma"} & set(x.keys)]
    if silent and any(layer.name in markers for layer in int8):
        raise FileError(
            f"{files.path}: {silent[0].name} has no comfy_quant marker and other INT8 layers have one, so nobody knows whether it is "
            "rotated; the file is damaged"
        )
    marks = [key for key in files if key.startswith(prefix) and is_file_marker(key)]
    for mark in marks:
        below = [x for x in layers.values() if x.kind == FP8 and x.name.startswith(mark.removesuffix(WHOLE_FILE))]
        if below and not any("scale" in layer.keys for layer in below):
            raise FileError(f"{files.path}: {mark} says that fp8 weights have scales, and none has one ({below[0].name}); they were lost")


def is_file_marker(key: str) -> bool:
    """Whether a key marks a whole fp8 file; it belongs to no layer and must not stand beside int8 weights that are written."""
    return key == WHOLE_FILE or key.endswith(f".{WHOLE_FILE}")


def tell_wrong_labels(files: TensorFiles, layers: Mapping[str, StoredLayer], markers: Mapping[str, Marker]) -> None:
    """One warning for each kind of label that the shape of the scale contradicts."""
    wrong: Counter[tuple[str, str]] = Counter()
    for name, layer in layers.items():
        marker = markers.get(name)
        if marker is None or not layer.granularity:
            continue
        promised = FORMATS[marker.format][1] if marker.format else ("tensor", "row")
        per_row = marker.fields.get("per_row")
        if layer.granularity not in promised:
            wrong[marker.format or "int8", layer.granularity] += 1
        elif per_row is not None and per_row != (layer.granularity == "row"):
            wrong[f"per_row={per_row}", layer.granularity] += 1
    for (label, shape), count in wrong.items():
        log.warning("%s: %d layers are labelled %s and have scales by %s; the shape of the scales counts", files.path, count, label, shape)
