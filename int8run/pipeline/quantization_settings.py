"""What decides how the layers of a denoiser become INT8.

build.py makes it from the settings of a run; the modules that quantize, choose methods and write provenance
read it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from int8run.backends.base import Backend
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.layers.int8_attention import Int8Attention
from int8run.layers.plan import Int8Settings
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import OutlierMethod
from int8run.ptq.attention import PlannedAttention, list_int8_attentions
from int8run.quant.rounding import Rounding


@dataclass(frozen=True)
class QuantizationSettings:
    """What decides how the layers of a denoiser become INT8.

    Args:
        outlier: the method, or `auto`.
        rounding: of the weights.
        backend: of the layers.
        int8: when a layer computes in float all the same.
        calibration: which images the float model generates where something is fitted to it.
        quality_db: keep sensitive layers float until this is reached; None: no search,
            only the layers that the family excludes stay float.
        dtype: of the float model.
        needs_calibration: whether the float model generates the calibration images.
        has_fused_layers: whether the layers will be saved under their original names, which have some of them
            as one layer. These get one outlier method.
        attentions: of the denoiser, chosen before; a quality budget may keep some of them float.
    """

    outlier: OutlierMethod | AutoOutlier
    rounding: Rounding
    backend: Backend
    int8: Int8Settings
    calibration: CalibrationSettings
    quality_db: float | None
    dtype: torch.dtype
    needs_calibration: bool
    has_fused_layers: bool
    attentions: Sequence[PlannedAttention] = ()

    @property
    def attention_layers(self) -> dict[str, Int8Attention]:
        """What computes attention in INT8, by the name of its module."""
        return list_int8_attentions(self.attentions)

    @property
    def is_fitted(self) -> bool:
        """Whether layers that are quantized here are fitted to activations."""
        return self.outlier.needs_calibration or self.rounding.needs_calibration
