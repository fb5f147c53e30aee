"""A quantized layer of an audited file beside its base; `compare_layer` and `compare_floats` read both."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from int8run.audit.base_weight import BaseTensor
from int8run.audit.stored_numbers import RowSpan
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.reader import TensorFiles


@dataclass(frozen=True)
class LayerSource:
    """A quantized layer and where its numbers and the base's are.

    Args:
        files: the audited file.
        layer: of it.
        base: what the base has for it.
    """

    files: TensorFiles
    layer: CheckpointLayer
    base: BaseTensor

    @property
    def columns(self) -> int:
        """K of the weight."""
        return prod(self.layer.shape[1:])

    def read_integers(self, span: RowSpan) -> Tensor:
        """Stored integers of some rows, int8 [n, K]."""
        q = self.files.read(self.layer.key, span.rows).flatten(1)
        self.files.drop_from_page_cache(self.layer.key, span.rows)
        return q

    def read_scales(self, span: RowSpan) -> tuple[Tensor, Tensor]:
        """Scales of some rows: [n, blocks of a row], and one for each number, [n, 1] or [n, K]."""
        scales = self.layer.read_scales(self.files, span.start, span.stop)
        if not self.layer.block_size:
            return scales, scales
        blocks = torch.arange(self.columns) // self.layer.block_size
        return scales, scales[:, blocks]
