"""OFT and BOFT from their tensors: the same two methods, in three programs' own layouts.

All of them store a square or triangle for each block and make a rotation of it by the Cayley transform
`(I + Q)(I - Q)⁻¹` of a skew-symmetric Q; they differ in sign, in what bounds Q, and in the side of the weight
that is rotated. `int8run.lora.parse` calls `build_oft`. The errors are sentences without a subject.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta
from int8run.lora.adapters.oft import OFT, RotationStage, StackedRows
from int8run.lora.key_parsing import KOHYA_OFT_PARTS, OFT_SUFFIXES, PEFT_OFT_PART, PEFT_OFT_SUFFIXES
from int8run.lora.scale import read_alpha

LYCORIS_PARTS, PEFT_PARTS = tuple(OFT_SUFFIXES.values()), tuple(PEFT_OFT_SUFFIXES.values())
OFT_PARTS = (*LYCORIS_PARTS, *KOHYA_OFT_PARTS, *PEFT_PARTS)
# of PEFT's OFTConfig
PEFT_DEFAULT_TERMS = 5
FIRST_SERIES_VERSION = [0, 18]
PEFT_DEFAULT_EPS = 6e-5


def build_oft(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LoraDelta:
    """The rotation that the tensors of one module make.

    Args:
        tensors: by part, none larger than `size_limits.LARGEST_BY_PART`.
        settings: PEFT's, for this component; empty: there are none.

    Raises:
        LoraError: when parts are missing or do not fit, or belong to several programs.
    """
    layouts = [parts for parts in (LYCORIS_PARTS, KOHYA_OFT_PARTS, PEFT_PARTS) if tensors.keys() & set(parts)]
    if len(layouts) > 1 or {PEFT_OFT_PART, "boft_R"} <= tensors.keys():
        found = ", ".join(sorted(tensors.keys() & set(OFT_PARTS)))
        raise LoraError(f"has parts of several programs' OFT: {found}; the file is broken")
    if PEFT_OFT_PART in tensors:
        return build_peft_oft(tensors[PEFT_OFT_PART].float(), settings)
    if layouts[0] == PEFT_PARTS:
        return build_peft_boft(tensors)
    if layouts[0] == KOHYA_OFT_PARTS:
        return build_kohya(tensors)
    return build_lycoris(tensors)


# -- LyCORIS and kohya: rows are rotated ---------------------------------------------------------------------


def build_lycoris(tensors: Mapping[str, Tensor]) -> OFT:
    """Diag-OFT with `oft_blocks` [D, b, b], or BOFT with [stages, D, b, b].

    A `rescale` multiplies the rows afterwards. `alpha` times the number of rows bounds the norm of all blocks
    together; 0, its default, is no bound.
    """
    if "oft_blocks" not in tensors:
        raise LoraError("has no oft_blocks; the file is incomplete")
    blocks = tensors["oft_blocks"].float()
    check_square("oft_blocks", blocks, dims=(3, 4))
    block_size = blocks.shape[-1]
    num_rows = blocks.shape[-3] * block_size
    rescale = read_rescale(tensors, num_rows)

    skew = blocks - blocks.mT
    bound = read_bound(tensors) * num_rows
    norm = skew.norm()
    if 0 < bound < norm:
        skew = skew * (bound / norm)
    rotations = cayley(skew)  # [D, b, b] or [stages, D, b, b]

    if blocks.dim() == 3:
        return OFT((RotationStage(rotations.mT),), num_rows, rescale)
    stages = []
    for i, stage_rotations in enumerate(rotations):
        order = make_butterfly(num_rows, block_size, i)
        stages.append(RotationStage(stage_rotations, order))
    return OFT(tuple(stages), num_rows, rescale, adapter_type="BOFT")


def read_rescale(tensors: Mapping[str, Tensor], num_rows: int) -> Tensor | None:
    """The factors of the rows of a LyCORIS file, [N]; None where it has none.

    Raises:
        LoraError: when there is not one for each row.
    """
    rescale = tensors.get("rescale")
    if rescale is None:
        return None
    if rescale.numel() != num_rows:
        raise LoraError(f"has {rescale.numel()} factors (rescale) for {num_rows} rows; the file is broken")
    return rescale.float().flatten()


def make_butterfly(num_rows: int, block_size: int, stage: int) -> Tensor:
    """The order in which a stage of LyCORIS's BOFT cuts the rows: neighbours at a distance that doubles.

    Raises:
        LoraError: when the rows cannot be cut that way.
    """
    distance = 2**stage * block_size // 2
    if block_size % 2 or num_rows % (2 * distance):
        raise LoraError(
            f"is a BOFT whose stage {stage + 1} does not fit {num_rows} rows in blocks of {block_size}; the "
            "file is broken"
        )
    return torch.arange(num_rows).reshape(-1, 2, distance).transpose(1, 2).flatten()


def build_kohya(tensors: Mapping[str, Tensor]) -> LoraDelta:
    """kohya's OFT: `alpha` bounds it, and parts of a fused matrix have blocks of their own."""
    given = [i for i, part in enumerate(KOHYA_OFT_PARTS) if part in tensors]
    if given != list(range(len(given))):
        missing = min(set(range(len(KOHYA_OFT_PARTS))) - set(given))
        raise LoraError(f"has no oft_blocks.{missing}; the file is incomplete")
    if "alpha" not in tensors:
        raise LoraError("is an OFT of kohya without its alpha, which bounds it; the file is incomplete")
    bound = read_bound(tensors)
    parts = [build_kohya_part(tensors[KOHYA_OFT_PARTS[i]].float(), bound) for i in given]
    if len(parts) == 1:
        return parts[0]
    return StackedRows(tuple(parts))


