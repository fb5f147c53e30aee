"""Files in codes of 4 and 6 bits: recipes to the bit, rotations, and what was changed before rounding."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from audit.audit_files import NAMES, make_base
from audit.conftest import Audit
from audit.test_audit_file import add_lora, list_codes
from torch import Tensor

from int8run.checkpoints.comfy_grouped import collect_grouped_tensors
from int8run.outlier.convrot import ConvRot
from int8run.quant.grouped_rounding import GroupLayout
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.rounding import AbsMax, Mse, RoundsGroups

Change = Callable[[GroupedWeight], GroupedWeight]


def keep(weight: GroupedWeight) -> GroupedWeight:
    return weight


def make_codes(
    base: dict[str, Tensor],
    bits: int = 4,
    *,
    rounding: RoundsGroups | None = None,
    rotation: int = 64,
    named_rotation: int = 0,
    change: Change = keep,
) -> dict[str, Tensor]:
    """A file of every weight of a base.

    Args:
        base: tensors.
        bits: of a code.
        rounding: of the weights; None: absmax.
        rotation: group size, of the numbers.
        named_rotation: the same as the markers have it; 0: that of the numbers.
        change: what happens to each weight at the end.
    """
    tensors = dict(base)
    for name in NAMES:
        transform = ConvRot(rotation).fit(base[f"{name}.weight"])
        rotated = transform.transform_rows(base[f"{name}.weight"])
        weight = change((rounding or AbsMax()).round_groups(rotated, None, GroupLayout(bits)))
        named = ConvRot(named_rotation or rotation).fit(base[f"{name}.weight"])
        for key, data in collect_grouped_tensors(f"{name}.weight", weight, named).items():
            is_marker = isinstance(data, bytes)
            tensors[key] = torch.tensor(list(data), dtype=torch.uint8) if is_marker else data  # type: ignore[arg-type]
    return tensors


def move_codes(weight: GroupedWeight, every: int) -> GroupedWeight:
    """One of so many codes is the one beside it."""
    codes = weight.codes.clone()
    codes.view(torch.uint8).flatten()[::every] ^= 1
    return replace(weight, codes=codes)


@pytest.mark.parametrize(("bits", "sqnr"), [(4, (21, 25)), (6, (32, 36))])
@pytest.mark.parametrize("rounding", [AbsMax(), Mse()], ids=lambda rounding: rounding.name)
def test_a_recipe_is_reproduced_and_its_rotation_proven(
    audit: Audit, bits: int, sqnr: tuple[float, float], rounding: RoundsGroups
) -> None:
    base = make_base()

    found = audit(make_codes(base, bits, rounding=rounding), base)

    least, most = sqnr
    assert (found.grade, found.findings) == ("A", [])
    assert {layer.found_rotation for layer in found.layers} == {"regular 64"}
    assert {layer.granularity for layer in found.layers} == {"group 16"}
    assert {layer.storage_dtype for layer in found.layers} == {f"w{bits}a8"}
    assert all(least < (layer.sqnr_db or 0) < most for layer in found.layers)
    assert list(found.count_recipes()) == [f"convrot group_size=64, {rounding.name} by group 16"]  # type: ignore[attr-defined]


def test_nearest_levels_at_other_scales_are_sound(audit: Audit) -> None:
    base = make_base()
    # of each layer one code is not the nearest, as where a tie is broken otherwise
    found = audit(make_codes(base, change=partial(move_codes, every=10**6)), base)

    assert found.grade == "B" and not found.findings
    assert {layer.differing for layer in found.layers} == {1}
    assert {layer.recipe for layer in found.layers} == {"convrot group_size=64, nearest at its own scales"}
    assert all(abs(layer.excess_db or 0) < 0.1 for layer in found.layers)


def test_scales_in_float32_are_no_recipe_of_int8run(audit: Audit) -> None:
    base = make_base()

    def widen(weight: GroupedWeight) -> GroupedWeight:
        return replace(weight, group_scale=weight.group_scale.float())

    found = audit(make_codes(base, change=widen), base)

    assert found.grade == "B" and not found.findings
    assert {layer.recipe for layer in found.layers} == {"convrot group_size=64, nearest at its own scales"}


def test_other_codes_are_noise_that_is_measured(audit: Audit) -> None:
    base = make_base()

    found = audit(make_codes(base, change=partial(move_codes, every=3)), base)

    assert all(
        layer.differing == layer.shape[0] * 128 // 3 + 1 - (layer.shape[0] * 128 % 3 == 0)
        for layer in found.layers
    )
    assert all((layer.excess_db or 0) > 1 for layer in found.layers)


def test_a_marker_with_another_rotation_is_found(audit: Audit) -> None:
    base = make_base()

    found = audit(make_codes(base, rotation=16, named_rotation=64), base)

    assert "wrong_rotation" in list_codes(found)
    assert {layer.found_rotation for layer in found.layers} == {"regular 16"}


def test_a_baked_lora_is_found_below_the_noise_of_four_bits(audit: Audit) -> None:
    base = make_base()
    changed = {
        key: add_lora(value, strength=0.2) if value.dim() == 2 else value for key, value in base.items()
    }

    found = audit(make_codes(changed), base)

    assert "low_rank_change" in list_codes(found)


def test_another_model_is_found(audit: Audit) -> None:
    found = audit(make_codes(make_base(seed=1)), make_base())

    assert "other_model" in list_codes(found)


def test_scales_that_are_off_are_found(audit: Audit) -> None:
    base = make_base()

    found = audit(make_codes(base, change=lambda weight: replace(weight, scale=weight.scale * 1.5)), base)

    assert "wrong_scale" in list_codes(found)


def test_without_a_base_a_rotation_is_not_doubted(audit: Audit) -> None:
    found = audit(make_codes(make_base()))

    assert found.grade == "U" and not found.findings
