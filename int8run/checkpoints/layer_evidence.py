"""All that a checkpoint says about one layer: its weight, the tensors beside it, and its marker.

`classify.py` gathers a `LayerEvidence` for each weight and decides what the weight is. The checks of the
formats (`classify_int8.py`, `block_scaled.py`, `granularity.py`, `quip.py`) look at it. Nothing here decides
anything, and no number of a weight is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from int8run.checkpoints.checkpoint_files import TensorInfo
from int8run.checkpoints.quant_metadata import Marker
from int8run.checkpoints.reader import TensorFiles


@dataclass(frozen=True)
class LayerEvidence:
    """What a checkpoint says about one layer.

    Args:
        files: the checkpoint.
        name: the weight's key without `.weight`.
        weight: where the weight is, its dtype and its shape.
        part_keys: what for -> key, of the tensors beside the weight; see `classify.PART_SUFFIXES`.
        marker: what a `comfy_quant` tensor or the header says; None where neither speaks of the layer.
    """

    files: TensorFiles
    name: str
    weight: TensorInfo
    part_keys: Mapping[str, str]
    marker: Marker | None

    def has_part(self, part: str) -> bool:
        """Whether a tensor for this stands beside the weight."""
        return part in self.part_keys

    def find_part(self, part: str) -> TensorInfo | None:
        """Where the tensor for this is; None where there is none."""
        if part not in self.part_keys:
            return None
        return self.files[self.part_keys[part]]

    def get_part(self, part: str) -> TensorInfo:
        """Where the tensor for this is, which must stand beside the weight."""
        return self.files[self.part_keys[part]]

    def read_part(self, part: str) -> Tensor:
        """The numbers of a tensor that stands beside the weight, float32."""
        return self.files.read(self.part_keys[part]).float()
