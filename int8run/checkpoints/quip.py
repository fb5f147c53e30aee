"""INT8 weights of the QuIP fork of convert_to_quant, which are transformed on both sides.

The integers cannot be multiplied as they are, so such a layer is read as floats. Notation: q the integers, s
the scales.

Hadamard form: q and s are of a matrix padded to powers of 2, `W = diag(sign_row) H (q s) H diag(sign_col)`,
cut to [N, K], with Sylvester's orthonormal H. Older form: `W = diag(u) (q s) diag(v)` or, with matrices, `U
(q s) V^T`.

`detect.py` checks a layer with this module, `layer.py` restores its weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from int8run.checkpoints.granularity import check_positive
from int8run.checkpoints.reader import TensorFiles, TensorInfo
from int8run.errors import FileError

HADAMARD_FLAG = "hadamard_quip"
SIZE_PARTS = ("hadamard_size_out", "hadamard_size_in")
SIGN_PARTS = ("sign_row", "sign_col")
HADAMARD_PARTS = (HADAMARD_FLAG, *SIZE_PARTS, *SIGN_PARTS)
OLDER_PARTS = ("quip_s_u", "quip_s_v")
SMOOTH_FACTORS = "smooth_factors"  # of a weight that is not transformed: the writer has divided by it already
ALL_PARTS = (*HADAMARD_PARTS, *OLDER_PARTS, SMOOTH_FACTORS)


def is_transformed(keys: Mapping[str, str]) -> bool:
    """Whether a weight with these tensors beside it is transformed.

    Args:
        keys: what for -> key, of the tensors beside a weight.
    """
    return any(part in keys for part in (*HADAMARD_PARTS, *OLDER_PARTS))


def is_padded_from(shape: tuple[int, int], padded: tuple[int, int]) -> bool:
    """Whether a weight of a shape would be padded to another, each size to the next power of 2."""
    sizes = zip(shape, padded, strict=True)
    return all(size > 0 and 1 << (size - 1).bit_length() == padded_size for size, padded_size in sizes)


def check_quip(files: TensorFiles, keys: Mapping[str, str], weight: TensorInfo) -> None:
    """Check that the tensors beside a transformed weight are complete and fit it.

    Args:
        files: the checkpoint.
        keys: what for -> key, of the tensors beside the weight.
        weight: where the integers are.

    Raises:
        FileError: tensors that are missing, of both forms, or of sizes that do not fit.
    """
    check_parts(keys, weight)
    is_older = OLDER_PARTS[0] in keys
    for part, size in zip(OLDER_PARTS if is_older else SIGN_PARTS, weight.shape, strict=True):
        check_side(files, keys[part], weight, size, is_older=is_older)
    if SMOOTH_FACTORS in keys:
        check_positive(files, keys[SMOOTH_FACTORS])
    if is_older:
        return
    for part, size in zip(SIZE_PARTS, weight.shape, strict=True):
        info = files[keys[part]]
        number = int(files.read(keys[part])) if info.nbytes and len(info.shape) == 0 else None
        is_power_of_2 = size & (size - 1) == 0
        if number != size or not is_power_of_2:
            raise FileError(
                f"{info.file}: {info.key} says {number}, and {weight.key} has {list(weight.shape)}; "
                "both are one power of 2"
            )


def check_parts(keys: Mapping[str, str], weight: TensorInfo) -> None:
    """Raise FileError unless all tensors of one of the two forms are there, and none of the other."""
    found = [part for part in HADAMARD_PARTS if part in keys]
    found_older = [part for part in OLDER_PARTS if part in keys]
    missing = [part for part in (OLDER_PARTS if found_older else HADAMARD_PARTS) if part not in keys]
    if not missing and not (found and found_older):
        return
    what = f"{missing[0]} is missing" if missing else f"it has {found[0]} and {found_older[0]}"
    raise FileError(
        f"{weight.file}: {weight.key} is transformed by QuIP and {what}; its weight cannot be restored"
    )


def check_side(files: TensorFiles, key: str, weight: TensorInfo, size: int, *, is_older: bool) -> None:
    """Check what a weight is multiplied by on one side.

    Args:
        files: the checkpoint.
        key: of the vector or matrix.
        weight: where the integers are.
        size: N on the left side, K on the right.
        is_older: any finite numbers, perhaps a matrix; else signs.

    Raises:
        FileError: another shape or dtype, or numbers that are not allowed.
    """
    info = files[key]
    shapes = [(size,), (size, size)] if is_older else [(size,)]
    if info.shape not in shapes or info.dtype not in ("F32", "F16", "BF16"):
        raise FileError(
            f"{info.file}: {info.key} is {info.dtype} {list(info.shape)}; "
            f"its weight {list(weight.shape)} needs F32 [{size}]"
        )
    numbers = files.read(key).float()
    is_valid = numbers.isfinite() if is_older else numbers.abs() == 1
    if not is_valid.all():
        what = "not finite" if is_older else "neither 1 nor -1"
        raise FileError(f"{info.file}: {info.key} has numbers that are {what}; the file is damaged")


def restore_weight(files: TensorFiles, keys: Mapping[str, str], scaled: Tensor) -> Tensor:
    """Undo the transform.

    Args:
        files: the checkpoint.
        keys: what for -> key, of the tensors beside the weight.
        scaled: integers times scales, float32 [N, K], padded as in the file.

    Returns:
        float32 [N, K], padded as in the file; with smooth factors K is cut to their number.
    """
    sides = OLDER_PARTS if OLDER_PARTS[0] in keys else SIGN_PARTS
    left, right = (files.read(keys[part]).float() for part in sides)
    if HADAMARD_FLAG in keys:
        scaled = walsh_hadamard(walsh_hadamard(scaled).T).T
    scaled = left[:, None] * scaled if left.dim() == 1 else left @ scaled
    scaled = scaled * right if right.dim() == 1 else scaled @ right.T
    if SMOOTH_FACTORS not in keys:
        return scaled
    # K of the file's matrix may be padded, the factors are not
    factors = files.read(keys[SMOOTH_FACTORS]).float()
    return scaled[:, : len(factors)] / factors


def walsh_hadamard(x: Tensor) -> Tensor:
    """Multiply each row by Sylvester's orthonormal matrix, in log2(K) rounds of sums and differences.

    Args:
        x: float32 [N, K], K a power of 2.

    Returns:
        float32 [N, K].
    """
    n, k = x.shape
    width = 1  # columns that are transformed already
    while width < k:
        pairs = x.reshape(n, -1, 2, width)
        left, right = pairs[:, :, 0], pairs[:, :, 1]  # [N, K / 2 width, width]
        x = torch.stack((left + right, left - right), dim=2).reshape(n, k)
        width *= 2
    return x / k**0.5
