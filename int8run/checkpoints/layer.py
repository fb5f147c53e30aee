"""One quantized layer of a file: what it is, and how its numbers are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod

import torch
from torch import Tensor

from int8run.checkpoints import block_scaled, quip
from int8run.checkpoints.block_scaled import BLOCK_FORMATS, NVFP4
from int8run.checkpoints.reader import TensorFiles, resolve_rows
from int8run.errors import FileError
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.layers.int8_linear import QuantizedLayer
from int8run.outlier.base import NONE, OutlierTransform
from int8run.quant.packed_weight import PackedWeight
from int8run.quant.weight import QuantizedWeight

FLOAT, INT8, FP8 = "float", "int8", "fp8"


STORAGE_DTYPES = {
    "F64": FLOAT,
    "F32": FLOAT,
    "F16": FLOAT,
    "BF16": FLOAT,
    "I8": INT8,
    "F8_E4M3": FP8,
    "F8_E5M2": FP8,
    "U8": NVFP4,
}


MAX_EXACT_GROUP_SIZE = 1024  # the kernels rotate no larger ones


@dataclass(frozen=True)
class CheckpointLayer:
    """One weight of a file, and how to read it.

    Args:
        name: the weight's key without `.weight`.
        kind: float, int8, fp8, mxfp8 or nvfp4.
        granularity: which numbers share a scale: tensor, row, group (of a row), grid (square blocks), block3d (groups with a scale of
            3 dimensions), transposed (rows of a weight that is stored as [K, N]) or block (of mxfp8 and nvfp4); empty: no scale.
        rows, columns: N and K of the weight; of a padded one (see `padded`) as far as the file tells.
        label: for people.
        method, settings: the outlier method that the numbers were made by, as far as the file tells.
        side_keys: all other keys of the file that belong to this weight; not its bias.
        shape: of the weight in the file. fp8 weights of convolutions and norms have another number of dimensions than 2; their
            columns are the product of all but the first.
        block: numbers that share a scale, of granularities with blocks.
        keys: what for -> key, of the tensors beside the weight.
        group, sylvester: of the rotation; group 0: none.
        format: the word for how it is stored; empty: float, or stored in a way that has no word.
        told: whether the file tells N, and K, of a weight in mxfp8 or nvfp4, which may be padded.
    """

    name: str
    storage_dtype: str
    granularity: str
    rows: int
    columns: int
    label: str
    shape: tuple[int, ...]
    outlier_method: str = NONE
    outlier_settings: Mapping[str, float] = field(default_factory=dict)
    block_size: int = 0
    part_keys: Mapping[str, str] = field(default_factory=dict)
    rotation_group_size: int = 0
    is_sylvester: bool = False
    is_centered: bool = False
    sibling_keys: tuple[str, ...] = ()
    format_name: str = ""
    declared: tuple[bool, bool] = (True, True)

    @property
    def key(self) -> str:
        """The weight's key."""
        return f"{self.name}.weight"

    @property
    def is_exact(self) -> bool:
        """Whether the integers can be taken as they are, so that nothing is rounded again."""
        return (
            self.storage_dtype == INT8
            and self.granularity in ("tensor", "row")
            and not quip.is_transformed(self.part_keys)
            and self.rotation_group_size <= MAX_EXACT_GROUP_SIZE
        )

    @property
    def is_packable(self) -> bool:
        """Whether the stored numbers can stay as they are, so that the layer is as small in memory as in the file."""
        transformed = quip.is_transformed(self.part_keys) or self.rotation_group_size > MAX_EXACT_GROUP_SIZE
        return (
            self.storage_dtype != FLOAT and len(self.shape) == 2 and not transformed and 0 not in self.shape
        )

    @property
    def is_padded(self) -> bool:
        """Whether the weight may be smaller than rows and columns, which only the model's shape tells."""
        return quip.HADAMARD_FLAG in self.part_keys or not all(self.declared)

    def fits_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether a model's layer of this shape can have the weight."""
        own = self.rows, self.columns
        if not self.is_padded or len(shape) != 2:
            return shape == own
        if quip.HADAMARD_FLAG in self.part_keys:
            return quip.is_padded_from((shape[0], shape[1]), own)
        sizes = zip(shape, own, self.declared, strict=True)
        return all(
            n == size
            or (
                not told
                and block_scaled.is_padded_from(
                    (n,), (size,), BLOCK_FORMATS[self.storage_dtype].padding_multiple
                )
            )
            for n, size, told in sizes
        )

    def read_transform(self, files: TensorFiles) -> OutlierTransform:
        """What was done to the weight, for an INT8 layer that takes the integers as they are."""
        factor = None
        if "factor" in self.part_keys:
            factor = files.read(self.part_keys["factor"]).float()
        if "sigma" in self.part_keys:
            factor = (
                1 / files.read(self.part_keys["sigma"]).float()
            )  # columns were multiplied by sigma; the factor divides the weight
        rotation = (
            Rotation(get_hadamard(self.rotation_group_size, self.is_sylvester), self.is_sylvester)
            if self.rotation_group_size
            else None
        )
        return OutlierTransform(
            self.outlier_method, self.outlier_settings, factor, rotation, self.is_centered
        )

    def read_weight(
        self, files: TensorFiles, rows: slice | None = None, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """The real weight: scales applied, rotation and factors undone.

        Args:
            rows: of the weight; None: all. Of a transposed or a QuIP weight everything is read for any row.
            shape: [N, K] of the model's layer, for padded weights; of mxfp8 and nvfp4 the file's is taken without it.

        Returns:
            float32 [rows, K]; of a weight with another number of dimensions [rows, ...].

        Raises:
            FileError: a padded weight without `shape`, another shape than the file's, or a damaged file.
        """
        n, k = self.resolve_shape(files, shape)
        start, stop = resolve_rows(self.key, n, rows)
        if self.granularity == "transposed":
            read = (files.read(self.key).float() * files.read(self.part_keys["scale"]).float()).T[start:stop]
        elif quip.is_transformed(self.part_keys):
            read = quip.restore_weight(files, self.part_keys, self.read_scaled_rows(files, 0, self.rows))[
                start:stop, :k
            ]
        else:
            read = self.read_scaled_rows(files, start, stop)[:, :k]
        if self.rotation_group_size or "factor" in self.part_keys or "sigma" in self.part_keys:
            read = self.read_transform(files).restore_weight(read)
        return read.reshape(stop - start, *self.shape[1:]) if len(self.shape) != 2 else read

    def resolve_shape(self, files: TensorFiles, shape: tuple[int, int] | None) -> tuple[int, int]:
        """N and K without padding, given the model's if it is known.

        Raises:
            FileError: nobody knows them, or the model's cannot be this weight's.
        """
        if shape is None and quip.HADAMARD_FLAG in self.part_keys:
            raise FileError(
                f"{files.path}: {self.name} is padded to [{self.rows}, {self.columns}] and does not say to what shape it is cut; "
                "the model that it is for must be known"
            )
        n, k = shape or (self.rows, self.columns)
        if shape is not None and not self.fits_shape(shape):
            raise FileError(
                f"{files.path}: {self.name} has the shape [{self.rows}, {self.columns}], the model's [{n}, {k}]; it is for another"
            )
        return n, k

    def read_scaled_rows(self, files: TensorFiles, start: int, stop: int) -> Tensor:
        """Stored numbers times scales. Returns float32 [stop - start, columns of the file]."""
        count = stop - start
        if self.storage_dtype in BLOCK_FORMATS:
            rows = block_scaled.read_packed_rows(
                files, self.key, self.format_name, self.part_keys, start, stop
            )
            return rows.dequantize() if count else torch.empty(rows.shape)
        codes = files.read(self.key, slice(start, stop)).float().reshape(count, prod(self.shape[1:]))
        if "scale" not in self.part_keys:
            return codes
        scale = self.read_scales(files, start, stop)  # [rows, blocks of a row]
        groups = codes.view(count, scale.shape[1], codes.shape[1] // scale.shape[1])
        return groups.mul_(scale[..., None]).view(codes.shape)

    def read_scales(self, files: TensorFiles, start: int, stop: int) -> Tensor:
        """The scales of some rows. Returns float32 [rows, blocks of a row]."""
        key = self.part_keys["scale"]
        if self.granularity == "tensor":
            return files.read(key).float().reshape(1, 1).expand(stop - start, 1)
        if self.granularity == "grid":
            return files.read(key).float()[torch.arange(start, stop) // self.block_size]
        return files.read(key, slice(start, stop)).float().reshape(stop - start, prod(files[key].shape[1:]))

    def read_int8_layer(self, files: TensorFiles, rows: slice | None = None) -> QuantizedLayer:
        """The integers, one scale a row and the transform, without a bias; only of an exact layer.

        Raises:
            ValueError: for another.
        """
        if not self.is_exact:
            raise ValueError(
                f"{files.path}: the numbers of {self.name} ({self.label}) cannot be taken as they are; read `weight`"
            )
        start, stop = resolve_rows(self.key, self.rows, rows)
        weight = QuantizedWeight(
            files.read(self.key, slice(start, stop)), self.read_scales(files, start, stop).contiguous()
        )
        return QuantizedLayer(weight, self.read_transform(files), None)

    def read_packed_weight(
        self, files: TensorFiles, shape: tuple[int, int] | None = None
    ) -> tuple[PackedWeight, OutlierTransform]:
        """The stored numbers with their scales, and what was done to the weight before; only of a codable layer.

        Args:
            shape: [N, K] of the model's layer, for padded weights.

        Raises:
            ValueError: for another.
            FileError: another shape than the file's, or a damaged file.
        """
        if not self.is_packable:
            raise ValueError(
                f"{files.path}: the numbers of {self.name} ({self.label}) cannot stay as they are; read `weight`"
            )
        real = self.resolve_shape(files, shape)
        if self.storage_dtype in BLOCK_FORMATS:
            return block_scaled.read_packed_weight(
                files, self.key, self.format_name, self.part_keys, real
            ), self.read_transform(files)
        codes = files.read(self.key)
        scale = files.read(self.part_keys["scale"]) if "scale" in self.part_keys else None
        if self.granularity == "transposed":
            assert scale is not None
            codes, scale = codes.T.contiguous(), scale.T.contiguous()
        return PackedWeight(codes, scale, real), self.read_transform(files)


@cache
def get_hadamard(group: int, sylvester: bool) -> Tensor:
    """One matrix for all layers with groups of this size."""
    return sylvester_hadamard(group) if sylvester else regular_hadamard(group)
