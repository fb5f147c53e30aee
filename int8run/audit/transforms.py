"""Which rotation a weight was stored under, proven on its numbers: rows of the base are rotated and compared.

Rotations that are not the one of the numbers give something unlike them: their cosine is near 0, whatever the
scales are. `compare_layer` asks with a few rows, and goes on with what was found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from int8run.audit.residue import correlate
from int8run.checkpoints.layer import CheckpointLayer, get_hadamard
from int8run.kernels.hadamard.reference import Rotation
from int8run.outlier.base import OutlierTransform

# columns that programs rotate together, and whether by Sylvester's matrix; the most usual first
KNOWN_ROTATIONS = (
    (0, False),
    (256, False),
    (128, True),
    (64, False),
    (16, False),
    (1024, False),
    (64, True),
    (256, True),
    (32, True),
    (512, True),
    (1024, True),
    (16, True),
    (4, False),
)
SURE_CORRELATION = 0.9  # of the marker's rotation; others need not be tried
NOT_ROTATED = "not rotated"


@dataclass(frozen=True)
class TransformMatch:
    """The transform that fits stored numbers best.

    Args:
        transform: that makes the base like them.
        correlation: of the two.
    """

    transform: OutlierTransform
    correlation: float

    @property
    def label(self) -> str:
        """Its rotation in words."""
        return name_rotation(self.transform.group_size, is_sylvester=self.transform.sylvester)


def name_rotation(group_size: int, *, is_sylvester: bool) -> str:
    """A rotation in words, such as `regular 256`."""
    if not group_size:
        return NOT_ROTATED
    construction = "sylvester" if is_sylvester else "regular"
    return f"{construction} {group_size}"


def match_transform(
    stored: Tensor, reference: Tensor, layer: CheckpointLayer, declared: OutlierTransform
) -> TransformMatch:
    """Find the transform under which the base is most like stored numbers.

    Args:
        stored: numbers of the file times their scales, float32 [n, K].
        reference: the same rows of the base, float32 [n, K].
        layer: that they are of.
        declared: what the file says.
    """
    best = TransformMatch(declared, correlate(stored, declared.transform_weight(reference)))
    if best.correlation >= SURE_CORRELATION:
        return best
    for transform in iterate_others(layer, declared):
        correlation = correlate(stored, transform.transform_weight(reference))
        if correlation > best.correlation:
            best = TransformMatch(transform, correlation)
    return best


def iterate_others(layer: CheckpointLayer, declared: OutlierTransform) -> Iterator[OutlierTransform]:
    """Every known rotation of a layer but the declared one; factors of columns stay as they are."""
    channels = layer.columns // prod(layer.shape[2:])
    for group_size, is_sylvester in select_rotations(channels):
        if (group_size, is_sylvester) == (declared.group_size, declared.sylvester):
            continue
        if not group_size:
            yield OutlierTransform(factor=declared.factor, taps=declared.taps)
            continue
        rotation = Rotation(get_hadamard(group_size, is_sylvester=is_sylvester), is_sylvester)
        method = "quarot" if is_sylvester else "convrot"
        settings = {"group_size": group_size}
        yield OutlierTransform(method, settings, declared.factor, rotation, taps=declared.taps)


def select_rotations(channels: int) -> Sequence[tuple[int, bool]]:
    """The known rotations whose groups divide so many channels."""
    return [kind for kind in KNOWN_ROTATIONS if kind[0] == 0 or channels % kind[0] == 0]
