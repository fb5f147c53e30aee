"""Regular Hadamard matrices and the rotation of groups by them."""

import pytest
import torch
from helpers import randn

from int8run.kernels.hadamard.reference import regular_hadamard, rotate_groups

SIZES = [4, 16, 64, 256, 1024]


@pytest.mark.parametrize("size", SIZES)
def test_orthonormal_and_its_own_inverse(size):
    matrix = regular_hadamard(size)
    # signs over a power of two: every product is exact in float32
    assert torch.equal(matrix @ matrix, torch.eye(size)) and torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("size", SIZES)
def test_entries_have_one_magnitude_and_rows_one_sum(size):
    matrix = regular_hadamard(size)
    assert (matrix.abs() == size**-0.5).all()
    assert (matrix.sum(0) == 1).all() and (matrix.sum(1) == 1).all()


@pytest.mark.parametrize("size", [-4, 0, 1, 2, 3, 5, 8, 32, 128, 255])
def test_only_powers_of_4(size):
    with pytest.raises(ValueError, match=rf"needs a power of 4, not {size}$"):
        regular_hadamard(size)


def test_each_group_is_rotated_on_its_own():
    x, matrix = randn(2, 3, 48), regular_hadamard(16)
    y = rotate_groups(x, matrix)
    for g in range(3):
        part = slice(16 * g, 16 * (g + 1))
        torch.testing.assert_close(y[..., part], x[..., part] @ matrix)


def test_rotating_twice_gives_the_input_back():
    x, matrix = torch.arange(-32, 32).float().reshape(2, 32), regular_hadamard(16)
    assert torch.equal(rotate_groups(rotate_groups(x, matrix), matrix), x)


def test_one_large_feature_is_spread_and_a_large_mean_stays_spread():
    matrix = regular_hadamard(64)
    spike, flat = torch.zeros(1, 64), torch.full((1, 64), 3.0)
    spike[0, 5] = 8
    assert (rotate_groups(spike, matrix).abs() == 1).all()
    # Sylvester's matrix would move this one into a single entry
    assert torch.equal(rotate_groups(flat, matrix), flat)
