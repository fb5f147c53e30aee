"""What is good is graded so, and each thing that is wrong with a file is named in its own words."""

import math

import pytest
import torch
from audit.audit_files import (
    COLUMNS,
    NAMES,
    encode_marker,
    make_base,
    make_int8,
    quantize_rows,
    rotate,
)
from audit.conftest import Audit

from int8run.audit import stored_numbers
from int8run.audit.file_audit import FileAudit
from int8run.audit.grades import load_grades

FIRST = NAMES[0]


def list_codes(found: FileAudit) -> list[str]:
    return [finding.code for finding in found.findings]


def add_lora(weight: torch.Tensor, rank: int = 4, strength: float = 0.05) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(len(weight), rank, generator=generator)
    down = torch.randn(rank, weight.shape[1], generator=generator)
    product = up @ down
    return weight + strength * product * weight.norm() / product.norm()


# -- good files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [0, 16, 64, 256])
def test_a_recipe_is_reproduced_to_the_bit_and_its_rotation_proven(audit: Audit, group_size: int) -> None:
    base = make_base()

    found = audit(make_int8(base, group_size), base)

    rotation = f"regular {group_size}" if group_size else "not rotated"
    assert (found.grade, found.findings) == ("A", [])
    assert {layer.found_rotation for layer in found.layers} == {rotation}
    assert found.count_recipes().total() == 6
    assert all(28 < (layer.sqnr_db or 0) < 50 for layer in found.layers)


