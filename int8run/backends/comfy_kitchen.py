"""comfy-kitchen's INT8 linear layer, the one that ComfyUI runs: to compare with.

It follows `comfy_kitchen.int8_linear` (Comfy-Org/comfy-kitchen), an optional package.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from int8run.backends.base import INT8_CPU_FEATURES, MAX_SIGNED_PRODUCTS, FusedBranch, Limits, QuantizedInput
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.quantize_rowwise.reference import transform_rows
from int8run.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class ComfyKitchen:
    """Quantizes inside its product, so that layers with the same input share only GELU and factors.

    On CPUs it runs its portable path over `torch._int_mm`, with the same need for VNNI.
    """

    name: ClassVar[str] = "comfy_kitchen"
    limits: ClassVar[Limits] = Limits(
        python_packages=("comfy_kitchen",),
        cuda_capability=(7, 5),
        cpu_features=INT8_CPU_FEATURES,
        uses_onednn=True,
        max_in_features=MAX_SIGNED_PRODUCTS,
        is_optional=True,
    )

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """The integers as they are, [N, K]."""
        return weight.qdata.contiguous()

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """x: [M, K], not quantized yet. A regular rotation is left to the product, which has no other."""
        left_to_product = 0
        if rotation is not None and not rotation.sylvester:
            left_to_product = rotation.group
            rotation = None
        transformed = transform_rows(x, factor, rotation, gelu_from)
        # the product computes the scales; the field has to hold a tensor
        return QuantizedInput(transformed, scale=x, rotation=left_to_product)

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
        # an optional package, imported where it runs
        from comfy_kitchen import int8_linear

        if bias is not None:
            bias = bias.to(dtype)
        rotation: dict[str, Any] = {}
        if x.rotation:
            rotation = {"convrot": True, "convrot_groupsize": x.rotation}
        y: Tensor = int8_linear(x.q.contiguous(), packed, w_scale, bias, out_dtype=dtype, **rotation)
        return y
