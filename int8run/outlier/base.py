"""What an outlier method is: something done to the weight once and to the input at every call.

A method makes an `OutlierTransform` for each layer. Before rounding, `transform_input(x) @
transform_weight(W).T` equals `x @ W.T` (`tests/outlier/test_exact.py`). Backends compute the input's side
inside their quantization; they know the factor and the rotation of a transform, not its method.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from int8run.kernels.cpu import rows
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise, transform_rows

# the method of a layer that is rounded as it is
NONE = "none"


@dataclass(frozen=True)
class LayerStatistics:
    """What a calibration saw of one Linear.

    Args:
        sample: [S, T, K], T tokens of each of S inputs.
        input_absmax: float32 [K], over every row that was seen.
        weight_absmax: float32 [K], over all Linears that read the same tensor, so that they can treat it
            alike.
    """

    sample: Tensor
    input_absmax: Tensor
    weight_absmax: Tensor


class OutlierTransform(nn.Module):
    """The two sides of one layer's transform; without arguments it changes nothing. Buffers move with the
    layer.

    The input's side is data, so that a backend can compute it inside its quantization: a factor per column,
    then a rotation.

    Args:
        method: name of the method that made it.
        settings: of that method, as far as this layer uses them.
        factor: float32 [K], multiplied to the input; the weight is divided by it.
        rotation: of groups of columns, on both sides.
        centered: the mean over tokens is quantized on its own (see `Int8Linear`).
        taps: columns of the weight for one channel of the input: 1, of a convolution the size of its kernel.
            What is transformed are the channels of each tap.
    """

    factor: Tensor | None
    matrix: Tensor | None

    def __init__(
        self,
        method: str = NONE,
        settings: Mapping[str, float] | None = None,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        *,
        centered: bool = False,
        taps: int = 1,
    ):
        super().__init__()
        self.method = method
        self.settings = dict(settings or {})
        self.centered = centered
        self.taps = taps
        self.sylvester = rotation is not None and rotation.sylvester
        self.register_buffer("factor", factor)
        # not in the state dict, because it can be rebuilt from its size
        self.register_buffer("matrix", None if rotation is None else rotation.matrix, persistent=False)

    @property
    def rotation(self) -> Rotation | None:
        """The rotation, on the device where the layer is."""
        return None if self.matrix is None else Rotation(self.matrix, self.sylvester)

    def get_input_steps(self) -> tuple[Tensor | None, Rotation | None]:
        """Factor and rotation in one call, for the hot path of a layer."""
        buffers = self._buffers
        matrix = buffers["matrix"]
        rotation = None if matrix is None else Rotation(matrix, self.sylvester)
        return buffers["factor"], rotation

    def transform_weight(self, weight: Tensor) -> Tensor:
        """Offline, once, in float32. weight: [N, K] -> [N, K]."""
        weight = self.arrange_columns(weight)
        if self.factor is not None:
            weight = weight / self.factor
        # the matrix is symmetric and its own inverse, so both sides are rotated alike
        return self.restore_columns(transform_rows(weight, rotation=self.rotation))

    def transform_rows(self, weight: Tensor) -> Tensor:
        """As `transform_weight`, of a Linear and each row by itself.

        On a CPU the sums are the same for any number of rows, so that what is read a few rows at a time has
        the same bits. weight: [N, K] of any float dtype -> float32 [N, K].
        """
        if weight.device.type != "cpu":
            return self.transform_weight(weight.float())
        return rows.transform_rows(weight.float(), self.factor, self.rotation)

    def restore_weight(self, weight: Tensor) -> Tensor:
        """The inverse of `transform_weight`. weight: [N, K] -> [N, K]."""
        weight = transform_rows(self.arrange_columns(weight), rotation=self.rotation)
        if self.factor is not None:
            weight = weight * self.factor
        return self.restore_columns(weight)

    @property
    def rearranges_columns(self) -> bool:
        """Whether the columns of a weight lie otherwise while it is transformed."""
        return self.taps > 1 and self.matrix is not None

    def arrange_columns(self, weight: Tensor) -> Tensor:
        """Put the channels of a tap side by side, as they are rotated.

        weight: [N, K], its columns channel after channel -> [N, K], tap after tap; the same without taps.
        """
        if not self.rearranges_columns:
            return weight
        channels: Tensor = weight.unflatten(1, (-1, self.taps))  # [N, C, taps]
        return channels.mT.flatten(1)

    def restore_columns(self, weight: Tensor) -> Tensor:
        """The inverse of `arrange_columns`."""
        if not self.rearranges_columns:
            return weight
        taps: Tensor = weight.unflatten(1, (self.taps, -1))  # [N, taps, C]
        return taps.mT.flatten(1)

    def transform_input(self, x: Tensor) -> Tensor:
        """Online, at every call: the definition of what backends compute. x: [..., K] -> [..., K]."""
        return transform_rows(x, self.factor, self.rotation)

    def round_input(self, x: Tensor) -> Tensor:
        """The transformed input after rounding to int8 and back, in float32: what an INT8 layer multiplies.

        x: [..., T, K] -> [..., T, K].
        """
        x = x.float()
        if not self.centered:
            return round_rows(self.transform_input(x))
        mean = x.mean(-2, keepdim=True)  # [..., 1, K]
        return round_rows(self.transform_input(x - mean)) + round_rows(self.transform_input(mean))

    def has_same_input_transform(self, other: "OutlierTransform") -> bool:
        """Whether both do the same to their input, so that one quantization can serve both layers."""
        if self.centered != other.centered:
            return False
        if (self.group_size, self.sylvester) != (other.group_size, other.sylvester):
            return False
        if self.factor is None or other.factor is None:
            return self.factor is other.factor
        return torch.equal(self.factor, other.factor)

    @property
    def group_size(self) -> int:
        """Columns that are rotated together; 0 without a rotation."""
        return 0 if self.matrix is None else self.matrix.shape[0]

    @property
    def label(self) -> str:
        """Method and settings in one line: `convrot group_size=256`."""
        settings = [f"{name}={value:g}" for name, value in self.settings.items()]
        return " ".join([self.method, *settings])

    def extra_repr(self) -> str:
        """What torch prints of it beside the class."""
        return self.label


def round_rows(x: Tensor) -> Tensor:
    """Each row rounded to int8 and back. x: float32 [..., K]."""
    q, scale = quantize_rowwise(x)
    return q.float() * scale


class OutlierMethod(Protocol):
    """A frozen dataclass with the method's settings, which makes the transform of each layer.

    Args:
        name: of the method; settings may differ between two methods of one name.
        needs_calibration: whether `fit` needs statistics.
        takes_convolutions: whether it only rotates, by a matrix that depends on the width alone: what the
            kernels of convolutions do with the channels of each pixel.
    """

    name: ClassVar[str]
    needs_calibration: ClassVar[bool]
    takes_convolutions: ClassVar[bool]

    def unsupported_reason(self, in_features: int) -> str | None:
        """Why it cannot take a layer of this width; None when it can."""
        ...

    def get_settings(self, in_features: int) -> Mapping[str, float]:
        """Its settings as a layer of this width uses them."""
        ...

    def fit(self, weight: Tensor, statistics: LayerStatistics | None) -> OutlierTransform:
        """The transform for one layer without an `unsupported_reason`.

        Args:
            weight: [N, K].
            statistics: what the calibration saw of the layer; never None for a method that needs it.
        """
        ...


def find_channel_obstacle(method: OutlierMethod, channels: int) -> str | None:
    """Why a method cannot take a convolution; None when it can.

    Args:
        method: any.
        channels: of a group of the convolution.
    """
    if not method.takes_convolutions:
        return describe_linear_method(method.name)
    reason = method.unsupported_reason(channels)
    if reason is None:
        return None
    return reason.replace("in_features", "channels")  # methods speak of Linears


def describe_linear_method(name: str) -> str:
    """Why a convolution has no method where the one of this name is asked for."""
    return f"outlier={name} is for Linears alone"


def fit_convolution(method: OutlierMethod, weight: Tensor, taps: int) -> OutlierTransform:
    """The transform of a convolution without a `find_channel_obstacle`.

    Args:
        method: its matrix depends on the number of channels alone.
        weight: [N, K], its columns channel after channel.
        taps: size of the kernel.
    """
    channels = weight.shape[1] // taps
    transform = method.fit(weight.new_ones(1, channels), None)
    transform.taps = taps
    return transform
