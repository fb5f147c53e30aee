"""The float weight behind an INT8 layer, for what LoRAs need it for."""

import weakref

from torch import Tensor

from int8run.layers.int8_conv import Int8Layer
from int8run.lora.float_merge import FloatMerge


class WeightReader:
    """Returns the weight that an INT8 layer stands for, without any LoRA; computed at its first call.

    Args:
        name: of the layer.
        layer: must be without LoRAs at the first call.
        merge: of the float model that the layer was quantized from; None: the weight is read back from the
            integers.
    """

    def __init__(self, name: str, layer: Int8Layer, merge: FloatMerge | None):
        self.name, self.merge = name, merge
        # weak, because the layer's model holds this object: a circle would keep a dropped model in memory
        self._layer = weakref.ref(layer)
        self.known: Tensor | None = None

    def __call__(self) -> Tensor:
        """[N, K], of a convolution [N, C / groups, *kernel]."""
        if self.merge is not None:
            return self.merge.get_original(self.name)
        if self.known is None:
            layer = self._layer()
            assert layer is not None
            matrix = layer.transform.restore_weight(layer.read_stored_weight().dequantize())  # [N, K]
            self.known = matrix.reshape(layer.weight_shape)
        return self.known
