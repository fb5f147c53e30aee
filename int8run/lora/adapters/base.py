"""What every adapter type offers: its change of one weight, dense or as a branch beside the layer.

The classes of this package satisfy `LoraDelta`. `int8run.lora.parse` builds them from the tensors of a file,
`int8run.lora.apply` brings them to the layers. Nothing here knows files, models or INT8.

A change is linear in its strength t: `W' = W + t * delta(W0)`, with W0 the weight without any LoRA, so the
order of a stack does not matter. All sums are float32, whatever the dtype of the file: products of float16
factors can overflow in their own dtype.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RuntimeBranch:
    """A change that is computed beside its layer: `delta = lora_B @ lora_A + row_factor[:, None] * W0`.

    K are the columns of the weight as a matrix: of a convolution its input channels times its kernel.

    Args:
        lora_A: [r, K], float32; None together with `lora_B`: no low-rank part.
        lora_B: [N, r], float32, with the scale alpha / r multiplied in.
        row_factor: [N], float32; None: the rows of the weight are not scaled.
    """

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    row_factor: Tensor | None = None


class LoraDelta(Protocol):
    """The change that one adapter makes to one weight, `W0` in the formulas: a Linear's [N, K], a kernel's
    [N, K, kh, kw] or a norm's [N].
    """

    @property
    def adapter_type(self) -> str:
        """The name for people: LoRA, LoCon, LoHa, LoKr, diff, norm, IA3, DoRA, OFT, BOFT."""

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None for an adapter type without one."""

    @property
    def scale(self) -> float:
        """alpha / rank; 1 for an adapter type without a rank."""

    @property
    def out_features(self) -> int | None:
        """Rows of the weight that it changes; None: it fits any number of rows."""

    @property
    def needs_weight(self) -> bool:
        """Whether `compute_delta` and `make_branch` use the values of the weight, and not only its shape."""

    @property
    def has_branch(self) -> bool:
        """Whether `make_branch` returns a branch."""

    def shape_mismatch(self, shape: tuple[int, ...]) -> str | None:
        """Why it does not fit a weight of this shape, with both shapes in the text; None: it fits."""

    def compute_delta(self, weight: Tensor) -> Tensor:
        """The change at strength 1, float32, in the shape of the weight.

        Args:
            weight: the one without any LoRA.
        """

    def make_branch(self, weight: Tensor | None) -> RuntimeBranch | None:
        """The exact change as a branch beside a Linear or a convolution.

        Args:
            weight: [N, K] or [N, K, *kernel], the one without any LoRA; may be None unless `needs_weight`.

        Returns:
            None where no branch is narrower than the weight itself.
        """

    def select_rows(self, index: Tensor) -> "LoraDelta":
        """The change with these rows of this one.

        Args:
            index: int64 [N]; row i of the result is row `index[i]` of this change, or zeros where that is -1.
        """


class WholeWeightDelta:
    """What the adapter types have in common that are no product of factors: no rank, no alpha, no branch."""

    rank = None
    scale = 1.0
    has_branch = False

    def make_branch(self, weight: Tensor | None) -> None:
        """None: as a branch it would be as large as the weight itself."""


def broadcast_to_dim(factor: Tensor, dim: int, num_dims: int) -> Tensor:
    """A vector shaped to multiply along one dimension of a tensor with `num_dims` dimensions."""
    shape = [1] * num_dims
    shape[dim] = -1
    return factor.reshape(shape)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape belongs to a Linear, or to a 1x1 convolution, which acts like one."""
    return len(shape) >= 2 and math.prod(shape[2:]) == 1


def describe_shape_mismatch(delta_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> str | None:
    """Why a change does not fit a weight, with both shapes in the text; None: it fits.

    A 1x1 kernel fits a Linear and the other way round. A change that was saved flat, [out, in * kernel], fits
    the convolution that it was made for.
    """
    is_flat = len(delta_shape) == 2 < len(weight_shape)
    if is_flat and delta_shape == (weight_shape[0], math.prod(weight_shape[1:])):
        return None
    if drop_unit_kernel(delta_shape) == drop_unit_kernel(weight_shape):
        return None
    return f"changes a {format_shape(delta_shape)} weight, the model's is {format_shape(weight_shape)}"


def drop_unit_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[N, K, 1, 1] -> [N, K]; other shapes stay as they are."""
    return tuple(shape[:2]) if is_matrix(shape) else tuple(shape)


def format_shape(shape: tuple[int, ...]) -> str:
    """(5, 6) -> 5x6."""
    return "x".join(map(str, shape))
