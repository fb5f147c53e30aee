"""INT8 weights of the QuIP fork of convert_to_quant, which are transformed on both sides and cannot be multiplied as they are.

Hadamard form: codes and scales are of a matrix padded to powers of 2, `W = diag(sign_row) H (q s) H diag(sign_col)`, cut to [N, K],
with Sylvester's orthonormal H. Older form: `W = diag(u) (q s) diag(v)` or, with matrices, `U (q s) V^T`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from int8run.checkpoints.granularity import check_positive
from int8run.checkpoints.reader import TensorFiles, TensorInfo
from int8run.errors import FileError

HADAMARD_FLAG = "hadamard_quip"
SMOOTH_FACTORS = "smooth_factors"  # of a weight that is not transformed: the writer has divided by it already
SIZE_PARTS = ("hadamard_size_out", "hadamard_size_in")
SIGN_PARTS = ("sign_row", "sign_col")
OLDER_PARTS = ("quip_s_u", "quip_s_v")
ALL_PARTS = (HADAMARD_FLAG, *SIZE_PARTS, *SIGN_PARTS, *OLDER_PARTS, SMOOTH_FACTORS)


def is_transformed(keys: Mapping[str, str]) -> bool:
    """Whether a weight with these tensors beside it is transformed."""
    return any(part in keys for part in ALL_PARTS if part != SMOOTH_FACTORS)


def is_padded_from(shape: tuple[int, int], padded: tuple[int, int]) -> bool:
    """Whether a weight of a shape is padded to another."""
    return all(
        size > 0 and 1 << (size - 1).bit_length() == whole for size, whole in zip(shape, padded, strict=True)
    )


def check_quip(files: TensorFiles, keys: Mapping[str, str], weight: TensorInfo) -> None:
    """Refuse tensors that are missing, too many, or of sizes that do not fit.

    Raises:
        FileError
    """
    new, old = (
        [part for part in ALL_PARTS[:5] if part in keys],
        [part for part in OLDER_PARTS if part in keys],
    )
    wanted = OLDER_PARTS if old else ALL_PARTS[:5]
    missing = [part for part in wanted if part not in keys]
    if missing or (new and old):
        what = f"{missing[0]} is missing" if missing else f"it has {new[0]} and {old[0]}"
        raise FileError(
            f"{weight.file}: {weight.key} is transformed by QuIP and {what}; its weight cannot be restored"
        )
    for part, size in zip(OLDER_PARTS if old else SIGN_PARTS, weight.shape, strict=True):
        info = files[keys[part]]
        shapes = ((size,), (size, size)) if old else ((size,),)
        if info.shape not in shapes or info.dtype not in ("F32", "F16", "BF16"):
            raise FileError(
                f"{info.file}: {info.key} is {info.dtype} {list(info.shape)}; its weight {list(weight.shape)} wants F32 [{size}]"
            )
        numbers = files.read(keys[part]).float()
        if not (numbers.isfinite() if old else numbers.abs() == 1).all():
            raise FileError(
                f"{info.file}: {info.key} has numbers that are {'not finite' if old else 'neither 1 nor -1'}; the file is damaged"
            )
    if SMOOTH_FACTORS in keys:
        check_positive(files, keys[SMOOTH_FACTORS])
    if old:
        return
    for part, size in zip(SIZE_PARTS, weight.shape, strict=True):
        info = files[keys[part]]
        number = int(files.read(keys[part])) if info.nbytes and len(info.shape) == 0 else None
        if number != size or size & (size - 1):
            raise FileError(
                f"{info.file}: {info.key} says {number}, and {weight.key} has {list(weight.shape)}; both are one power of 2"
            )


def restore_weight(files: TensorFiles, keys: Mapping[str, str], scaled: Tensor) -> Tensor:
    """The weight, padded as it was.

    scaled: codes times scales, float32 [N, K] -> [N, K].
    """
    left, right = (
        files.read(keys[part]).float() for part in (OLDER_PARTS if OLDER_PARTS[0] in keys else SIGN_PARTS)
    )
    if HADAMARD_FLAG in keys:
        scaled = walsh_hadamard(walsh_hadamard(scaled).T).T
    scaled = left[:, None] * scaled if left.dim() == 1 else left @ scaled
    scaled = scaled * right if right.dim() == 1 else scaled @ right.T
    # K of the file's matrix may be padded, the factors are not
    if SMOOTH_FACTORS not in keys:
        return scaled
    factors = files.read(keys[SMOOTH_FACTORS]).float()
    return scaled[:, : len(factors)] / factors


def walsh_hadamard(x: Tensor) -> Tensor:
    """Each row times Sylvester's orthonormal matrix, without the matrix. x: [N, K], K a power of 2 -> [N, K]."""
    n, k = x.shape
    width = 1
    while width < k:
        pairs = x.reshape(n, -1, 2, width)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).reshape(
            n, k
        )
        width *= 2
    return x / k**0.5
