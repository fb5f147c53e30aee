"""What stored numbers and scales show by themselves, without a base: the ends of the range, unused range.

`compare_layer` counts as it reads; without a base `inspect_numbers` reads the layer for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from int8run.audit.layer_audit import LayerAudit
from int8run.audit.transforms import NOT_ROTATED, name_rotation
from int8run.checkpoints.grouped import ROW_SCALE
from int8run.checkpoints.layer import FLOAT, INT8, CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.rotation_evidence import find_rotation, is_comparable, measure_tails
from int8run.kernels.quantize_rowwise.reference import INT8_MAX

CHUNK_ELEMENTS = 2**20  # numbers that are looked at at a time
HALF_RANGE = INT8_MAX // 2
PROBE_PLACES, PROBE_ROWS = 4, 8  # of a weight, that are looked at first
SMALL_GROUP = 16  # of columns: the smallest that shows whether there are enough numbers


@dataclass(frozen=True)
class RowSpan:
    """Rows that are read together."""

    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """As a slice."""
        return slice(self.start, self.stop)


def iterate_spans(num_rows: int, columns: int, multiple: int = 1) -> Iterator[RowSpan]:
    """The rows of a weight in pieces of a few megabytes.

    Args:
        num_rows: N of the weight.
        columns: K of the weight.
        multiple: rows of a block, which stay together.
    """
    step = max(1, CHUNK_ELEMENTS // max(1, columns) // multiple) * multiple
    for start in range(0, num_rows, step):
        yield RowSpan(start, min(start + step, num_rows))


def list_probes(num_rows: int) -> list[RowSpan]:
    """Some rows of a weight from its beginning to its end, each once."""
    if num_rows <= PROBE_PLACES * PROBE_ROWS:
        return [RowSpan(0, num_rows)]
    edges = [num_rows * place // PROBE_PLACES for place in range(PROBE_PLACES + 1)]
    return [RowSpan(start, start + PROBE_ROWS) for start, _ in pairwise(edges)]


class RangeCounts:
    """How the integers of a weight fill their range."""

    def __init__(self) -> None:
        self.total = self.saturated = self.cut_off = 0
        self.groups = self.unused = 0

    def add(self, q: Tensor, group_columns: int) -> None:
        """Count some rows.

        Args:
            q: int8 [n, K].
            group_columns: columns that share a scale; 0: a row does, or more.
        """
        magnitude = q.to(torch.int16).abs()
        self.total += q.numel()
        is_divided = group_columns > 0 and q.shape[1] % group_columns == 0
        groups = magnitude.reshape(-1, group_columns) if is_divided else magnitude
        saturated = (groups >= INT8_MAX).sum(1)
        self.saturated += int(saturated.sum())
        # the largest number of those that share a scale is there by right; of a scale of all, of each row
        self.cut_off += int((saturated - 1).clamp_(min=0).sum())
        largest = groups.amax(1)
        self.groups += len(largest)
        # numbers that are all 0 have no range to use
        self.unused += int(((largest <= HALF_RANGE) & (largest > 0)).sum())

    def fill(self, audit: LayerAudit, granularity: str) -> None:
        """Write the shares into what is said of a layer."""
        audit.saturated_share = self.saturated / max(1, self.total)
        audit.cut_off_share = self.cut_off / max(1, self.total)
        # where what was counted together has a scale of its own
        if granularity in ("row", "group", "block3d"):
            audit.unused_share = self.unused / max(1, self.groups)


def describe_stored(files: TensorFiles, layer: CheckpointLayer) -> LayerAudit:
    """What the file says of a layer, and the spread of its scales.

    Args:
        files: the file.
        layer: of it.
    """
    rotation = name_rotation(layer.rotation_group_size, is_sylvester=layer.is_sylvester)
    says_rotation = layer.storage_dtype == INT8 or layer.is_grouped
    declared = rotation if says_rotation else NOT_ROTATED
    if layer.storage_dtype == FLOAT:  # nothing is said of it, and nobody rotates it
        declared = ""
    granularity = layer.granularity
    if layer.block_size:
        granularity = f"{granularity} {layer.block_size}"
    shape = layer.shape if len(layer.shape) != 2 else (layer.rows, layer.columns)
    return LayerAudit(
        name=layer.name,
        shape=shape,
        storage_dtype=layer.storage_dtype,
        label=layer.label,
        granularity=granularity,
        declared_rotation=declared,
        scale_spread=measure_scale_spread(files, layer),
    )


def measure_scale_spread(files: TensorFiles, layer: CheckpointLayer) -> float | None:
    """The largest scale over the median one; None where there are no float scales to compare."""
    key = layer.part_keys.get(ROW_SCALE if layer.is_grouped else "scale")
    if key is None or not files[key].dtype.startswith(("F32", "F16", "BF16")):
        return None
    scales = files.read(key).float().flatten()
    if scales.numel() < 2:
        return None
    return float(scales.max() / scales.median())


def inspect_numbers(files: TensorFiles, layer: CheckpointLayer) -> LayerAudit:
    """What the numbers of a quantized layer show without a base.

    Args:
        files: the file.
        layer: a quantized one.
    """
    audit = describe_stored(files, layer)
    if layer.storage_dtype != INT8:
        return audit
    counts = RangeCounts()
    for span in iterate_spans(layer.shape[0], prod(layer.shape[1:])):
        counts.add(files.read(layer.key, span.rows).flatten(1), count_group_columns(layer))
        files.drop_from_page_cache(layer.key, span.rows)
    counts.fill(audit, layer.granularity)
    return audit


def count_group_columns(layer: CheckpointLayer) -> int:
    """Columns that share a scale, where a row has several; else 0."""
    return layer.block_size if layer.granularity in ("group", "block3d") else 0


def suggest_rotations(files: TensorFiles, layers: Sequence[CheckpointLayer]) -> dict[str, str]:
    """The rotations that the tails of numbers suggest, where they show something.

    A narrow layer has too few numbers to show anything: what all that say the same show together counts.

    Args:
        files: the file.
        layers: quantized ones.

    Returns:
        Layer name -> rotation in words.
    """
    by_rotation: dict[tuple[int, bool], list[CheckpointLayer]] = {}
    for layer in layers:
        if is_comparable(layer) and len(layer.shape) == 2:
            by_rotation.setdefault((layer.rotation_group_size, layer.is_sylvester), []).append(layer)
    suggestions = {}
    for alike in by_rotation.values():
        of_all = suggest_rotation(files, alike)
        for layer in alike:
            of_one = suggest_rotation(files, [layer])
            suggestions[layer.name] = of_all if of_one is None else of_one
    return {name: text for name, text in suggestions.items() if text}


def suggest_rotation(files: TensorFiles, layers: Sequence[CheckpointLayer]) -> str | None:
    """The rotation that some layers look to have; empty where their tails do not tell, None: too few numbers.

    Args:
        files: the file.
        layers: that say the same of their rotation.
    """
    first = layers[0]
    group_size, is_sylvester = first.rotation_group_size, first.is_sylvester
    if group_size:
        change = measure_tails(files, layers, group_size, is_sylvester=is_sylvester)
        if change is None:
            return None
        return NOT_ROTATED if change.is_first_rotation else ""
    change = find_rotation(files, layers)
    if change is not None:
        return f"rotated by groups of {change.group_size}"
    return None if measure_tails(files, layers, SMALL_GROUP, is_sylvester=False) is None else ""