def test_sqnr_is_that_of_the_definition(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    weight = base[f"{FIRST}.weight"].double()
    stored = tensors[f"{FIRST}.weight"].double() * tensors[f"{FIRST}.weight_scale"].double()

    found = audit(tensors, base)

    expected = 10 * math.log10(float(weight.square().sum() / (stored - weight).square().sum()))
    assert found.layers[0].sqnr_db == pytest.approx(expected, abs=1e-3)


def test_one_scale_for_a_weight_is_a_recipe_too(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    for name in NAMES:
        weight = base[f"{name}.weight"]
        scale = weight.abs().max() / 127
        tensors[f"{name}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale

    found = audit(tensors, base)

    assert {layer.recipe for layer in found.layers} == {"plain, absmax by tensor"}
    assert all(layer.is_reproduced for layer in found.layers)


def test_a_scaled_fp8_file_is_reproduced(audit: Audit) -> None:
    base = make_base()
    tensors = dict(base)
    for name in NAMES:
        weight = base[f"{name}.weight"]
        scale = weight.abs().max() / 448
        tensors[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = scale
        tensors[f"{name}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)

    found = audit(tensors, base)

    assert (found.grade, found.findings) == ("A", [])
    assert {layer.recipe for layer in found.layers} == {"float8_e4m3fn"}


def test_stochastic_rounding_is_sound_and_not_reproduced(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    generator = torch.Generator().manual_seed(5)
    for name in NAMES:
        weight, scale = base[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        noise = torch.rand(weight.shape, generator=generator)
        tensors[f"{name}.weight"] = (weight / scale + noise).floor().clamp(-127, 127).to(torch.int8)

    found = audit(tensors, base)

    assert (found.grade, found.findings) == ("B", [])
    assert found.count_recipes().total() == 0
    assert all(layer.excess_db == pytest.approx(3, abs=0.5) for layer in found.layers)


# -- files made wrong on purpose -------------------------------------------------------------------


@pytest.mark.parametrize(("true", "marked"), [(0, 256), (256, 0), (64, 256)])
def test_a_marker_that_lies_about_the_rotation(audit: Audit, true: int, marked: int) -> None:
    base = make_base()

    found = audit(make_int8(base, true, marked_group_size=marked), base)

    said = f"regular {marked}" if marked else "not rotated"
    is_really = f"regular {true}" if true else "not rotated"
    (finding,) = found.findings
    assert (found.grade, finding.code, len(finding.names)) == ("F", "wrong_rotation", 6)
    assert finding.detail == f"6 × the marker says {said}, the numbers are {is_really}"


def test_one_layer_of_another_model(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base, 64)
    other = rotate(make_base(seed=9)[f"{FIRST}.weight"], 64)
    tensors[f"{FIRST}.weight"], tensors[f"{FIRST}.weight_scale"] = quantize_rows(other)

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (found.grade, finding.code, finding.names) == ("F", "other_weight", (FIRST,))


def test_a_base_that_is_another_model(audit: Audit) -> None:
    found = audit(make_int8(make_base()), make_base(seed=9))

    assert found.grade == "F"
    assert "other_model" in list_codes(found)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_scales_that_are_off_by_a_factor(audit: Audit, factor: float) -> None:
    base = make_base()
    tensors = make_int8(base)
    tensors[f"{FIRST}.weight_scale"] *= factor

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (found.grade, finding.code, finding.names) == ("F", "wrong_scale", (FIRST,))
    assert finding.detail == f"1 × {factor:.2f} times what they should be"


def test_scales_of_some_rows_that_are_off(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    tensors[f"{FIRST}.weight_scale"][10:13] *= 2

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (finding.code, finding.detail) == ("wrong_scale", "1 × 3 of 192 rows have a factor of their own")


@pytest.mark.parametrize("group_size", [0, 256])
def test_a_lora_that_is_baked_in(audit: Audit, group_size: int) -> None:
    base = make_base()
    changed = {**base, f"{FIRST}.weight": add_lora(base[f"{FIRST}.weight"])}

    found = audit(make_int8(changed, group_size), base)

    (finding,) = found.findings
    assert (found.grade, finding.code, finding.names) == ("D", "low_rank_change", (FIRST,))
    assert finding.detail.startswith("rank 4 stands out")


def test_a_fine_tune(audit: Audit) -> None:
    base = make_base()
    generator = torch.Generator().manual_seed(6)
    changed = dict(base)
    for name in NAMES:
        weight = base[f"{name}.weight"]
        step = torch.randn(weight.shape, generator=generator)
        changed[f"{name}.weight"] = weight + 0.05 * weight.std() * step

    found = audit(make_int8(changed), base)

    assert (found.grade, list_codes(found)) == ("D", ["changed_weight"])


def test_a_norm_that_was_trained(audit: Audit) -> None:
    base = {**make_base(), "norm.weight": torch.ones(COLUMNS)}
    tensors = {**make_int8(base), "norm.weight": torch.full((COLUMNS,), 1.1)}

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (found.grade, finding.code, finding.names) == ("D", "changed_float", ("norm.weight",))


def test_biases_that_were_corrected(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    tensors[f"{FIRST}.bias"] = tensors[f"{FIRST}.bias"] * 1.5

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (found.grade, finding.code, finding.names) == ("C", "corrected_bias", (f"{FIRST}.bias",))
    assert finding.detail == "by up to 50 %: 1 × blocks.*.attn.to_q.bias"


def test_a_layer_that_is_missing(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    for key in [key for key in tensors if key.startswith(f"{FIRST}.")]:
        del tensors[key]

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (found.grade, finding.code, finding.names) == ("F", "missing_layer", (FIRST,))


def test_norms_and_biases_that_only_one_of_the_two_has(audit: Audit) -> None:
    base = {**make_base(), "norm.weight": torch.ones(COLUMNS), "rope.inv_freq": torch.ones(8)}
    tensors = make_int8(base) | {"other.scale": torch.ones(3)}
    for key in ("norm.weight", "rope.inv_freq", f"{FIRST}.bias"):
        del tensors[key]

    found = audit(tensors, base)

    missing, extra = found.findings
    assert (found.grade, missing.code, missing.out_of) == ("F", "missing_float", 8)
    assert set(missing.names) == {"norm.weight", f"{FIRST}.bias"}
    assert (extra.code, extra.names, extra.out_of) == ("extra_float", ("other.scale",), 6)


def test_layers_that_are_missing_are_counted_among_those_of_the_model(audit: Audit) -> None:
    prefix = "model.diffusion_model."
    base = {prefix + key: tensor for key, tensor in make_base().items()}
    base["vae.decoder.weight"] = torch.ones(8, 8)
    tensors = make_int8(make_base())
    for key in [key for key in tensors if key.startswith(f"{FIRST}.")]:
        del tensors[key]

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (finding.code, finding.names, finding.out_of) == ("missing_layer", (prefix + FIRST,), 6)


def test_a_mask_of_infinity_is_equal_to_itself_alone(audit: Audit) -> None:
    mask = torch.tensor([0.0, 1.0, -math.inf])
    base = {**make_base(), "mask": mask, "other_mask": mask.clone()}
    tensors = make_int8(base) | {"other_mask": torch.tensor([0.0, 1.5, -math.inf])}

    found = audit(tensors, base)

    assert found.changed_floats == {"other_mask": 0.5}


def test_a_layer_of_another_shape(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    small = base[f"{FIRST}.weight"][:100]
    tensors[f"{FIRST}.weight"], tensors[f"{FIRST}.weight_scale"] = quantize_rows(small)

    found = audit(tensors, base)

    assert "other_shape" in list_codes(found)


def test_a_label_that_the_scales_contradict(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    tensors[f"{FIRST}.comfy_quant"] = encode_marker(per_row=False)

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (found.grade, finding.code) == ("C", "wrong_label")
    assert finding.detail == "1 × labeled per_row=false, with scales by row"


def test_layers_without_markers(audit: Audit) -> None:
    base = make_base()
    tensors = {key: t for key, t in make_int8(base).items() if not key.endswith("comfy_quant")}

    found = audit(tensors, base)

    assert (found.grade, list_codes(found)) == ("C", ["no_marker"])


def test_scales_that_are_too_small_cut_numbers_off(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    weight = base[f"{FIRST}.weight"]
    scale = weight.abs().amax(1, keepdim=True) / 127 / 4
    tensors[f"{FIRST}.weight"] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    tensors[f"{FIRST}.weight_scale"] = scale

    found = audit(tensors, base)

    assert "saturated" in list_codes(found)


def test_the_largest_number_of_each_scale_is_not_cut_off(audit: Audit) -> None:
    base = make_base(columns=64)  # 1 of 64 is more than the share that is allowed
    tensors = make_int8(base)

    found = audit(tensors, base)

    assert (found.grade, found.findings) == ("A", [])
    assert min(layer.saturated_share or 0 for layer in found.layers) >= 1 / 64


def test_a_float_tensor_of_another_size(audit: Audit) -> None:
    base = make_base()
    tensors = make_int8(base)
    tensors[f"{FIRST}.bias"] = tensors[f"{FIRST}.bias"][:-1]

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (found.grade, finding.code, finding.names) == ("F", "other_shape", (f"{FIRST}.bias",))


def test_a_change_is_a_share_of_the_whole_tensor(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    base["embedding"] = torch.ones(4, 256)
    tensors = make_int8(base)
    tensors["embedding"] = base["embedding"] * torch.tensor([[2.0], [1], [1], [1]])
    monkeypatch.setattr(stored_numbers, "CHUNK_ELEMENTS", 256)  # a row at a time

    found = audit(tensors, base)

    assert found.changed_floats == {"embedding": 0.5}, "a row of four: its energy is a quarter"


@pytest.mark.parametrize(("value", "of_base"), [(math.nan, 1.0), (1.0, 0.0)])
def test_floats_that_no_share_can_measure_are_changed(audit: Audit, value: float, of_base: float) -> None:
    base = make_base()
    base["norm.bias"] = torch.full((8,), of_base)
    tensors = make_int8(base) | {"norm.bias": torch.full((8,), value)}

    found = audit(tensors, base)

    (finding,) = found.findings
    assert (finding.code, finding.names) == ("changed_float", ("norm.bias",))
    assert finding.detail == "1 from zeros, or by NaN or infinity: 1 × norm.bias"


# -- without a base --------------------------------------------------------------------------------


def test_without_a_base_a_good_file_is_unproven(audit: Audit) -> None:
    found = audit(make_int8(make_base(), 64))

    assert (found.grade, found.findings, found.has_base) == ("U", [], False)
    assert all(layer.sqnr_db is None and layer.saturated_share for layer in found.layers)


@pytest.mark.parametrize(("true", "marked"), [(0, 256), (256, 0)])
def test_without_a_base_the_tails_of_the_numbers_tell_a_wrong_marker(
    audit: Audit, true: int, marked: int
) -> None:
    found = audit(make_int8(make_base(columns=512), true, marked_group_size=marked))

    assert (found.grade, list_codes(found)) == ("F", ["looks_otherwise_rotated"])


def test_without_a_base_an_unused_range_shows(audit: Audit) -> None:
    tensors = make_int8(make_base())
    tensors[f"{FIRST}.weight"] = (tensors[f"{FIRST}.weight"] / 3).to(torch.int8)

    found = audit(tensors)

    (finding,) = found.findings
    assert (finding.code, finding.names) == ("unused_range", (FIRST,))


def test_without_a_base_nan_in_a_float_tensor_shows(audit: Audit) -> None:
    tensors = make_int8(make_base())
    tensors["norm.weight"], tensors["mask"] = torch.full((8,), math.nan), torch.full((8,), -math.inf)

    found = audit(tensors)

    (finding,) = found.findings
    assert (found.grade, finding.code, finding.names) == ("F", "not_a_number", ("norm.weight",))


# -- the table of grades ---------------------------------------------------------------------------


def test_every_finding_has_a_grade_and_words() -> None:
    table = load_grades()

    assert all(kind.grade in table.grades and kind.title and kind.advice for kind in table.findings.values())