def build_kohya_part(blocks: Tensor, bound: float) -> OFT:
    """The OFT of some rows of a matrix, or of all.

    Args:
        blocks: [D, b, b].
        bound: times the number of rows the largest norm that all blocks together may have.
    """
    check_square("oft_blocks", blocks, dims=(3,))
    num_rows = blocks.shape[0] * blocks.shape[-1]
    skew = blocks - blocks.mT
    # squares of what a damaged file holds may be beyond float32
    norm = torch.linalg.vector_norm(skew, dtype=torch.float64).item()
    bounded_norm = min(norm, bound * num_rows)
    rotations = cayley(skew * ((bounded_norm + 1e-8) / (norm + 1e-8)))  # [D, b, b]
    return OFT((RotationStage(rotations.mT),), num_rows)


def read_bound(tensors: Mapping[str, Tensor]) -> float:
    """The `alpha` of a module, which bounds its rotation; 0 where there is none."""
    alpha = tensors.get("alpha")
    if alpha is None:
        return 0.0
    return read_alpha(alpha)


# -- PEFT: inputs are rotated --------------------------------------------------------------------------------


def build_peft_oft(triangles: Tensor, settings: Mapping[str, Any]) -> OFT:
    """PEFT's OFT, from 0.14 on.

    Args:
        triangles: the upper triangle of each block, [D, b (b - 1) / 2].
        settings: of PEFT. They say how a triangle becomes a rotation: the series that PEFT uses by default
            turns to the other side than its exact transform.
    """
    if "use_cayley_neumann" not in settings:
        raise LoraError(
            "is an OFT of PEFT, and use_cayley_neumann, which says to which side it turns, stands nowhere; "
            "put adapter_config.json beside the file"
        )
    skew = unpack_triangles(triangles)  # [D, b, b]
    num_blocks, block_size, _ = skew.shape
    if settings.get("coft"):
        skew = bound_blocks(skew, read_number(settings, "eps", PEFT_DEFAULT_EPS) / math.sqrt(num_blocks))
    if settings["use_cayley_neumann"]:
        check_series_version(settings)
        terms = int(read_number(settings, "num_cayley_neumann_terms", PEFT_DEFAULT_TERMS))
        rotations = sum_neumann_series(skew, terms)
    else:
        rotations = cayley(-skew)
    is_shared = bool(settings.get("block_share")) and num_blocks == 1
    num_features = None if is_shared else num_blocks * block_size
    return OFT((RotationStage(rotations),), num_features, on_input=True)


def unpack_triangles(triangles: Tensor) -> Tensor:
    """The skew-symmetric matrices whose upper triangles PEFT stores: [D, b (b - 1) / 2] -> [D, b, b].

    Raises:
        LoraError: when the numbers are no triangles.
    """
    if triangles.dim() != 2:
        raise LoraError(
            f"has an oft_R of {list(triangles.shape)}; it is [blocks, numbers], the file is broken"
        )
    num_blocks, num_numbers = triangles.shape
    block_size = (1 + math.isqrt(1 + 8 * num_numbers)) // 2
    if block_size * (block_size - 1) // 2 != num_numbers:
        raise LoraError(
            f"has {num_numbers} numbers for each block of oft_R, which are no triangle; the file is broken"
        )
    skew = torch.zeros(num_blocks, block_size, block_size)
    rows, columns = torch.triu_indices(block_size, block_size, 1)
    skew[:, rows, columns] = triangles
    return skew - skew.mT


def check_series_version(settings: Mapping[str, Any]) -> None:
    """Check that PEFT's series is the present one; before 0.18 it was another, and no version was written.

    Raises:
        LoraError: when it is not.
    """
    version = str(settings.get("peft_version") or "not stated")
    numbers = [int(number) for number in version.split(".")[:2] if number.isdecimal()]
    if numbers < FIRST_SERIES_VERSION:
        raise LoraError(
            f"is an OFT by PEFT {version[:20]}, whose series (use_cayley_neumann) is another than that of "
            "0.18 and later; merge it into its base model with the PEFT that wrote it"
        )


