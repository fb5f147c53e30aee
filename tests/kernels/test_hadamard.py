"""Regular and Sylvester's Hadamard matrices and the rotation of groups by them."""

import pytest
import torch
from support.helpers import randn

from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, rotate_groups, sylvester_hadamard

SIZES = [4, 16, 64, 256, 1024]
POWERS_OF_2 = [2**n for n in range(1, 11)]


@pytest.mark.parametrize("size", SIZES)
def test_regular_matrix_is_orthonormal_and_its_own_inverse(size):
    matrix = regular_hadamard(size)
    # signs over a power of two: every product is exact in float32
    assert torch.equal(matrix @ matrix, torch.eye(size))
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("size", SIZES)
def test_regular_matrix_has_one_magnitude_and_one_row_sum(size):
    matrix = regular_hadamard(size)

    assert (matrix.abs() == size**-0.5).all()
    assert (matrix.sum(0) == 1).all()
    assert (matrix.sum(1) == 1).all()


@pytest.mark.parametrize("size", [-4, 0, 1, 2, 3, 5, 8, 32, 128, 255])
def test_regular_matrix_of_another_size_raises(size):
    with pytest.raises(ValueError, match=rf"needs a power of 4, not {size}$"):
        regular_hadamard(size)


@pytest.mark.parametrize("size", POWERS_OF_2)
def test_sylvesters_matrix_is_orthonormal_and_symmetric(size):
    matrix = sylvester_hadamard(size)

    assert matrix.dtype == torch.float32
    assert matrix.shape == (size, size)
    # the root of an odd power of 2 is rounded
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), rtol=0, atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    assert (matrix.abs() == matrix[0, 0]).all()


def test_sylvesters_matrix_equals_his_construction():
    signs = sylvester_hadamard(2).sign()
    assert torch.equal(signs, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    for size in POWERS_OF_2[1:]:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        torch.testing.assert_close(sylvester_hadamard(size), signs / size**0.5)


@pytest.mark.parametrize("size", [-2, 0, 1, 3, 6, 12, 127, 384])
def test_sylvesters_matrix_of_another_size_raises(size):
    with pytest.raises(ValueError, match=rf"Sylvester's matrix needs a power of 2, not {size}$"):
        sylvester_hadamard(size)


def test_rotation_has_a_group_and_is_regular_by_default():
    assert Rotation(regular_hadamard(64)).group == 64
    assert not Rotation(regular_hadamard(64)).sylvester
    assert Rotation(sylvester_hadamard(128), sylvester=True).group == 128


@pytest.mark.parametrize(
    "matrix",
    [regular_hadamard(16), sylvester_hadamard(8), sylvester_hadamard(16)],
    ids=["regular", "8", "16"],
)
def test_groups_are_rotated_independently(matrix):
    x, size = randn(2, 3, 48), matrix.shape[0]
    y = rotate_groups(x, matrix)

    for g in range(48 // size):
        part = slice(size * g, size * (g + 1))
        torch.testing.assert_close(y[..., part], x[..., part] @ matrix)


@pytest.mark.parametrize(
    "matrix", [regular_hadamard(16), sylvester_hadamard(16)], ids=["regular", "Sylvester"]
)
def test_rotating_twice_returns_the_input(matrix):
    x = torch.arange(-32, 32).float().reshape(2, 32)
    assert torch.equal(rotate_groups(rotate_groups(x, matrix), matrix), x)


def test_rotation_spreads_outliers_and_keeps_means_spread():
    matrix = regular_hadamard(64)
    spike, flat = torch.zeros(1, 64), torch.full((1, 64), 3.0)
    spike[0, 5] = 8

    assert (rotate_groups(spike, matrix).abs() == 1).all()
    assert torch.equal(rotate_groups(flat, matrix), flat)
    # Sylvester's matrix moves this one into a single entry
    assert rotate_groups(flat, sylvester_hadamard(64)).tolist() == [[24.0] + 63 * [0.0]]
