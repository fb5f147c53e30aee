"""OFT and BOFT in numpy and float64, as the merges of LyCORIS, kohya and PEFT make them.

A part of `lora_oracle`. LyCORIS and kohya turn the rows of a weight, PEFT its columns. Whole matrices are
multiplied, which is slow and leaves no room for an order of rows that is only nearly right.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fuzzing.reading import Broken, Reading
from text_encoders.oracle_file import Array

LYCORIS = ("oft_blocks", "rescale")
KOHYA = tuple(f"kohya_blocks_{i}" for i in range(4))
PEFT = ("oft_R", "boft_R", "boft_s")
PARTS = {*LYCORIS, *KOHYA, *PEFT}
OTHER_SIDE = 5  # of a weight whose other side a rotation says nothing about
FIRST_VERSION = (0, 18)  # of PEFT, whose series is the one below
DEFAULT_EPS, DEFAULT_TERMS = 6e-5, 5


def read_rotation(
    parts: Mapping[str, Array], alpha: Array | None, settings: Sequence[Mapping[str, Any]]
) -> Reading:
    """What the tensors of a module do to its weight.

    Args:
        parts: by name.
        alpha: of the module.
        settings: PEFT's, of each place that has some.
    """
    programs = [names for names in (LYCORIS, KOHYA, PEFT) if parts.keys() & set(names)]
    if len(programs) != 1:
        raise Broken("parts of several programs")
    if programs[0] is KOHYA:
        return read_kohya(parts, alpha)
    if programs[0] is LYCORIS:
        return read_lycoris(parts, alpha)
    if "oft_R" in parts:
        if len(parts) > 1:
            raise Broken("OFT and BOFT")
        return read_peft_oft(parts["oft_R"], join_settings(settings))
    return read_peft_boft(parts)


def check_blocks(blocks: Array, dimensions: Sequence[int]) -> None:
    """Refuse what are no square blocks."""
    if blocks.ndim not in dimensions or blocks.shape[-1] != blocks.shape[-2]:
        raise Broken("no square blocks")


def to_number(alpha: Array | None) -> float:
    """An alpha, which bounds a rotation; 0 without one."""
    if alpha is None:
        return 0.0
    if alpha.size != 1:
        raise Broken("alpha is not one number")
    return float(alpha.item())


def cayley(skew: Array) -> Array:
    """(I + Q) (I - Q)⁻¹ of one matrix."""
    identity = np.eye(len(skew))
    return np.asarray((identity + skew) @ np.linalg.inv(identity - skew))


def make_diagonal(blocks: Sequence[Array]) -> Array:
    """One matrix with these on its diagonal."""
    size = sum(map(len, blocks))
    matrix, start = np.zeros((size, size)), 0
    for block in blocks:
        end = start + len(block)
        matrix[start:end, start:end] = block
        start = end
    return matrix


def permute(order: Sequence[int]) -> Array:
    """The matrix P with (P x)[i] = x[order[i]]."""
    matrix = np.zeros((len(order), len(order)))
    for row, column in enumerate(order):
        matrix[row, column] = 1
    return matrix


def turn_rows(matrix: Array, rescale: Array | None = None) -> Reading:
    """W -> the rows of `matrix W`, each by its factor."""

    def change(weight: Array) -> Array:
        turned = matrix @ weight.reshape(len(weight), -1)
        if rescale is not None:
            turned = rescale.reshape(-1, 1) * turned
        return np.asarray(turned.reshape(weight.shape) - weight)

    return Reading((len(matrix), OTHER_SIDE), change)


def turn_columns(matrix: Array, factors: Array | None = None) -> Reading:
    """W -> `(matrix Wᵀ)ᵀ`, each row by its factor."""

    def change(weight: Array) -> Array:
        turned = (matrix @ weight.reshape(len(weight), -1).T).T
        if factors is not None:
            turned = factors.reshape(-1, 1) * turned
        return np.asarray(turned.reshape(weight.shape) - weight)

    return Reading((OTHER_SIDE if factors is None else factors.size, len(matrix)), change)


# rows


def read_lycoris(parts: Mapping[str, Array], alpha: Array | None) -> Reading:
    """Diag-OFT [D, b, b] or BOFT [m, D, b, b]: all blocks together are bounded."""
    if "oft_blocks" not in parts:
        raise Broken("factors of nothing")
    blocks = parts["oft_blocks"]
    check_blocks(blocks, (3, 4))
    size, num_rows = blocks.shape[-1], blocks.shape[-1] * blocks.shape[-3]
    rescale = parts.get("rescale")
    if rescale is not None and rescale.size != num_rows:
        raise Broken("factors of other rows")
    skew = blocks - blocks.swapaxes(-1, -2)
    bound, norm = to_number(alpha) * num_rows, math.sqrt((skew**2).sum())
    if bound > 0 and norm > bound:
        skew = skew * bound / norm
    if blocks.ndim == 3:
        # LyCORIS sums over the first index of a rotation: its transpose is multiplied
        return turn_rows(make_diagonal([cayley(block).T for block in skew]), rescale)
    matrix = np.eye(num_rows)
    for stage, stage_blocks in enumerate(skew):
        # "(c g k) -> (c k g)" with g = 2, then blocks of b rows, then back
        distance = 2**stage * (size // 2)
        if size % 2 or num_rows % (2 * distance):
            raise Broken("a stage that does not fit")
        order = []
        for start in range(0, num_rows, 2 * distance):
            for row in range(start, start + distance):
                order += [row, row + distance]
        sort = permute(order)
        matrix = sort.T @ make_diagonal([cayley(block) for block in stage_blocks]) @ sort @ matrix
    return turn_rows(matrix, rescale)


def read_kohya(parts: Mapping[str, Array], alpha: Array | None) -> Reading:
    """One part for each piece of the rows, each bounded alone."""
    given = [name for name in KOHYA if name in parts]
    if given != list(KOHYA[: len(given)]):
        raise Broken("a piece is missing")
    if alpha is None:
        raise Broken("without its bound")
    diagonal = []
    for name in given:
        blocks = parts[name]
        check_blocks(blocks, (3,))
        skew = blocks - blocks.swapaxes(-1, -2)
        bound = to_number(alpha) * blocks.shape[0] * blocks.shape[-1]
        norm = math.sqrt((skew**2).sum())
        skew = skew * ((min(norm, bound) + 1e-8) / (norm + 1e-8))
        diagonal += [cayley(block).T for block in skew]
    return turn_rows(make_diagonal(diagonal))


# columns


def join_settings(places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of all places."""
    names = ("use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps", "block_share", "peft_version")
    joined: dict[str, Any] = {}
    for settings in places:
        for name in names:
            if name in settings and joined.setdefault(name, settings[name]) != settings[name]:
                raise Broken("places disagree about the rotation")
    return joined


