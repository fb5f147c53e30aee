"""Whether INT8 weights look rotated, by their numbers: a rotation that nothing mentions ruins every layer.

A rotation mixes the columns of a group, so that rotated numbers are nearly normally distributed, while the
tails of real weights are heavier, or lighter after a short training. Hadamard matrices of these formats are
their own inverse: where numbers are normal and one more rotation makes them less so, the weight was rotated.
Where it makes them normal, it was not. `detect.py` calls `warn_rotations`, which changes nothing.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int8run.checkpoints.layer import CheckpointLayer, get_hadamard
from int8run.checkpoints.powers import is_power_of_4
from int8run.checkpoints.reader import TensorFiles
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
ADVICE = "model.quant_format=int8_convrot reads them (clip=int8_convrot for a text encoder)"
# groups of columns that programs rotate together, and whether by Sylvester's matrix
USUAL_ROTATIONS = ((256, False), (128, True), (64, False), (16, False))
MAX_LAYERS, MAX_ROWS = 16, 32  # that are looked at
MIN_GROUPS = 200  # of a weight's rows; fewer show nothing
# by how much tails must differ from a normal distribution's, how many times more than the others, and how
# many standard errors apart the two must be
MIN_DEVIATION, MIN_CONTRAST, MIN_ERRORS = 0.03, 3.0, 8.0


@dataclass(frozen=True)
class TailChange:
    """What one more rotation does to the tails of some weights.

    Args:
        group_size: of the rotation.
        before: kurtosis over that of a normal distribution, minus 1, in the mean over groups of columns.
        after: the same after the rotation.
        num_errors: by how many standard errors the two differ.
        row_deviation: of whole rows after it, without its sign; the largest where it undoes a rotation whole.
    """

    group_size: int
    before: float
    after: float
    num_errors: float
    row_deviation: float

    @property
    def undoes_rotation(self) -> bool:
        """Whether numbers that were normal are not so after it, so that it undoes a rotation."""
        return self.num_errors > MIN_ERRORS and is_normal_beside(self.before, self.after)

    @property
    def is_first_rotation(self) -> bool:
        """Whether it makes numbers normal that were not, so that they were not rotated before."""
        return self.num_errors > MIN_ERRORS and is_normal_beside(self.after, self.before)


def is_normal_beside(deviation: float, other: float) -> bool:
    """Whether one deviation from a normal distribution is none, beside another that is one."""
    return abs(other) > MIN_DEVIATION and abs(deviation) < abs(other) / MIN_CONTRAST


def warn_rotations(files: TensorFiles, layers: Mapping[str, CheckpointLayer]) -> None:
    """Warn of INT8 layers that look rotated and do not say so, and the other way round."""
    candidates = [layer for layer in layers.values() if is_comparable(layer)]
    plain = [layer for layer in candidates if not layer.rotation_group_size]
    change = find_rotation(files, plain)
    if change is not None:
        log.warning(
            "%s: nothing says that %s rotated, and by the numbers this is so, in groups of %d columns: read "
            "without it such weights are noise; %s",
            files.path,
            count_noun(len(plain), "INT8 layer", "are"),
            change.group_size,
            ADVICE if is_power_of_4(change.group_size) else "take the file as its maker published it",
        )
    by_rotation: dict[tuple[int, bool], list[CheckpointLayer]] = defaultdict(list)
    for layer in candidates:
        if layer.rotation_group_size:
            by_rotation[layer.rotation_group_size, layer.is_sylvester].append(layer)
    for (group_size, is_sylvester), rotated in by_rotation.items():
        change = measure_tails(files, rotated, group_size, is_sylvester=is_sylvester)
        if change is not None and change.is_first_rotation:
            log.warning(
                "%s: %s said to be rotated in groups of %d columns, and by the numbers this is not so; take "
                "the file as its maker published it",
                files.path,
                count_noun(len(rotated), "INT8 layer", "are"),
                group_size,
            )


def is_comparable(layer: CheckpointLayer) -> bool:
    """Whether rows of a layer's stored numbers are those of a weight, rotated or not."""
    return layer.is_usable_as_is


def find_rotation(files: TensorFiles, layers: Sequence[CheckpointLayer]) -> TailChange | None:
    """The rotation that these layers look to have, the most convincing of the usual ones; None: none."""
    found = None
    for group_size, is_sylvester in USUAL_ROTATIONS:
        change = measure_tails(files, layers, group_size, is_sylvester=is_sylvester)
        if change is None or not change.undoes_rotation:
            continue
        if found is None or change.row_deviation > found.row_deviation:
            found = change
    return found


def measure_tails(
    files: TensorFiles, layers: Sequence[CheckpointLayer], group_size: int, *, is_sylvester: bool
) -> TailChange | None:
    """What a rotation does to the tails of some layers; None where they are too few or too narrow.

    Some rows of some layers are read. Each group of columns of a row counts alone, so that neither scales nor
    columns of different size matter.
    """
    fitting = [layer for layer in layers if layer.columns % group_size == 0]
    chosen = fitting[:: max(len(fitting) // MAX_LAYERS, 1)]
    num_groups = sum(min(layer.rows, MAX_ROWS) * layer.columns // group_size for layer in chosen)
    if num_groups < MIN_GROUPS:
        return None
    before, after, row_deviations = [], [], []
    for layer in chosen:
        rows = read_first_rows(files, layer)
        groups = rows.reshape(-1, group_size)
        rotated = groups @ get_hadamard(group_size, is_sylvester=is_sylvester)
        is_known = groups.abs().sum(1) > 0  # a group of zeros has no tails
        before.append(compute_kurtosis(groups[is_known]))
        after.append(compute_kurtosis(rotated[is_known]))
        row_deviations.append(compute_deviation(compute_kurtosis(rotated.view_as(rows)), layer.columns))
    if sum(map(len, before)) < MIN_GROUPS:
        return None
    row_deviation = abs(sum(row_deviations) / len(row_deviations))
    return compare_tails(torch.cat(before), torch.cat(after), group_size, row_deviation)


def read_first_rows(files: TensorFiles, layer: CheckpointLayer) -> Tensor:
    """Some rows of the stored numbers, each up to a factor. Returns float32 [n, K]."""
    count = min(layer.rows, MAX_ROWS)
    if layer.is_grouped:
        return layer.read_scaled_rows(files, 0, count)
    return files.read(layer.key, slice(0, count)).float()


def compute_kurtosis(groups: Tensor) -> Tensor:
    """The kurtosis of each group about 0. groups: [M, G] -> [M]."""
    squares = groups.double().square()
    return squares.square().mean(1) / squares.mean(1).square()


def compute_deviation(kurtosis: Tensor, count: int) -> float:
    """How far kurtoses are from a normal distribution's, in the mean, as a share of it.

    Args:
        kurtosis: [M], about 0, each of so many numbers.
        count: of numbers.
    """
    normal = 3 * count / (count + 2)  # the mean of so few normal numbers
    return float(kurtosis.nanmean()) / normal - 1


def compare_tails(before: Tensor, after: Tensor, group_size: int, row_deviation: float) -> TailChange:
    """Compare kurtoses. before, after: [M] each, of the same groups."""
    differences = torch.log(after / before)
    error = differences.std() / len(differences) ** 0.5
    return TailChange(
        group_size=group_size,
        before=compute_deviation(before, group_size),
        after=compute_deviation(after, group_size),
        num_errors=abs(float(differences.mean() / error.clamp(min=1e-12))),
        row_deviation=row_deviation,
    )
