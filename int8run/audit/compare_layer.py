"""Compare one quantized layer of a file with its base, a few megabytes at a time.

`file_audit` calls `compare_layer`. First a few rows prove the rotation and try the recipe; then all rows go
by. Rows that the recipe gives to the bit need no more; of others the noise and its rank are measured.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from int8run.audit.compare_codes import CodesComparison
from int8run.audit.compare_floats import PlainComparison
from int8run.audit.grades import Limits
from int8run.audit.layer_audit import LayerAudit
from int8run.audit.layer_source import LayerSource
from int8run.audit.residue import ResidueSums
from int8run.audit.rounding_check import (
    ABSMAX,
    COARSE_SCALE,
    EXACT_SCALE,
    MSE,
    NEAREST,
    RoundedRows,
    RoundingCheck,
    matches_mse,
    round_exactly,
)
from int8run.audit.stored_numbers import (
    RangeCounts,
    RowSpan,
    count_group_columns,
    describe_stored,
    iterate_spans,
    list_probes,
)
from int8run.audit.transforms import TransformMatch, match_transform
from int8run.checkpoints.layer import INT8, CheckpointLayer
from int8run.outlier.base import NONE

Item = TypeVar("Item")
Found = TypeVar("Found")


def compare_layer(source: LayerSource, limits: Limits) -> LayerAudit:
    """What the numbers of a quantized layer are, beside those of the base.

    Args:
        source: the layer and its base.
        limits: from where on a weight is another.

    Raises:
        FileError: when either cannot be read.
    """
    layer = source.layer
    audit = describe_stored(source.files, layer)
    audit.is_compared = True
    comparison: IntegerComparison | CodesComparison | PlainComparison
    if layer.is_grouped:
        comparison = CodesComparison(source, limits)
    elif has_own_integers(layer):
        comparison = IntegerComparison(source, limits)
    else:
        comparison = PlainComparison(source, limits)
    comparison.run(audit)
    return audit


def has_own_integers(layer: CheckpointLayer) -> bool:
    """Whether integers times scales are the weight under a transform that can be applied to the base.

    Weights stored as [K, N] or transformed on both sides are read as floats instead.
    """
    is_read_as_floats = layer.granularity == "transposed" or layer.outlier_method == "quip"
    return layer.storage_dtype == INT8 and not is_read_as_floats


class IntegerComparison:
    """An INT8 layer whose integers can be compared one by one.

    Args:
        source: the layer and its base.
        limits: from where on a weight is another.
    """

    def __init__(self, source: LayerSource, limits: Limits):
        self.source = source
        self.limits = limits
        layer = source.layer
        has_float32_scales = source.files[layer.part_keys["scale"]].dtype == "F32"
        self.sums = ResidueSums(source.columns, limits.max_row_gain_error)
        self.check = RoundingCheck(layer, EXACT_SCALE if has_float32_scales else COARSE_SCALE)
        self.counts = RangeCounts()
        self.is_mse = False

    def run(self, audit: LayerAudit) -> None:
        """Read all of the layer, and fill in what is found."""
        match = self.prove_rotation()
        audit.found_rotation = match.label
        audit.is_proven = match.correlation >= self.limits.min_correlation
        is_recipe = audit.is_proven and self.try_recipe(match)
        layer = self.source.layer
        multiple = layer.block_size if layer.granularity == "grid" else 1
        spans = iterate_spans(layer.shape[0], self.source.columns, multiple)
        for span, rows in read_ahead(self.read_span, spans):
            is_recipe = self.compare_span(span, rows, match, is_recipe=is_recipe)
        if layer.granularity == "tensor":
            self.check.check_tensor_scale(self.source.files.read(layer.part_keys["scale"]).float())
        self.counts.fill(audit, layer.granularity)
        audit.take_residue(self.sums.compute())
        if audit.is_proven:
            self.name_recipe(audit, match)

    def prove_rotation(self) -> TransformMatch:
        """The transform of the layer, by a few of its rows."""
        layer = self.source.layer
        declared = layer.read_transform(self.source.files)
        stored, reference = [], []
        for span in list_probes(layer.shape[0]):
            q = self.source.files.read(layer.key, span.rows).flatten(1)
            _, steps = self.source.read_scales(span)
            stored.append(q.float() * steps)
            reference.append(self.source.base.read_rows(span.start, span.stop).float())
        self.probe = torch.cat(reference)
        return match_transform(torch.cat(stored), self.probe, layer, declared)

    def try_recipe(self, match: TransformMatch) -> bool:
        """Whether a few rows are the recipe's to the bit, so that all may be."""
        if self.source.layer.granularity != "row":
            return False
        q, scale, _ = round_exactly(self.probe, match.transform)
        own = [self.read_rows_of_file(span) for span in list_probes(self.source.layer.shape[0])]
        own_q = torch.cat([rows[0] for rows in own])
        own_scale = torch.cat([rows[1] for rows in own])
        if torch.equal(q, own_q) and torch.equal(scale, own_scale):
            return True
        self.is_mse = matches_mse(own_q, own_scale, match.transform.transform_weight(self.probe))
        return False

    def read_rows_of_file(self, span: RowSpan) -> tuple[Tensor, Tensor]:
        """Integers and scales of some rows."""
        scales, _ = self.source.read_scales(span)
        return self.source.files.read(self.source.layer.key, span.rows).flatten(1), scales

    def read_span(self, span: RowSpan) -> tuple[Tensor, Tensor]:
        """Integers of the file and floats of the base."""
        return self.source.read_integers(span), self.source.base.read_rows(span.start, span.stop)

    def compare_span(
        self, span: RowSpan, rows: tuple[Tensor, Tensor], match: TransformMatch, *, is_recipe: bool
    ) -> bool:
        """Compare some rows.

        Args:
            span: which.
            rows: of the file and of the base.
            match: the transform.
            is_recipe: whether all rows so far were the recipe's to the bit.

        Returns:
            Whether these are, too.
        """
        q, weight = rows
        scales, steps = self.source.read_scales(span)
        self.counts.add(q, count_group_columns(self.source.layer))
        if is_recipe:
            exact_q, exact_scale, sums = round_exactly(weight, match.transform)
            if torch.equal(q, exact_q) and torch.equal(scales, exact_scale):
                self.sums.add_exact(sums.signal, sums.noise)
                self.check.add_exact(q.numel())
                return True
        reference = match.transform.transform_weight(weight.float())
        expected_noise = self.check.add(RoundedRows(q, scales, steps, reference))
        self.sums.add(q.float() * steps, reference, expected_noise)
        return False

    def name_recipe(self, audit: LayerAudit, match: TransformMatch) -> None:
        """Say what gives these integers."""
        method = match.transform.label
        if method.startswith(NONE):
            method = "plain"
        audit.differing = self.check.differing
        if not self.check.is_nearest(self.limits.max_tie_share):
            return
        if self.check.has_absmax_scales():
            audit.recipe = f"{method}, {ABSMAX} by {audit.granularity}"
            audit.is_reproduced = self.check.is_exact()
        elif self.is_mse and self.check.differing == 0:
            audit.recipe = f"{method}, {MSE} by {audit.granularity}"
            audit.is_reproduced = True
        else:
            audit.recipe = f"{method}, {NEAREST}"


def read_ahead(read: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[tuple[Item, Found]]:
    """Read each item while the one before is worked on.

    Args:
        read: reads one, in a thread of its own.
        items: in order.

    Yields:
        An item, and what was read of it.
    """
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for item in items:
            future = reader.submit(read, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = item, future
        if waiting is not None:
            yield waiting[0], waiting[1].result()
