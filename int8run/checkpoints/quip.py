"""INT8 weights of the QuIP fork of convert_to_quant, which are transformed on both sides.

The integers cannot be multiplied as they are, so such a layer is read as floats. Notation: q the integers, s
the scales.

Hadamard form: q and s are of a matrix padded to powers of 2, `W = diag(sign_row) H (q s) H diag(sign_col)`,
cut to [N, K], with Sylvester's orthonormal H. Older form: `W = diag(u) (q s) diag(v)` or, with matrices, `U
(q s) V^T`.

The Hadamard form is that of QuIP# (arXiv:2402.04396). `classify_int8.py` checks a layer with this module,
`layer.py` restores its weight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from int8run.checkpoints.granularity import check_positive
from int8run.checkpoints.layer_evidence import LayerEvidence
from int8run.checkpoints.powers import is_power_of_2, round_up_to_power_of_2
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError

HADAMARD_FLAG = "hadamard_quip"
SIZE_PARTS = ("hadamard_size_out", "hadamard_size_in")
SIGN_PARTS = ("sign_row", "sign_col")
HADAMARD_PARTS = (HADAMARD_FLAG, *SIZE_PARTS, *SIGN_PARTS)
OLDER_PARTS = ("quip_s_u", "quip_s_v")
SMOOTH_FACTORS = "smooth_factors"  # of a weight that is not transformed: the writer has divided by it already
ALL_PARTS = (*HADAMARD_PARTS, *OLDER_PARTS, SMOOTH_FACTORS)
SIDE_DTYPES = ("F32", "F16", "BF16")  # of what a weight is multiplied by


def is_transformed(keys: Mapping[str, str]) -> bool:
    """Whether a weight with these tensors beside it is transformed.

    Args:
        keys: what for -> key, of the tensors beside a weight.
    """
    return any(part in keys for part in (*HADAMARD_PARTS, *OLDER_PARTS))


def is_padded_from(shape: tuple[int, int], padded: tuple[int, int]) -> bool:
    """Whether a weight of a shape would be padded to another, each size to the next power of 2."""
    for size, padded_size in zip(shape, padded, strict=True):
        if size <= 0 or round_up_to_power_of_2(size) != padded_size:
            return False
    return True


def check_quip(evidence: LayerEvidence) -> None:
    """Check that the tensors beside a transformed weight are complete and fit it.

    Raises:
        FileError: tensors that are missing, of both forms, or of sizes that do not fit.
    """
    check_parts(evidence)
    is_older = evidence.has_part(OLDER_PARTS[0])
    side_parts = OLDER_PARTS if is_older else SIGN_PARTS
    for part, size in zip(side_parts, evidence.weight.shape, strict=True):
        check_side(evidence, part, size, is_older=is_older)
    if evidence.has_part(SMOOTH_FACTORS):
        check_positive(evidence.files, evidence.part_keys[SMOOTH_FACTORS])
    if is_older:
        return
    for part, size in zip(SIZE_PARTS, evidence.weight.shape, strict=True):
        check_padded_size(evidence, part, size)


def check_parts(evidence: LayerEvidence) -> None:
    """Raise FileError unless all tensors of one of the two forms are there, and none of the other."""
    found = [part for part in HADAMARD_PARTS if evidence.has_part(part)]
    found_older = [part for part in OLDER_PARTS if evidence.has_part(part)]
    needed = OLDER_PARTS if found_older else HADAMARD_PARTS
    missing = [part for part in needed if not evidence.has_part(part)]
    if missing:
        reason = f"{missing[0]} is missing"
    elif found and found_older:
        reason = f"it has {found[0]} and {found_older[0]}"
    else:
        return
    weight = evidence.weight
    raise FileError(
        f"{weight.file}: {weight.key} is transformed by QuIP and {reason}; its weight cannot be restored"
    )


def check_side(evidence: LayerEvidence, part: str, size: int, *, is_older: bool) -> None:
    """Check what a weight is multiplied by on one side.

    Args:
        evidence: what the file says about the layer.
        part: the vector or matrix of this side.
        size: N on the left side, K on the right.
        is_older: any finite numbers, perhaps a matrix; else signs.

    Raises:
        FileError: another shape or dtype, or numbers that are not allowed.
    """
    info = evidence.get_part(part)
    shapes = [(size,), (size, size)] if is_older else [(size,)]
    if info.shape not in shapes or info.dtype not in SIDE_DTYPES:
        raise FileError(
            f"{info.file}: {info.key} is {info.dtype} {list(info.shape)}; "
            f"its weight {list(evidence.weight.shape)} needs F32 [{size}]"
        )
    numbers = evidence.read_part(part)
    if is_older:
        is_valid, fault = numbers.isfinite(), "not finite"
    else:
        is_valid, fault = numbers.abs() == 1, "neither 1 nor -1"
    if not is_valid.all():
        raise FileError(f"{info.file}: {info.key} has numbers that are {fault}; the file is damaged")


def check_padded_size(evidence: LayerEvidence, part: str, size: int) -> None:
    """Raise FileError unless a tensor names the padded size of a weight, which is a power of 2.

    Args:
        evidence: what the file says about the layer.
        part: the tensor, one number.
        size: N or K of the weight in the file.
    """
    info = evidence.get_part(part)
    number = None
    if info.nbytes and len(info.shape) == 0:
        number = int(evidence.files.read(info.key))
    if number == size and is_power_of_2(size):
        return
    raise FileError(
        f"{info.file}: {info.key} says {number}, and {evidence.weight.key} has "
        f"{list(evidence.weight.shape)}; both are one power of 2"
    )


def restore_weight(files: TensorFiles, keys: Mapping[str, str], scaled: Tensor) -> Tensor:
    """Undo the transform.

    Args:
        files: the checkpoint.
        keys: what for -> key, of the tensors beside the weight.
        scaled: integers times scales, float32 [N, K], padded as in the file.

    Returns:
        float32 [N, K], padded as in the file; with smooth factors K is cut to their number.
    """
    left_part, right_part = OLDER_PARTS if OLDER_PARTS[0] in keys else SIGN_PARTS
    left = files.read(keys[left_part]).float()  # [N] or [N, N]
    right = files.read(keys[right_part]).float()  # [K] or [K, K]
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
    norm: float = k**0.5
    return x / norm
