"""A weight in few bits as checkpoints have it (int8, fp8, mxfp8 or nvfp4), with what is needed to read it.

`checkpoints/layer.py` reads such weights out of files and `formats.py` makes them; `layers/weight_only.py`
computes with them. The arithmetic of each format stands in `kernels/dequantize`.
"""

from dataclasses import dataclass, replace
from math import ceil
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from int8run.kernels.dequantize import reference
from int8run.kernels.dequantize.reference import (
    FP8,
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    compute_swizzled_offsets,
    infer_block_shape,
)


@dataclass(frozen=True)
class PackedWeight:
    """Stored numbers and scales of one weight [N, K].

    Args:
        qdata: int8 or fp8 [N, K]; nvfp4 uint8 [N, K / 2], two numbers in a byte. N and K may be padded.
        scale: of int8 and fp8 any float in a shape that `infer_block_shape` knows, of fp8 also None: a plain
            cast; of mxfp8 e8m0, as bytes or as float8_e8m0fnu; of nvfp4 float8_e4m3fn or its bytes.
        shape: N and K of the weight, to which padding is cut.
        global_scale: of nvfp4, one number.
        block_size: columns that share a scale, where N or K is not a multiple of it; 0: the shapes show it.
        is_swizzled: mxfp8 and nvfp4: whether the scales lie in cuBLAS's tiles.
        high_nibble_first: nvfp4: whether even columns are in the high half of a byte.
    """

    qdata: Tensor
    scale: Tensor | None
    shape: tuple[int, int]
    global_scale: Tensor | None = None
    block_size: int = 0
    is_swizzled: bool = True
    high_nibble_first: bool = True

    @property
    def storage_dtype(self) -> str:
        """int8, fp8, mxfp8 or nvfp4."""
        if self.qdata.dtype == torch.int8:
            return "int8"
        if self.qdata.dtype == torch.uint8:
            return "nvfp4"
        # mxfp8 and fp8 differ by their scales alone
        if self.scale is not None and self.scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
            return "mxfp8"
        return "fp8"

    @property
    def has_block_scales(self) -> bool:
        """Whether blocks of a row share a scale of few bits, as in mxfp8 and nvfp4."""
        return self.storage_dtype in ("mxfp8", "nvfp4")

    @property
    def nbytes(self) -> int:
        """Memory of stored numbers and scales."""
        return sum(tensor.nbytes for tensor in self._get_tensors().values())

    def _get_tensors(self) -> dict[str, Tensor]:
        tensors = {"qdata": self.qdata, "scale": self.scale, "global_scale": self.global_scale}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def to(self, device: torch.device) -> "PackedWeight":
        """The same on a device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._get_tensors().items()}
        return replace(self, **moved)

    def dequantize(self, dtype: torch.dtype = torch.float32, operators: ModuleType = reference) -> Tensor:
        """The weight's numbers.

        Args:
            dtype: of the result.
            operators: the module of `kernels/dequantize` that computes them: `reference`, `eager` or `kernel`
                (Triton).

        Returns:
            dtype [N, K].
        """
        return self.dequantize_padded(dtype, operators)[: self.shape[0], : self.shape[1]]

    def dequantize_padded(self, dtype: torch.dtype, operators: Any) -> Tensor:
        """The same with the file's padding."""
        if self.scale is None:
            return self.qdata.to(dtype)
        block = self.block_size or None
        weight: Tensor
        if self.storage_dtype == "int8":
            weight = operators.dequantize_int8(self.qdata, self.scale, block, dtype)
        elif self.storage_dtype == "fp8":
            weight = operators.dequantize_fp8(self.qdata, self.scale, block, dtype)
        elif self.storage_dtype == "mxfp8":
            weight = operators.dequantize_mxfp8(
                self.qdata, self.scale, swizzled=self.is_swizzled, dtype=dtype
            )
        else:
            assert self.global_scale is not None, "nvfp4 has a scale for the whole weight"
            weight = operators.dequantize_nvfp4(
                self.qdata,
                self.scale,
                self.global_scale,
                swizzled=self.is_swizzled,
                high_first=self.high_nibble_first,
                dtype=dtype,
            )
        return weight

    def unswizzle_scales(self) -> "PackedWeight":
        """The same with block scales that lie in rows, so that `select_rows` can pick some."""
        if not self.has_block_scales or not self.is_swizzled:
            return self
        assert self.scale is not None
        rows, stored_columns = self.qdata.shape
        # of nvfp4 a byte of qdata is two columns
        block_columns = MXFP8_BLOCK if self.storage_dtype == "mxfp8" else NVFP4_BLOCK // 2
        offsets = compute_swizzled_offsets(rows, stored_columns // block_columns).to(self.scale.device)
        # by bytes: not every torch can index 8-bit floats
        scale = self.scale.view(torch.uint8).flatten()[offsets].view(self.scale.dtype)
        return replace(self, scale=scale, is_swizzled=False)

    def select_rows(self, index: Tensor) -> "PackedWeight":
        """Some rows in any order, for look-ups.

        Args:
            index: int64 [R].

        Returns:
            A weight [R, K]. Block scales must lie in rows, see `unswizzle_scales`.
        """
        assert not (self.has_block_scales and self.is_swizzled), "unswizzle_scales() first"
        # by bytes, which any dtype has; an index below 0 is an error, as in an embedding
        qdata = self.qdata.view(torch.uint8).index_select(0, index).view(self.qdata.dtype)
        scale = self._select_scales(index)
        return replace(self, qdata=qdata, scale=scale, shape=(len(index), self.shape[1]))

    def _select_scales(self, index: Tensor) -> Tensor | None:
        scale = self.scale
        if scale is None:
            return None
        if not self.has_block_scales and scale.numel() == 1:
            return scale  # one for all rows
        height = 1  # rows that share a scale
        if not self.has_block_scales:
            height, _ = infer_block_shape(self.qdata.shape, scale.shape, self.block_size or None)
        if scale.dtype.itemsize == 1:
            return scale.view(torch.uint8)[index // height].view(scale.dtype)
        return scale[index // height]


def is_fp8(tensor: Tensor) -> bool:
    """Whether a tensor holds 8-bit floats."""
    return tensor.dtype in FP8


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below a size."""
    return ceil(size / multiple) * multiple
