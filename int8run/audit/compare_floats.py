"""Compare a layer with its base as the floats that it stands for: fp8, mxfp8, nvfp4, and some of INT8.

`compare_layer` calls `PlainComparison.run` for layers whose stored numbers cannot be compared one by one. Of
formats that int8run writes itself, the base is quantized anew and compared bit by bit. The weight of one
layer is in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int8run.audit.grades import Limits
from int8run.audit.layer_audit import LayerAudit
from int8run.audit.layer_source import LayerSource
from int8run.audit.residue import ResidueSums
from int8run.audit.stored_numbers import RowSpan, iterate_spans
from int8run.checkpoints.layer import INT8
from int8run.quant.formats import FORMATS
from int8run.quant.packed_weight import PackedWeight


class PlainComparison:
    """A layer that is compared as the floats that it stands for: fp8, mxfp8, nvfp4, and some of INT8.

    Args:
        source: the layer and its base.
        limits: from where on a weight is another.
    """

    def __init__(self, source: LayerSource, limits: Limits):
        self.source = source
        self.limits = limits

    def run(self, audit: LayerAudit) -> None:
        """Read all of the layer, and fill in what is found."""
        whole = self.source.base.read_rows(0, self.source.base.count_rows())  # [N, K]
        sums = ResidueSums(whole.shape[1], self.limits.max_row_gain_error)
        recipe = check_format(self.source, whole)
        for span in iterate_plain_spans(self.source, whole):
            self.add_rows(span, whole, recipe, sums)
        residue = sums.compute()
        audit.take_residue(residue)
        audit.is_proven = residue.correlation >= self.limits.min_correlation
        if audit.is_proven:
            audit.found_rotation = audit.declared_rotation
        if recipe is not None and audit.is_proven:
            audit.recipe = recipe.name if recipe.is_exact else ""
            audit.is_reproduced = recipe.is_exact
            audit.differing = recipe.differing

    def add_rows(
        self, span: RowSpan, whole: Tensor, recipe: "FormatRecipe | None", sums: ResidueSums
    ) -> None:
        """Compare some rows.

        Args:
            span: which.
            whole: the base's weight, [N, K].
            recipe: what a format of ours gives for it; None: there is none.
            sums: get what is found.
        """
        layer = self.source.layer
        shape = (whole.shape[0], whole.shape[1]) if len(layer.shape) == 2 else None
        stored = layer.read_weight(self.source.files, span.rows, shape).flatten(1)
        reference = whole[span.rows].float()
        if recipe is None:
            sums.add(stored, reference, None)
        elif recipe.weight is None:
            noise = (stored - reference).square().sum(dtype=torch.float64)
            sums.add_exact(float(reference.square().sum(dtype=torch.float64)), float(noise))
        else:
            nearest = recipe.weight[span.rows].float()
            sums.add(stored, reference, float((nearest - reference).square().sum(dtype=torch.float64)))


@dataclass(frozen=True)
class FormatRecipe:
    """What one of the formats of `clip=` gives for the base.

    Args:
        name: of the format.
        weight: the floats that its numbers stand for, [N, K]; None where they are the file's.
        differing: numbers that are not.
    """

    name: str
    weight: Tensor | None
    differing: int

    @property
    def is_exact(self) -> bool:
        """Whether numbers and scales are the file's to the bit."""
        return self.weight is None


def check_format(source: LayerSource, whole: Tensor) -> FormatRecipe | None:
    """Quantize the base in the file's format; None where no format of ours is like it.

    Args:
        source: the layer and its base.
        whole: the base's weight, [N, K].
    """
    layer = source.layer
    weight_format = FORMATS.get(layer.format_name)
    is_matrix = layer.is_packable and layer.rotation_group_size == 0 and "factor" not in layer.part_keys
    if weight_format is None or not is_matrix or layer.storage_dtype == INT8:
        return None
    if layer.block_size:
        weight_format = replace(weight_format, block_size=layer.block_size)
    rows, columns = whole.shape
    if weight_format.unsupported_reason(rows, columns) is not None:
        return None
    made = weight_format.quantize(whole)
    stored, _ = layer.read_packed_weight(source.files, (rows, columns))
    assert isinstance(made, PackedWeight) and isinstance(stored, PackedWeight), "codes are compared apart"
    if made.qdata.shape != stored.qdata.shape:
        return None
    differing = int((made.qdata.view(torch.uint8) != stored.qdata.view(torch.uint8)).sum())
    if differing == 0 and have_same_scales(made, stored):
        return FormatRecipe(weight_format.name, None, differing)
    # as small as the base: a float32 copy of a large layer would be the most that an audit holds
    weight = made.dequantize(torch.bfloat16 if whole.dtype == torch.bfloat16 else torch.float32)
    return FormatRecipe(weight_format.name, weight, differing)


def have_same_scales(first: PackedWeight, second: PackedWeight) -> bool:
    """Whether two weights have the same scales to the bit, whatever shapes they are stored in."""
    for one, other in ((first.scale, second.scale), (first.global_scale, second.global_scale)):
        if one is None or other is None:
            if one is not other:
                return False
            continue
        if one.numel() != other.numel():
            return False
        if one.dtype.itemsize == 1:
            same = torch.equal(one.view(torch.uint8).flatten(), other.view(torch.uint8).flatten())
        else:
            same = torch.equal(one.float().flatten(), other.float().flatten())
        if not same:
            return False
    return True


def iterate_plain_spans(source: LayerSource, whole: Tensor) -> Iterator[RowSpan]:
    """The rows of a layer in pieces; all at once where any row takes the whole to be read."""
    layer = source.layer
    if layer.granularity == "transposed" or layer.outlier_method == "quip":
        yield RowSpan(0, len(whole))
        return
    yield from iterate_spans(len(whole), whole.shape[1])
