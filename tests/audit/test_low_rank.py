"""A low rank is found in a difference that has one, and not in the noise of rounding."""

import pytest
import torch
from audit.audit_files import quantize_rows
from torch import Tensor

from int8run.audit.grades import load_grades
from int8run.audit.low_rank import LowRank, LowRankSketch
from int8run.quant.rounding import Gptq

MIN_SHARE = load_grades().limits.min_low_rank_share


def sketch(difference: Tensor, rows_at_a_time: int = 100) -> LowRank:
    sums = LowRankSketch(difference.shape[1])
    for rows in difference.split(rows_at_a_time):
        sums.add(rows, rows.double().square().sum(1))
    return sums.find_low_rank()


def make_rounding_noise(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
    q, scale = quantize_rows(weight)
    return q * scale - weight


def make_product(rows: int, columns: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


@pytest.mark.parametrize("shape", [(64, 64), (1024, 96), (96, 1024), (700, 300)])
def test_rounding_has_no_low_rank(shape: tuple[int, int]) -> None:
    ranks = [sketch(make_rounding_noise(*shape, seed)).rank for seed in range(5)]

    assert ranks == [0] * 5


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_lora_is_found_with_its_rank_where_it_is_twice_as_strong_as_the_noise(rank: int) -> None:
    noise = make_rounding_noise(512, 384, seed=1)
    lora = make_product(512, 384, rank, seed=2)

    found = sketch(noise + 2 * lora * noise.norm() / lora.norm())

    assert found.rank == rank
    assert found.is_complete
    assert found.share == pytest.approx(0.8, abs=0.2)


def test_a_change_of_full_rank_is_no_low_one() -> None:
    found = sketch(make_product(512, 384, 300, seed=3))

    assert found.share < MIN_SHARE


def test_gptq_moves_errors_along_directions_and_is_no_lora() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(256, 128, generator=generator)
    mixing = torch.randn(128, 128, generator=generator) * torch.linspace(3, 0.01, 128)
    inputs = torch.randn(600, 128, generator=generator) @ mixing

    rounded = Gptq(damping=0.01).round_weight(weight, inputs)

    assert sketch(rounded.dequantize() - weight).share < MIN_SHARE


def test_no_difference_has_no_rank() -> None:
    assert sketch(torch.zeros(100, 64)) == LowRank()


def test_a_narrow_weight_has_nothing_that_is_low() -> None:
    assert sketch(torch.randn(100, 4)) == LowRank()
