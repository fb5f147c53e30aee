"""The weight of a layer in few bits as checkpoints have it: int8, fp8, mxfp8 or nvfp4, with what is needed to read it."""

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
    """Codes and scales of one weight [N, K].

    Args:
        qdata: int8 or fp8 [N, K]; nvfp4 uint8 [N, K / 2], two codes a byte. N and K may be padded.
        scale: of int8 and fp8 any float in a shape that `scale_blocks` knows, of fp8 also None: a plain cast; of mxfp8 e8m0, as bytes
            or as float8_e8m0fnu; of nvfp4 float8_e4m3fn or its bytes.
        shape: N and K of the weight, to which padding is cut.
        global_scale: of nvfp4, one number.
        block: numbers of a row that share a scale, where N or K is no multiple of it; 0: told by the shapes.
        swizzled: mxfp8 and nvfp4: whether the scales lie in cuBLAS's tiles.
        high_first: nvfp4: whether even columns are in the high half of a byte.
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
        return (
            "mxfp8"
            if self.scale is not None and self.scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
            else "fp8"
        )

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return sum(t.nbytes for t in (self.qdata, self.scale, self.global_scale) if t is not None)

    def to(self, device: torch.device) -> "PackedWeight":
        """The same on a device."""
        return replace(
            self,
            **{
                n: t.to(device)
                for n in ("qdata", "scale", "global_scale")
                if (t := getattr(self, n)) is not None
            },
        )

    def dequantize(self, dtype: torch.dtype = torch.float32, operators: ModuleType = reference) -> Tensor:
        """The weight's numbers.

        Args:
            operators: the module of `kernels/dequantize` that computes them, `reference` or `kernel` (Triton).

        Returns:
            dtype [N, K].
        """
        return self.dequantize_padded(dtype, operators)[: self.shape[0], : self.shape[1]]

    def dequantize_padded(self, dtype: torch.dtype, operators: Any) -> Tensor:
        """The same with the file's padding."""
        if self.scale is None:
            return self.qdata.to(dtype)
        block = self.block_size or None
        if self.storage_dtype == "int8":
            return operators.dequantize_int8(self.qdata, self.scale, block, dtype)
        if self.storage_dtype == "fp8":
            return operators.dequantize_fp8(self.qdata, self.scale, block, dtype)
        if self.storage_dtype == "mxfp8":
            return operators.dequantize_mxfp8(self.qdata, self.scale, swizzled=self.is_swizzled, dtype=dtype)
        assert self.global_scale is not None
        return operators.dequantize_nvfp4(
            self.qdata,
            self.scale,
            self.global_scale,
            swizzled=self.is_swizzled,
            high_first=self.high_nibble_first,
            dtype=dtype,
        )

    def unswizzle_scales(self) -> "PackedWeight":
        """The same with block scales that lie in rows, so that `rows` can pick some."""
        if self.storage_dtype not in ("mxfp8", "nvfp4") or not self.is_swizzled:
            return self
        assert self.scale is not None
        rows, columns = (
            self.qdata.shape[0],
            self.qdata.shape[1] // (MXFP8_BLOCK if self.storage_dtype == "mxfp8" else NVFP4_BLOCK // 2),
        )
        scale = self.scale.view(torch.uint8).flatten()[
            compute_swizzled_offsets(rows, columns).to(self.scale.device)
        ]
        return replace(self, scale=scale.view(self.scale.dtype), is_swizzled=False)

    def select_rows(self, index: Tensor) -> "PackedWeight":
        """Some rows in any order, for look-ups. index: int64 [R] -> a weight [R, K]; block scales must lie in rows."""
        in_blocks = self.storage_dtype in ("mxfp8", "nvfp4")
        assert not (in_blocks and self.is_swizzled), "in_rows() first"
        scale = self.scale
        if scale is not None and (in_blocks or scale.numel() > 1):
            height = (
                1
                if in_blocks
                else infer_block_shape(self.qdata.shape, scale.shape, self.block_size or None)[0]
            )
            scale = (
                scale.view(torch.uint8)[index // height].view(scale.dtype)
                if scale.dtype.itemsize == 1
                else scale[index // height]
            )
        # by bytes, which any dtype has; an index below 0 is an error, as in an embedding
        qdata = self.qdata.view(torch.uint8).index_select(0, index).view(self.qdata.dtype)
        return replace(self, qdata=qdata, scale=scale, shape=(len(index), self.shape[1]))


def is_fp8(tensor: Tensor) -> bool:
    """Whether a tensor holds 8-bit floats."""
    return tensor.dtype in FP8


def round_up(size: int, multiple: int) -> int:
    """The next multiple."""
    return ceil(size / multiple) * multiple
