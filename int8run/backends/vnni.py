"""int8run's own CPU kernels: one pass over the input, one product with everything else in its registers.

The kernels are C++ (`kernels/cpu`), compiled on first use.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from int8run.backends.base import MAX_SIGNED_PRODUCTS, NO_GELU, FusedBranch, Limits, QuantizedInput
from int8run.errors import BackendError, check_bool
from int8run.kernels.cpu import vnni
from int8run.kernels.cpu.library import BuildError, load_vnni_library
from int8run.kernels.hadamard.reference import Rotation
from int8run.quant.weight import QuantizedWeight, quantize_weight


@dataclass(frozen=True)
class Vnni:
    """AVX512-VNNI kernels.

    `quantize` computes GELU, factor and rotation in one pass; `linear` keeps the scales, the bias and an int8
    low-rank branch in registers.

    Args:
        int8_branch: compute LoRA branches in int8 inside the product; false: as two float products beside it.
    """

    int8_branch: bool = True
    name: ClassVar[str] = "vnni"
    # unsigned activations may wrap the sums around; subtracting 128 times the weights' sum wraps them back
    limits: ClassVar[Limits] = Limits(
        devices=("cpu",),
        cpu_features=("avx512_vnni",),
        needs_compiler=True,
        fuses_gelu=True,
        max_in_features=MAX_SIGNED_PRODUCTS,
    )

    def __post_init__(self) -> None:
        check_bool("backend.int8_branch", self.int8_branch)

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """Panels of 64 output columns, with their compensations; may be saved.

        int8 [ceil(N / 64), 1 + ceil(K / 4), 256].

        Raises:
            BackendError: when the kernels cannot be built.
        """
        try:
            load_vnni_library()
        except BuildError as error:
            raise BackendError(f"backend vnni: {error}; backend=auto takes the next best") from error
        return vnni.pack_weight(weight.qdata)

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """x: [M, K] -> uint8 [M, K] and scales [M]."""
        q, scale = vnni.quantize_rows(
            x,
            factor=factor,
            rotation=0 if rotation is None else rotation.group,
            sylvester=rotation is not None and rotation.sylvester,
            gelu_from=NO_GELU if gelu_from is None else gelu_from,
        )
        return QuantizedInput(q, scale)

    def linear(
        self,
        x: QuantizedInput,
        packed: Tensor,
        w_scale: Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        branch: FusedBranch | None = None,
        strengths: Tensor | None = None,
    ) -> Tensor:
        """x: [M, K] -> [M, N]."""
        if branch is None or branch.down_scale is None or strengths is None:
            return vnni.int8_linear(x.q, x.scale, packed, w_scale, bias, dtype)
        return vnni.int8_linear(
            x.q,
            x.scale,
            packed,
            w_scale,
            bias,
            dtype,
            down=branch.down,
            down_scale=branch.down_scale * strengths,  # float32 [r]
            up=branch.up,
            up_scale=branch.up_scale,
        )

    def fuse_branch(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> FusedBranch | None:
        """Both factors in int8 with a scale per row: the branch uses the quantized x and the same
        instructions.

        None with `int8_branch=false`.
        """
        if not self.int8_branch:
            return None
        down, up = quantize_weight(lora_A), quantize_weight(lora_B)
        return FusedBranch(
            down=vnni.pack_weight(down.qdata),
            up=vnni.pack_weight(up.qdata),
            down_scale=down.scale[:, 0].contiguous(),
            up_scale=up.scale[:, 0].contiguous(),
        )
