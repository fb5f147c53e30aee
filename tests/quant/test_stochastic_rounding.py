"""Adding a change to integers with random rounding: unbiased, seeded, nothing clipped, nothing lost."""

import pytest
import torch
from support.helpers import randn

from int8run.quant.stochastic_rounding import add_with_stochastic_rounding, make_generator
from int8run.quant.weight import QuantizedWeight, quantize_weight

WEIGHT = quantize_weight(randn(256, 512))


def gain(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of the change that arrived: 1 is all of it."""
    return ((found * wanted).sum() / wanted.square().sum()).item()


def change(steps: float) -> torch.Tensor:
    """A low-rank change whose rms is so many steps of the grid."""
    delta = randn(256, 8, seed=1) @ randn(8, 512, seed=2)
    return delta / delta.square().mean().sqrt() * steps * WEIGHT.scale.mean()


@pytest.mark.parametrize("steps", [0.1, 0.3, 1.0, 5.0])
def test_the_whole_change_arrives_however_small_it_is(steps: float) -> None:
    wanted = change(steps)
    rounded = add_with_stochastic_rounding(WEIGHT, wanted, make_generator("a"))
    assert gain(rounded.weight.dequantize() - WEIGHT.dequantize(), wanted) == pytest.approx(1, abs=0.02)


def test_rounding_to_the_nearest_would_lose_it() -> None:
    wanted = change(0.1)
    nearest = ((WEIGHT.qdata + wanted / WEIGHT.scale).round() - WEIGHT.qdata) * WEIGHT.scale
    assert gain(nearest, wanted) < 0.1


def test_the_error_is_that_of_one_random_rounding() -> None:
    wanted = change(0.3)
    rounded = add_with_stochastic_rounding(WEIGHT, wanted, make_generator("a"))
    error = (rounded.weight.dequantize() - WEIGHT.dequantize() - wanted) / WEIGHT.scale
    assert error.square().mean().sqrt().item() < 0.41 and abs(error.mean().item()) < 0.005


def test_no_change_is_no_change() -> None:
    rounded = add_with_stochastic_rounding(WEIGHT, torch.zeros(256, 512), make_generator("a"))
    assert torch.equal(rounded.weight.qdata, WEIGHT.qdata) and torch.equal(rounded.weight.scale, WEIGHT.scale)
    assert (rounded.clipped_share, rounded.largest_growth) == (0.0, 1.0)


def test_whole_steps_are_added_exactly_and_seeds_have_no_say() -> None:
    small = QuantizedWeight(WEIGHT.qdata.clamp(-100, 100), WEIGHT.scale)
    rounded = [
        add_with_stochastic_rounding(small, 3 * small.scale.expand(256, 512), make_generator(s)).weight
        for s in "ab"
    ]
    # 3 * scale / scale may be a hair below 3
    assert all((r.qdata - small.qdata - 3).abs().float().mean() < 1e-2 for r in rounded)


def test_a_row_that_would_leave_the_range_gets_a_larger_scale_and_the_others_keep_theirs() -> None:
    wanted = torch.zeros(256, 512)
    wanted[7] = WEIGHT.dequantize()[7]  # doubles the row
    rounded = add_with_stochastic_rounding(WEIGHT, wanted, make_generator("a"))
    assert rounded.weight.scale[7] == pytest.approx(
        2 * WEIGHT.scale[7].item()
    ) and rounded.largest_growth == pytest.approx(2)
    kept = [i for i in range(256) if i != 7]
    assert torch.equal(rounded.weight.scale[kept], WEIGHT.scale[kept])
    assert gain((rounded.weight.dequantize() - WEIGHT.dequantize())[7], wanted[7]) == pytest.approx(
        1, abs=0.01
    )
    assert rounded.clipped_share == pytest.approx(
        (WEIGHT.qdata[7].abs() > 63).float().mean().item() / 256, rel=0.01
    )


def test_codes_stay_symmetric_at_both_ends() -> None:
    for sign in (1, -1):
        rounded = add_with_stochastic_rounding(
            WEIGHT, sign * 20 * WEIGHT.dequantize().abs(), make_generator("a")
        )
        assert rounded.weight.qdata.min() >= -127 and rounded.weight.qdata.max() <= 127


def test_a_row_of_zeros_takes_a_change() -> None:
    zeros = quantize_weight(torch.zeros(4, 16))
    wanted = randn(4, 16, seed=3)
    rounded = add_with_stochastic_rounding(zeros, wanted, make_generator("a"))
    assert torch.isfinite(rounded.weight.scale).all() and gain(
        rounded.weight.dequantize(), wanted
    ) == pytest.approx(1, abs=0.05)


def test_blocks_of_rows_are_of_no_consequence_for_the_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = change(3.0)
    whole = add_with_stochastic_rounding(WEIGHT, wanted, make_generator("a"))
    monkeypatch.setattr("int8run.quant.stochastic_rounding.CHUNK_ELEMENTS", 1000)
    split = add_with_stochastic_rounding(WEIGHT, wanted, make_generator("a"))
    # the generator hands out its numbers row by row
    assert torch.equal(split.weight.qdata, whole.weight.qdata) and torch.equal(
        split.weight.scale, whole.weight.scale
    )


def test_seeds_depend_on_every_word_and_their_borders() -> None:
    draws = [
        torch.rand(8, generator=make_generator(*words))
        for words in ((0, "ab"), (0, "a", "b"), (1, "ab"), (0, "ba"))
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[0], torch.rand(8, generator=make_generator(0, "ab")))
