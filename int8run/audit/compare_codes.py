"""Compare a layer in codes of 4 or 6 bits with its base: rotation, recipe, noise and its rank.

`compare_layer` calls `CodesComparison.run`. A few rows prove the rotation. Then all rows go by: they are
rounded by the recipes that int8run has, and compared code by code. What none of them gives is compared with
the nearest levels at the file's own scales, which any good quantizer chooses.
"""

import torch
from torch import Tensor

from int8run.audit.grades import Limits
from int8run.audit.layer_audit import LayerAudit
from int8run.audit.layer_source import LayerSource
from int8run.audit.residue import ResidueSums
from int8run.audit.rounding_check import ABSMAX, MSE, NEAREST
from int8run.audit.stored_numbers import RowSpan, iterate_spans, list_probes
from int8run.audit.transforms import TransformMatch, match_transform
from int8run.checkpoints.grouped import CODEBOOK
from int8run.kernels.grouped_weight.reference import compute_levels, unpack_codes
from int8run.quant.codebook import choose_codebook, find_sample_step
from int8run.quant.grouped_rounding import (
    MAKERS_SEARCH,
    WIDE_SEARCH,
    GroupedRows,
    Levels,
    assign_codes,
    get_even_levels,
    round_rows,
)
from int8run.quant.grouped_weight import GROUPED_BITS, GroupedWeight


class CodesComparison:
    """A layer in codes of 4 or 6 bits.

    Args:
        source: the layer and its base.
        limits: from where on a weight is another.
    """

    def __init__(self, source: LayerSource, limits: Limits):
        self.source = source
        self.limits = limits
        self.layer = source.layer
        self.bits = GROUPED_BITS[self.layer.storage_dtype]
        self.sums = ResidueSums(self.layer.columns, limits.max_row_gain_error)
        # recipes that gave all rows so far, and how many neighbors of a scale they try
        self.recipes = {ABSMAX: MAKERS_SEARCH[self.bits], MSE: WIDE_SEARCH}
        self.differing = self.total = 0  # codes that are not the nearest at the file's scales, of all

    def run(self, audit: LayerAudit) -> None:
        """Read all of the layer, and fill in what is found."""
        match = self.prove_rotation()
        audit.found_rotation = match.label
        audit.is_proven = match.correlation >= self.limits.min_correlation
        if not audit.is_proven:
            self.recipes = {}
        for span in iterate_spans(self.layer.rows, self.layer.columns):
            stored = self.read_stored(span)
            self.compare_rows(stored, self.read_reference(span, match))
        audit.take_residue(self.sums.compute())
        if audit.is_proven:
            self.name_recipe(audit, match)

    def prove_rotation(self) -> TransformMatch:
        """The transform of the layer, by a few of its rows."""
        probes = list_probes(self.layer.rows)
        stored = torch.cat([self.read_stored(span).dequantize() for span in probes])
        reference = torch.cat([self.source.base.read_rows(span.start, span.stop).float() for span in probes])
        declared = self.layer.read_transform(self.source.files)
        return match_transform(stored, reference, self.layer, declared)

    def read_stored(self, span: RowSpan) -> GroupedWeight:
        """Some rows of the file."""
        rows = self.layer.read_grouped_weight(self.source.files, span.rows)
        self.source.files.drop_from_page_cache(self.layer.key, span.rows)
        return rows

    def read_reference(self, span: RowSpan, match: TransformMatch) -> Tensor:
        """The same rows of the base under the transform, float32 [n, K]."""
        rows = self.source.base.read_rows(span.start, span.stop)
        return match.transform.transform_rows(rows)

    def compare_rows(self, stored: GroupedWeight, reference: Tensor) -> None:
        """Compare some rows.

        Args:
            stored: of the file.
            reference: of the base under the transform, float32 [n, K].
        """
        levels = get_levels(stored)
        groups = reference.unflatten(1, (-1, stored.group_size))  # [n, groups, g]
        shifted = groups
        if stored.correction is not None:
            shifted = groups - stored.correction.float().T.unsqueeze(-1)
        self.recipes = {
            name: neighbors
            for name, neighbors in self.recipes.items()
            if are_equal(stored, round_rows(groups, levels, neighbors))
        }
        nearest = assign_codes(shifted, stored.group_scale, stored.scale, levels)
        codes = unpack_codes(stored.codes, stored.bits)
        self.differing += int((codes != nearest.codes).sum())
        self.total += codes.numel()
        expected = (nearest.error * stored.scale.square()).sum(dtype=torch.float64)
        self.sums.add(stored.dequantize(), reference, float(expected))

    def name_recipe(self, audit: LayerAudit, match: TransformMatch) -> None:
        """Say what gives these codes."""
        audit.differing = self.differing
        if self.recipes and self.is_codebook_chosen(match):
            name = next(iter(self.recipes))
            audit.recipe = f"{match.transform.label}, {name} by {audit.granularity}"
            audit.is_reproduced = True
        elif self.differing <= self.limits.max_tie_share * self.total:
            audit.recipe = f"{match.transform.label}, {NEAREST}"

    def is_codebook_chosen(self, match: TransformMatch) -> bool:
        """Whether the levels of the file are those that int8run chooses for the base."""
        if CODEBOOK not in self.layer.part_keys:
            return self.bits != min(GROUPED_BITS.values())
        step = find_sample_step((self.layer.rows, self.layer.columns))
        rows = [self.read_reference(RowSpan(row, row + 1), match) for row in range(0, self.layer.rows, step)]
        chosen = choose_codebook(torch.cat(rows), self.layer.block_size)
        stored = self.read_stored(RowSpan(0, 1)).codebook
        return stored is not None and torch.equal(chosen, stored)


def get_levels(stored: GroupedWeight) -> Levels:
    """The levels of a file's codes; of 6 bits the first code is not used."""
    if stored.bits == 6:
        return get_even_levels(stored.scale.device)
    values = compute_levels(stored.bits, stored.codebook)
    return Levels(values, stored.codebook, first_code=0, unit=1.0)


def are_equal(stored: GroupedWeight, made: GroupedRows) -> bool:
    """Whether rows of a file are what a recipe gives, to the bit."""
    if stored.correction is not None or stored.group_scale.dtype != made.group_scale.dtype:
        return False
    same_scales = torch.equal(stored.group_scale.view(torch.uint8), made.group_scale.view(torch.uint8))
    if not same_scales or not torch.equal(stored.scale, made.scale):
        return False
    return torch.equal(unpack_codes(stored.codes, stored.bits), made.codes)