def bound_blocks(skew: Tensor, bound: float) -> Tensor:
    """Each block with a norm of at most the bound, for constrained OFT (COFT)."""
    norms = skew.norm(dim=(1, 2), keepdim=True)
    return torch.where(norms <= bound, skew, bound * skew / norms.clamp_min(1e-30))


def sum_neumann_series(skew: Tensor, num_terms: int) -> Tensor:
    """`I + 2 Q + 2 Q² + ... + Qⁿ⁻¹`, PEFT's approximation of `(I + Q)(I - Q)⁻¹` by n terms, of which the last
    counts once."""
    if not 1 <= num_terms <= 100:
        raise LoraError(f"has num_cayley_neumann_terms {num_terms}; allowed is 1 to 100")
    if num_terms == 3:
        num_terms = 4  # PEFT adds the last power here, too
    total = torch.eye(skew.shape[-1]).expand_as(skew).clone()  # [D, b, b]
    power = torch.eye(skew.shape[-1]).expand_as(skew)
    for term in range(1, num_terms):
        power = power @ skew
        if not power.isfinite().all():
            raise LoraError("has an oft_R whose powers are not finite numbers; the file is broken")
        is_last = term == num_terms - 1 and term > 2
        total += power if is_last else 2 * power
    return total


def build_peft_boft(tensors: Mapping[str, Tensor]) -> OFT:
    """PEFT's BOFT: `boft_R` [stages, D, b, b] and `boft_s` [N, 1]."""
    for part in ("boft_R", "boft_s"):
        if part not in tensors:
            raise LoraError(f"has no {part}; the file is incomplete")
    blocks = tensors["boft_R"].float()
    check_square("boft_R", blocks, dims=(4,))
    num_stages, num_blocks, block_size, _ = blocks.shape
    rotations = cayley(0.5 * (blocks.mT - blocks))
    num_features = num_blocks * block_size
    stages = []
    for i, stage in enumerate(rotations):
        order = None if num_stages == 1 else make_peft_butterfly(num_features, num_blocks, block_size, i)
        stages.append(RotationStage(stage, order))
    rescale = tensors["boft_s"].float().flatten()
    return OFT(tuple(stages), num_features, rescale, on_input=True, adapter_type="BOFT")


def make_peft_butterfly(num_features: int, num_blocks: int, block_size: int, stage: int) -> Tensor:
    """The order in which a stage of PEFT's BOFT cuts the inputs.

    In groups of `block_size * 2^stage` inputs, half blocks with an even number come before those with an odd
    one; PEFT applies the inverse of that before the blocks.

    Raises:
        LoraError: when the inputs cannot be cut that way.
    """
    half = block_size // 2
    group = block_size * 2**stage
    if block_size % 2 or num_features % group:
        raise LoraError(
            f"is a BOFT whose stage {stage + 1} does not fit {num_features} inputs in blocks of "
            f"{block_size}; the file is broken"
        )
    halves = torch.arange(group).reshape(-1, half)  # [half blocks, half]
    within = torch.cat([halves[0::2], halves[1::2]]).flatten()  # [group]
    starts = torch.arange(0, num_features, group)  # [groups]
    return (starts[:, None] + within).flatten().argsort()


# -- Cayley transform ----------------------------------------------------------------------------------------


def cayley(skew: Tensor) -> Tensor:
    """`(I + Q)(I - Q)⁻¹` of skew-symmetric matrices, which is orthogonal. [..., b, b], float32.

    Raises:
        LoraError: for numbers so large that float32 cannot hold the way there.
    """
    identity = torch.eye(skew.shape[-1])
    # (I + Q) and (I - Q)⁻¹ commute, so that the inverse may stand on the left
    rotations: Tensor = torch.linalg.solve(identity - skew, identity + skew)
    if not rotations.isfinite().all():
        raise LoraError("has numbers too large for a rotation in float32; the file is broken")
    return rotations


def check_square(part: str, blocks: Tensor, dims: tuple[int, ...]) -> None:
    """Check the shape of blocks.

    Raises:
        LoraError: when they are not square, or have another number of dimensions.
    """
    if blocks.dim() not in dims or blocks.shape[-1] != blocks.shape[-2]:
        raise LoraError(f"has {part} of {list(blocks.shape)}; they are square blocks, the file is broken")


def read_number(settings: Mapping[str, Any], key: str, default: float) -> float:
    """A number of PEFT's settings.

    Raises:
        LoraError: when it is none.
    """
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LoraError(f"has {key} {str(value)[:40]!r} in its settings, which is not a number")
    return float(value)