def read_setting(settings: Mapping[str, Any], name: str, default: float) -> float:
    """A number of the settings."""
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Broken(f"{name} is {value!r}")
    return float(value)


def read_peft_oft(triangles: Array, settings: Mapping[str, Any]) -> Reading:
    """[D, b (b - 1) / 2]: the upper triangles of skew-symmetric blocks."""
    if "use_cayley_neumann" not in settings:
        raise Broken("which transform is not said")
    if triangles.ndim != 2:
        raise Broken("no triangles")
    sizes = [size for size in range(2, 200) if size * (size - 1) // 2 == triangles.shape[1]]
    if not sizes:
        raise Broken("no triangles")
    blocks = [unpack(row, sizes[0]) for row in triangles]
    if settings.get("coft"):
        bound = read_setting(settings, "eps", DEFAULT_EPS) / math.sqrt(len(blocks))
        blocks = [bound_block(block, bound) for block in blocks]
    if settings["use_cayley_neumann"]:
        version = re.match(r"(\d+)\.(\d+)", str(settings.get("peft_version")))
        if version is None or (int(version[1]), int(version[2])) < FIRST_VERSION:
            raise Broken("another series")
        terms = int(read_setting(settings, "num_cayley_neumann_terms", DEFAULT_TERMS))
        turned = [sum_series(block, terms) for block in blocks]
    else:
        # PEFT solves for the other side than its series
        turned = [cayley(-block) for block in blocks]
    if settings.get("block_share") and len(turned) == 1:
        turned = 2 * turned
    return turn_columns(make_diagonal(turned))


def unpack(numbers: Array, size: int) -> Array:
    """The numbers above the diagonal, row by row; their negatives below it."""
    block, rest = np.zeros((size, size)), list(numbers)
    for row in range(size):
        for column in range(row + 1, size):
            block[row, column] = rest.pop(0)
            block[column, row] = -block[row, column]
    return block


def bound_block(block: Array, bound: float) -> Array:
    """A block whose norm is at most this."""
    norm = math.sqrt((block**2).sum())
    return block if norm <= bound else block * bound / norm


def sum_series(block: Array, num_terms: int) -> Array:
    """PEFT's loop: I + 2 Q + 2 Q² + ... + Qⁿ⁻¹; with three terms it adds Q³ as well."""
    if not 1 <= num_terms <= 100:
        raise Broken("a number of terms")
    total = np.eye(len(block))
    if num_terms > 1:
        total = total + 2 * block
    if num_terms > 2:
        power = block @ block
        total = total + 2 * power
        for _ in range(3, num_terms - 1):
            power = power @ block
            total = total + 2 * power
        total = total + power @ block
    return total


def read_peft_boft(parts: Mapping[str, Array]) -> Reading:
    """[m, D, b, b]: a butterfly of m stages, and a factor for each row."""
    if not {"boft_R", "boft_s"} <= parts.keys():
        raise Broken("half of a BOFT")
    blocks = parts["boft_R"]
    check_blocks(blocks, (4,))
    num_stages, num_blocks, size, _ = blocks.shape
    num_columns = num_blocks * size
    matrix = np.eye(num_columns)
    for stage in range(num_stages):
        turned = []
        for block in blocks[stage]:
            turned.append(cayley(-0.5 * (block - block.T)))
        order = list(range(num_columns))
        if num_stages > 1:
            order = sort_half_blocks(num_columns, size, stage)
        sort = permute(order)
        matrix = sort @ make_diagonal(turned) @ sort.T @ matrix
    return turn_columns(matrix, parts["boft_s"].reshape(-1))


def sort_half_blocks(num_columns: int, size: int, stage: int) -> list[int]:
    """PEFT's permutation: in each group of half blocks those at even places, then those at odd ones."""
    group = size * 2**stage
    if size % 2 or num_columns % group:
        raise Broken("a stage that does not fit")
    half = size // 2
    order = []
    for start in range(0, num_columns, group):
        places = [*range(0, group // half, 2), *range(1, group // half, 2)]
        for place in places:
            first = start + place * half
            order += range(first, first + half)
    return order
