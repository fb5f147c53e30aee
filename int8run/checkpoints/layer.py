"""One weight of a checkpoint as the file holds it, and how its numbers are read.

`detect.py` finds out what each weight of a file is and makes a `CheckpointLayer` of it. Whoever loads weights
(`pipeline`, `text_encoders`, `export`) then reads it in one of three ways: as floats (`read_weight`), as int8
with a scale for each row (`read_int8_layer`), or packed as it is (`read_packed_weight`). Nothing here knows a
model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod

import torch
from torch import Tensor

from int8run.checkpoints import block_scaled, grouped, quip
from int8run.checkpoints.block_formats import BLOCK_FORMATS
from int8run.checkpoints.reader import TensorFiles, resolve_rows
from int8run.errors import FileError
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.layers.int8_linear import QuantizedLayer
from int8run.outlier.base import NONE, OutlierTransform
from int8run.quant.grouped_weight import GROUPED_BITS, GroupedWeight
from int8run.quant.packed_weight import PackedWeight
from int8run.quant.weight import QuantizedWeight

# storage dtypes besides those of block_formats.py
FLOAT, INT8, FP8, GGUF = "float", "int8", "fp8", "gguf"
MAX_EXACT_GROUP_SIZE = 1024  # the kernels rotate no larger groups


@dataclass(frozen=True, kw_only=True)
class CheckpointLayer:
    """One weight of a file, and how to read it.

    Args:
        name: the weight's key without `.weight`.
        storage_dtype: float, int8, fp8, mxfp8, nvfp4, w4a8, w6a8 or gguf, blocks that are read as float32.
        shape: of the tensor in the file. Weights of convolutions, and fp8 ones of norms, may have another
            number of dimensions than 2; their columns are the product of all but the first.
        rows: N of the weight; of a padded one (see `is_padded`) as far as the file says.
        columns: K of the weight, likewise.
        label: short description for messages and lists.
        granularity: which numbers share a scale, see `Granularity.name`; empty: no scale.
        block_size: columns that share a scale, of granularities with blocks.
        format_name: of `clip=`; empty: float, or stored in a way that has no name.
        part_keys: what for -> key, of the tensors beside the weight; not its bias.
        declared: whether the file says what N, and K, of a weight in mxfp8 or nvfp4 are, which may be padded.
        outlier_method: that the weight was transformed by, as far as the file says.
        outlier_settings: of the method.
        rotation_group_size: columns that were rotated together, of a convolution channels; 0: none.
        is_sylvester: whether by Sylvester's matrix, not by the regular one.
        is_centered: whether tokens are centered before the product.
        largest: magnitude in an fp8 weight without a scale, which shows that it is a plain cast; else None.
    """

    name: str
    storage_dtype: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    label: str
    granularity: str = ""
    block_size: int = 0
    format_name: str = ""
    part_keys: Mapping[str, str] = field(default_factory=dict)
    declared: tuple[bool, bool] = (True, True)
    outlier_method: str = NONE
    outlier_settings: Mapping[str, float] = field(default_factory=dict)
    rotation_group_size: int = 0
    is_sylvester: bool = False
    is_centered: bool = False
    largest: float | None = None

    @property
    def key(self) -> str:
        """The weight's key."""
        return f"{self.name}.weight"

    @property
    def sibling_keys(self) -> tuple[str, ...]:
        """All other keys of the file that belong to this weight; not its bias."""
        return tuple(self.part_keys.values())

    @property
    def is_grouped(self) -> bool:
        """Whether it is codes of 4 or 6 bits, which decode to INT8 with scales of rows."""
        return self.storage_dtype in GROUPED_BITS

    @property
    def is_usable_as_is(self) -> bool:
        """Whether it is INT8 with scales of rows that the kernels take, or decodes to it.

        Then nothing is rounded again.
        """
        has_row_scales = self.storage_dtype == INT8 and self.granularity in ("tensor", "row")
        return (has_row_scales or self.is_grouped) and not self._is_beyond_kernels

    @property
    def is_dequantized(self) -> bool:
        """Whether its floats have no dtype in the file: they are products with scales, or blocks."""
        return self.granularity != "" or self.storage_dtype == GGUF

    @property
    def is_packable(self) -> bool:
        """Whether `read_packed_weight` can take the numbers as they are, as small as in the file."""
        has_own_numbers = self.storage_dtype not in (FLOAT, GGUF)
        is_quantized_matrix = has_own_numbers and len(self.shape) == 2 and 0 not in self.shape
        return is_quantized_matrix and not self._is_beyond_kernels

    @property
    def _is_beyond_kernels(self) -> bool:
        """Whether no kernel can use the numbers, for their transform or for blocks that are cut off."""
        return self._has_cut_blocks or self._is_transformed_beyond_kernels

    @property
    def _has_cut_blocks(self) -> bool:
        """Whether blocks that share a scale do not divide the weight, so that the last ones are smaller."""
        if self.granularity not in ("group", "grid", "block3d"):
            return False
        is_rows_cut = self.granularity == "grid" and self.rows % self.block_size != 0
        return is_rows_cut or self.columns % self.block_size != 0

    @property
    def _is_transformed_beyond_kernels(self) -> bool:
        """Whether the weight was transformed in a way that no kernel can apply to the input of a layer."""
        return quip.is_transformed(self.part_keys) or self.rotation_group_size > MAX_EXACT_GROUP_SIZE

    @property
    def is_padded(self) -> bool:
        """Whether the weight may be smaller than rows and columns; only the model knows by how much."""
        return quip.HADAMARD_FLAG in self.part_keys or not all(self.declared)

    def fits_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether a model's layer of this shape can have the weight."""
        own = self.rows, self.columns
        if not self.is_padded or len(shape) != 2:
            return shape == own
        if quip.HADAMARD_FLAG in self.part_keys:
            return quip.is_padded_from((shape[0], shape[1]), own)
        multiple = BLOCK_FORMATS[self.storage_dtype].padding_multiple
        for size, own_size, is_declared in zip(shape, own, self.declared, strict=True):
            may_be_padded = not is_declared and block_scaled.is_padded_from((size,), (own_size,), multiple)
            if size != own_size and not may_be_padded:
                return False
        return True

    def read_transform(self, files: TensorFiles) -> OutlierTransform:
        """Read what was done to the weight, so that a layer can do its part to the input."""
        factor = None
        if "factor" in self.part_keys:
            factor = files.read(self.part_keys["factor"]).float()
        if "sigma" in self.part_keys:
            # columns were multiplied by sigma; our factor divides the weight
            factor = 1 / files.read(self.part_keys["sigma"]).float()
        rotation = None
        if self.rotation_group_size:
            matrix = get_hadamard(self.rotation_group_size, is_sylvester=self.is_sylvester)
            rotation = Rotation(matrix, self.is_sylvester)
        return OutlierTransform(
            self.outlier_method,
            self.outlier_settings,
            factor,
            rotation,
            centered=self.is_centered,
            taps=prod(self.shape[2:]),
        )

    def read_weight(
        self, files: TensorFiles, rows: slice | None = None, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """Read the weight as floats: scales applied, rotation and factors undone.

        Args:
            files: the checkpoint.
            rows: of the weight; None: all. Of a transposed or a QuIP weight everything is read for any row.
            shape: [N, K] of the model's layer, for padded weights; mxfp8 and nvfp4 have the file's without
                it.

        Returns:
            float32 [rows, K]; of a weight with another number of dimensions [rows, ...].

        Raises:
            FileError: a padded weight without `shape`, another shape than the file's, or a damaged file.
        """
        n, k = self.resolve_shape(files, shape)
        start, stop = resolve_rows(self.key, n, rows)
        if self.granularity == "transposed":
            scaled = files.read(self.key).float() * files.read(self.part_keys["scale"]).float()  # [K, N]
            weight = scaled.T[start:stop]
        elif quip.is_transformed(self.part_keys):
            scaled = self.read_scaled_rows(files, 0, self.rows)
            weight = quip.restore_weight(files, self.part_keys, scaled)[start:stop, :k]
        else:
            weight = self.read_scaled_rows(files, start, stop)[:, :k]
        if self.rotation_group_size or "factor" in self.part_keys or "sigma" in self.part_keys:
            weight = self.read_transform(files).restore_weight(weight)
        if len(self.shape) != 2:
            return weight.reshape(stop - start, *self.shape[1:])
        return weight

    def resolve_shape(self, files: TensorFiles, shape: tuple[int, int] | None) -> tuple[int, int]:
        """N and K without padding: the model's where it is known, else the file's.

        Raises:
            FileError: neither is known, or the model's cannot be this weight's.
        """
        if shape is None:
            if quip.HADAMARD_FLAG in self.part_keys:
                raise FileError(
                    f"{files.path}: {self.name} is padded to [{self.rows}, {self.columns}] and does not say "
                    "to what shape it is cut; the model that it is for must be known"
                )
            return self.rows, self.columns
        if not self.fits_shape(shape):
            raise FileError(
                f"{files.path}: {self.name} has the shape [{self.rows}, {self.columns}], the model's is "
                f"{list(shape)}; the file is for another model"
            )
        return shape

    def read_scaled_rows(self, files: TensorFiles, start: int, stop: int) -> Tensor:
        """Read stored numbers times scales. Returns float32 [stop - start, columns of the file]."""
        count = stop - start
        if self.storage_dtype in BLOCK_FORMATS:
            packed = block_scaled.read_packed_rows(
                files, self.key, self.format_name, self.part_keys, (start, stop)
            )
            return packed.dequantize() if count else torch.empty(packed.shape)
        if self.is_grouped:
            return self.read_grouped_weight(files, slice(start, stop)).dequantize()
        qdata = files.read(self.key, slice(start, stop)).float().reshape(count, prod(self.shape[1:]))
        if not self.granularity:
            return qdata
        scales = self.read_scales(files, start, stop)  # [rows, blocks of a row]
        if self.block_size:
            # of blocks that do not divide the columns the last one is smaller
            blocks = torch.arange(qdata.shape[1]) // self.block_size
            return qdata.mul_(scales[:, blocks])
        return qdata.mul_(scales)

    def read_scales(self, files: TensorFiles, start: int, stop: int) -> Tensor:
        """Read the scales of some rows. Returns float32 [stop - start, blocks of a row]."""
        key = self.part_keys["scale"]
        count = stop - start
        if self.granularity == "tensor":
            return files.read(key).float().reshape(1, 1).expand(count, 1)
        if self.granularity == "grid":
            return files.read(key).float()[torch.arange(start, stop) // self.block_size]
        return files.read(key, slice(start, stop)).float().reshape(count, prod(files[key].shape[1:]))

    def read_grouped_weight(self, files: TensorFiles, rows: slice) -> GroupedWeight:
        """Read codes and scales of some rows; only of a layer that `is_grouped`."""
        bits = GROUPED_BITS[self.storage_dtype]
        return grouped.read_grouped_weight(files, self.key, self.part_keys, bits, rows)

    def read_int8_layer(self, files: TensorFiles, rows: slice | None = None) -> QuantizedLayer:
        """Read the integers or codes, their scales and the transform, without a bias; only of an exact layer.

        Raises:
            ValueError: for another layer.
        """
        if not self.is_usable_as_is:
            raise ValueError(
                f"{files.path}: the numbers of {self.name} ({self.label}) cannot be used as they are; use "
                "`read_weight`"
            )
        start, stop = resolve_rows(self.key, self.rows, rows)
        if self.is_grouped:
            codes = self.read_grouped_weight(files, slice(start, stop))
            return QuantizedLayer(codes, self.read_transform(files), bias=None)
        weight = QuantizedWeight(
            qdata=files.read(self.key, slice(start, stop)).flatten(1),  # a kernel becomes rows of K
            scale=self.read_scales(files, start, stop).contiguous(),
        )
        return QuantizedLayer(weight, self.read_transform(files), bias=None)

    def read_packed_weight(
        self, files: TensorFiles, shape: tuple[int, int] | None = None
    ) -> tuple[PackedWeight | GroupedWeight, OutlierTransform]:
        """Read the stored numbers, their scales, and what was done to the weight; only of a packable layer.

        Args:
            files: the checkpoint.
            shape: [N, K] of the model's layer, for padded weights.

        Raises:
            ValueError: for another layer.
            FileError: another shape than the file's, or a damaged file.
        """
        if not self.is_packable:
            raise ValueError(
                f"{files.path}: the numbers of {self.name} ({self.label}) cannot stay as they are; use "
                "`read_weight`"
            )
        logical_shape = self.resolve_shape(files, shape)
        if self.storage_dtype in BLOCK_FORMATS:
            packed = block_scaled.read_packed_weight(
                files, self.key, self.format_name, self.part_keys, logical_shape
            )
            return packed, self.read_transform(files)
        if self.is_grouped:
            return self.read_grouped_weight(files, slice(0, self.rows)), self.read_transform(files)
        qdata = files.read(self.key)
        scale = files.read(self.part_keys["scale"]) if self.granularity else None
        if self.granularity == "transposed":
            assert scale is not None
            qdata, scale = qdata.T.contiguous(), scale.T.contiguous()
        return PackedWeight(qdata, scale, logical_shape), self.read_transform(files)


@cache
def get_hadamard(group_size: int, *, is_sylvester: bool) -> Tensor:
    """The Hadamard matrix of a group size, one for all layers. Returns float32 [group_size, group_size]."""
    return sylvester_hadamard(group_size) if is_sylvester else regular_hadamard(group_size)


def have_one_layout(files: TensorFiles, layers: Sequence[CheckpointLayer]) -> bool:
    """Whether the rows of layers can be one weight as they are: all int8, or all codes of one kind.

    Args:
        files: the checkpoint.
        layers: usable as they are.
    """
    first, *others = layers
    if not first.is_grouped:
        return not any(layer.is_grouped for layer in others)
    kind = list_code_traits(files, first)
    return all(list_code_traits(files, layer) == kind for layer in others)


def list_code_traits(files: TensorFiles, layer: CheckpointLayer) -> tuple[object, ...]:
    """What the rows of a weight have in common: bits, group size, dtypes and levels."""
    levels: list[float] = []
    if grouped.CODEBOOK in layer.part_keys:
        levels = files.read(layer.part_keys[grouped.CODEBOOK]).tolist()
    dtypes = [
        files[layer.part_keys[part]].dtype
        for part in (grouped.GROUP_SCALE, grouped.CORRECTION)
        if part in layer.part_keys
    ]
    return layer.storage_dtype, layer.block_size, dtypes, levels
