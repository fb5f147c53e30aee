"""Adding a change to integers with random rounding: unbiased, seeded, nothing clipped, nothing lost."""

import pytest
import torch
from support.helpers import randn

from int8run.quant.grouped_rounding import GroupLayout
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.rounding import AbsMax
from int8run.quant.stochastic_rounding import add_change, add_with_stochastic_rounding, make_generator
from int8run.quant.weight import QuantizedWeight, quantize_weight

WEIGHT = quantize_weight(randn(256, 512))


def compute_kept_share(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the change that arrived: 1 is all of it."""
    return ((found * expected).sum() / expected.square().sum()).item()


def make_change(steps: float) -> torch.Tensor:
    """A low-rank change whose rms is so many steps of the grid."""
    delta = randn(256, 8, seed=1) @ randn(8, 512, seed=2)
    return delta / delta.square().mean().sqrt() * steps * WEIGHT.scale.mean()


@pytest.mark.parametrize("steps", [0.1, 0.3, 1.0, 5.0])
def test_change_is_kept_however_small_it_is(steps: float) -> None:
    expected = make_change(steps)
    rounded = add_with_stochastic_rounding(WEIGHT, expected, make_generator("a"))

    assert compute_kept_share(rounded.weight.dequantize() - WEIGHT.dequantize(), expected) == pytest.approx(
        1, abs=0.02
    )


def test_nearest_rounding_loses_a_small_change() -> None:
    expected = make_change(0.1)
    nearest = ((WEIGHT.qdata + expected / WEIGHT.scale).round() - WEIGHT.qdata) * WEIGHT.scale

    assert compute_kept_share(nearest, expected) < 0.1


def test_error_is_that_of_one_random_rounding() -> None:
    expected = make_change(0.3)
    rounded = add_with_stochastic_rounding(WEIGHT, expected, make_generator("a"))
    error = (rounded.weight.dequantize() - WEIGHT.dequantize() - expected) / WEIGHT.scale

    assert error.square().mean().sqrt().item() < 0.41
    assert abs(error.mean().item()) < 0.005


def test_zero_change_leaves_the_weight_unchanged() -> None:
    rounded = add_with_stochastic_rounding(WEIGHT, torch.zeros(256, 512), make_generator("a"))

    assert torch.equal(rounded.weight.qdata, WEIGHT.qdata)
    assert torch.equal(rounded.weight.scale, WEIGHT.scale)
    assert (rounded.clipped_share, rounded.largest_growth) == (0.0, 1.0)


def test_whole_steps_are_added_exactly_for_any_seed() -> None:
    small = QuantizedWeight(WEIGHT.qdata.clamp(-100, 100), WEIGHT.scale)
    rounded = [
        add_with_stochastic_rounding(small, 3 * small.scale.expand(256, 512), make_generator(s)).weight
        for s in "ab"
    ]

    # 3 * scale / scale may be a hair below 3
    assert all((r.qdata - small.qdata - 3).abs().float().mean() < 1e-2 for r in rounded)


def test_scale_grows_only_for_rows_beyond_the_range() -> None:
    expected = torch.zeros(256, 512)
    expected[7] = WEIGHT.dequantize()[7]  # doubles the row
    rounded = add_with_stochastic_rounding(WEIGHT, expected, make_generator("a"))

    assert rounded.weight.scale[7] == pytest.approx(2 * WEIGHT.scale[7].item())
    assert rounded.largest_growth == pytest.approx(2)

    kept = [i for i in range(256) if i != 7]

    assert torch.equal(rounded.weight.scale[kept], WEIGHT.scale[kept])
    assert compute_kept_share(
        (rounded.weight.dequantize() - WEIGHT.dequantize())[7], expected[7]
    ) == pytest.approx(1, abs=0.01)
    assert rounded.clipped_share == pytest.approx(
        (WEIGHT.qdata[7].abs() > 63).float().mean().item() / 256, rel=0.01
    )


def test_qdata_stays_in_the_symmetric_range() -> None:
    for sign in (1, -1):
        rounded = add_with_stochastic_rounding(
            WEIGHT, sign * 20 * WEIGHT.dequantize().abs(), make_generator("a")
        )
        assert rounded.weight.qdata.min() >= -127
        assert rounded.weight.qdata.max() <= 127


def test_row_of_zeros_accepts_a_change() -> None:
    zeros = quantize_weight(torch.zeros(4, 16))
    expected = randn(4, 16, seed=3)
    rounded = add_with_stochastic_rounding(zeros, expected, make_generator("a"))

    assert torch.isfinite(rounded.weight.scale).all()
    assert compute_kept_share(rounded.weight.dequantize(), expected) == pytest.approx(1, abs=0.05)


def test_result_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_change(3.0)
    whole = add_with_stochastic_rounding(WEIGHT, expected, make_generator("a"))
    monkeypatch.setattr("int8run.quant.stochastic_rounding.CHUNK_ELEMENTS", 1000)
    split = add_with_stochastic_rounding(WEIGHT, expected, make_generator("a"))

    # the generator hands out its numbers row by row
    assert torch.equal(split.weight.qdata, whole.weight.qdata)
    assert torch.equal(split.weight.scale, whole.weight.scale)


def test_generators_differ_by_every_word_and_their_borders() -> None:
    draws = [
        torch.rand(8, generator=make_generator(*words))
        for words in ((0, "ab"), (0, "a", "b"), (1, "ab"), (0, "ba"))
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[0], torch.rand(8, generator=make_generator(0, "ab")))


# -- weights of 4 and 6 bits ---------------------------------------------------------------------------------


@pytest.fixture(params=[4, 6], name="grouped")
def make_grouped_weight(request: pytest.FixtureRequest) -> GroupedWeight:
    return AbsMax().round_groups(randn(256, 512), None, GroupLayout(request.param))


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_a_change_of_few_bits_is_kept_however_small_it_is(grouped: GroupedWeight, share: float) -> None:
    delta = randn(256, 8, seed=1) @ randn(8, 512, seed=2)
    expected = delta / delta.std() * share
    rounded = add_change(grouped, expected, make_generator("a"))

    assert isinstance(rounded.weight, GroupedWeight)
    assert rounded.weight.group_scale.dtype == torch.float8_e4m3fn
    found = rounded.weight.dequantize() - grouped.dequantize()
    assert compute_kept_share(found, expected) == pytest.approx(1, abs=0.1 if share < 0.1 else 0.03)


def test_no_change_leaves_few_bits_as_they_are(grouped: GroupedWeight) -> None:
    rounded = add_change(grouped, torch.zeros(256, 512), make_generator("a"))

    assert torch.equal(rounded.weight.dequantize(), grouped.dequantize())
    assert torch.equal(rounded.weight.scale, grouped.scale)
    assert (rounded.clipped_share, rounded.largest_growth) == (0.0, 1.0)


def test_scales_grow_for_groups_and_rows_that_would_be_clipped(grouped: GroupedWeight) -> None:
    change = torch.zeros(256, 512)
    change[3, 17] = 10 * grouped.dequantize()[3].abs().max()
    rounded = add_change(grouped, change, make_generator("a"))

    wanted = grouped.dequantize()[3, 17] + change[3, 17]
    assert rounded.weight.dequantize()[3, 17] == pytest.approx(wanted.item(), rel=0.12)
    assert rounded.clipped_share == pytest.approx(1 / change.numel())
    assert rounded.largest_growth > 5
    others = [row for row in range(256) if row != 3]
    assert torch.equal(rounded.weight.dequantize()[others], grouped.dequantize()[others])
