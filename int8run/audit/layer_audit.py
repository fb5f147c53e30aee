"""What an audit says about one layer, and what of it is a finding.

`stored_numbers` and `compare_layer` fill a `LayerAudit`; `judge_layer` looks at it with the limits of
`grades.yaml`.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from int8run.audit.grades import Limits
from int8run.audit.residue import Residue
from int8run.checkpoints.layer import FLOAT


@dataclass(kw_only=True)
class LayerAudit:
    """One weight of a file.

    Args:
        name: the weight's key without `.weight`.
        shape: of the weight, N and K, or that of a convolution.
        storage_dtype: float, int8, fp8, mxfp8, nvfp4, w4a8 or w6a8.
        label: how the file stores it, in words.
        granularity: which numbers share a scale; empty: no scale.
        declared_rotation: that the file says, in words; empty: of a float layer, which says nothing.
        found_rotation: that its numbers prove, or without a base suggest; empty: neither.
        saturated_share: of its numbers, at the end of the range.
        cut_off_share: of its numbers, at the end of the range beside the largest one of their scale.
        unused_share: of its scales, whose numbers all stay below half of the range.
        scale_spread: largest scale over the median one.
        is_compared: whether the base has it, in the same shape.
        is_proven: whether its numbers are the base's, under `found_rotation`.
        sqnr_db: against the base.
        excess_db: of its noise over that of the nearest numbers.
        correlation: with the base.
        gain: factor between its numbers and the base's.
        wrong_rows: rows with a factor of their own.
        recipe: that gives its numbers; empty: none that is known.
        is_reproduced: whether the recipe gives them to the bit.
        differing: stored numbers that are not the recipe's.
        rank: directions of its difference that stand out of noise.
        has_all_directions: whether there are no more of them than were looked for.
        low_rank_share: of the difference, that they hold.
        rule: why the family's rules keep it float, `layer_findings.QUANTIZED` where they do not; empty: not
            known.
        codes: of findings about it.
    """

    name: str
    shape: tuple[int, ...]
    storage_dtype: str
    label: str
    granularity: str = ""
    declared_rotation: str = ""
    found_rotation: str = ""
    saturated_share: float | None = None
    cut_off_share: float | None = None
    unused_share: float | None = None
    scale_spread: float | None = None
    is_compared: bool = False
    is_proven: bool = False
    sqnr_db: float | None = None
    excess_db: float | None = None
    correlation: float | None = None
    gain: float | None = None
    wrong_rows: int = 0
    recipe: str = ""
    is_reproduced: bool = False
    differing: int | None = None
    rank: int | None = None
    has_all_directions: bool = True
    low_rank_share: float | None = None
    rule: str = ""
    codes: list[str] = field(default_factory=list)

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored in few bits."""
        return self.storage_dtype != FLOAT

    def take_residue(self, residue: Residue) -> None:
        """Fill in what was measured against the base."""
        self.sqnr_db = residue.sqnr_db
        self.excess_db = residue.excess_db
        self.correlation = residue.correlation
        self.gain = residue.gain
        self.wrong_rows = residue.wrong_rows
        self.rank = residue.low_rank.rank
        self.has_all_directions = residue.low_rank.is_complete
        self.low_rank_share = residue.low_rank.share

    def to_json(self) -> dict[str, Any]:
        """All of it, as audit.json has it."""
        return asdict(self)


def judge_layer(layer: LayerAudit, limits: Limits) -> list[str]:
    """What is wrong with a quantized layer, by code; of what follows from another thing the cause alone.

    Args:
        layer: what was found.
        limits: from where on something is wrong.
    """
    codes = judge_numbers(layer, limits)
    # equal numbers may be the largest by right: a recipe that is given to the bit has cut nothing off
    is_cut_off = is_above(layer.cut_off_share, limits.max_cut_off_share) and not layer.is_reproduced
    if is_cut_off and layer.storage_dtype == "int8":
        codes.append("saturated")
    if is_above(layer.unused_share, limits.max_unused_share):
        codes.append("unused_range")
    return codes


def judge_numbers(layer: LayerAudit, limits: Limits) -> list[str]:
    """The same of what a comparison with the base shows, or the tails of the numbers without one."""
    if not layer.is_compared:
        is_suspect = layer.found_rotation not in ("", layer.declared_rotation)
        return ["looks_otherwise_rotated"] if is_suspect else []
    if not layer.is_proven:
        return ["other_weight"]
    if layer.found_rotation != layer.declared_rotation:
        return ["wrong_rotation"]
    if layer.is_reproduced:
        return judge_exactness(layer, limits)
    if has_wrong_factor(layer, limits):
        return ["wrong_scale"]
    if layer.rank and layer.has_all_directions and is_above(layer.low_rank_share, limits.min_low_rank_share):
        return ["low_rank_change"]
    if is_above(layer.excess_db, limits.max_excess_db):
        return ["changed_weight"]
    return judge_exactness(layer, limits)


def has_wrong_factor(layer: LayerAudit, limits: Limits) -> bool:
    """Whether a factor, of the whole weight or of some rows, explains the difference from the base.

    A weight that was changed otherwise may have a factor, too, but is not exact when that is taken out.
    """
    assert layer.gain is not None
    assert layer.correlation is not None
    if layer.wrong_rows:
        return True
    if abs(layer.gain - 1) <= limits.max_gain_error:
        return False
    agreement = layer.correlation**2
    least = 10 ** (limits.min_sqnr_db.get(layer.storage_dtype, 0.0) / 10)
    return agreement > least * (1 - agreement)


def judge_exactness(layer: LayerAudit, limits: Limits) -> list[str]:
    """Whether a weight of the base is less exact than its format should be."""
    least = limits.min_sqnr_db.get(layer.storage_dtype)
    is_low = least is not None and layer.sqnr_db is not None and layer.sqnr_db < least
    return ["low_sqnr"] if is_low else []


def is_above(value: float | None, limit: float) -> bool:
    """Whether a number is known and above a limit."""
    return value is not None and value > limit
