"""INT8 attention, written to be read: `softmax(q kᵀ · scale) v` with both products of integers.

Queries and keys are rounded per token, values per channel, and probabilities to unsigned bytes per row and
block of keys. The faster versions never hold all scores: they go from block to block and keep a running
maximum, which gives the same numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from int8run.kernels.hadamard.reference import regular_hadamard, rotate_groups, sylvester_hadamard
from int8run.kernels.quantize_rowwise.reference import INT8_MAX, TINY, quantize_rowwise

CODE_MAX = 255  # of a probability: the largest one of a row and block
KEY_BLOCK = 256  # keys whose probabilities share a scale


class QuantizedValues(NamedTuple):
    """Values about their mean, rounded per channel: `v ~ q * scale + mean`."""

    q: Tensor  # int8 [B, H, Lk, Dv]
    scale: Tensor  # float32 [B, H, 1, Dv]
    mean: Tensor  # float32 [B, H, 1, Dv]


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rotation: int = 0,
    center_keys: bool = False,
    key_block: int = KEY_BLOCK,
) -> Tensor:
    """Attention of int8 queries, keys and values.

    Args:
        q: [B, Hq, Lq, D], any float dtype; the arithmetic is float32.
        k: [B, Hkv, Lk, D], where Hkv divides Hq: neighboring heads of q share one of k and v.
        v: [B, Hkv, Lk, Dv].
        mask: bool (True: attend) or float, which is added to the scores; broadcastable to [B, Hq, Lq, Lk].
        is_causal: row i attends to keys 0 .. i only, in addition to the mask.
        scale: of the scores; None: 1 / sqrt(D).
        rotation: channels of a group of q and k that is rotated before rounding, by the matrix of
            `make_rotation`; a divisor of D. 0: none.
        center_keys: subtract the mean of all keys before rounding. It changes all scores of a row by the same
            number, which a softmax does not see (SageAttention, arXiv 2410.02367).
        key_block: keys whose probabilities share a scale.

    Returns:
        [B, Hq, Lq, Dv] in q's dtype. A row that attends to nothing is 0. NaN in a key makes the rows that
        attend to it NaN; in a query or a float mask, its row; in a value, its channel.

    Raises:
        ValueError: for shapes or a rotation that do not fit.
    """
    check_attention_shapes(q, k, v, rotation)
    heads_per_group = q.shape[1] // k.shape[1]
    scores = compute_scores(q, k, scale=scale, rotation=rotation, center_keys=center_keys)
    scores = mask_scores(scores, mask, is_causal=is_causal)  # [B, Hq, Lq, Lk]
    values = QuantizedValues(*(each.repeat_interleave(heads_per_group, 1) for each in quantize_values(v)))

    maximum = scores.amax(dim=-1, keepdim=True)  # [B, Hq, Lq, 1]
    weighted_sum: Tensor | float = 0.0
    sum_of_weights: Tensor | float = 0.0
    for start in range(0, k.shape[2], key_block):
        block = slice(start, start + key_block)
        probabilities, block_maximum = compute_probabilities(scores[..., block])
        codes = probabilities.round()
        block_weight = exponentiate_differences(block_maximum, maximum)
        products = codes.double() @ values.q[:, :, block].double()  # exact
        weighted_sum = weighted_sum + block_weight * products.float()
        # of probabilities, not of codes: with those that are rounded to 0 a row loses part of its codes' sum,
        # and dividing by what is left would make all others larger
        sum_of_weights = sum_of_weights + block_weight * probabilities.sum(dim=-1, keepdim=True)

    output = weighted_sum / sum_of_weights * values.scale + values.mean
    attends_to_nothing = maximum == -torch.inf
    return output.masked_fill(attends_to_nothing, 0.0).to(q.dtype)


def compute_scores(q: Tensor, k: Tensor, *, scale: float | None, rotation: int, center_keys: bool) -> Tensor:
    """`q kᵀ · scale` of integers; see `int8_attention`. Returns float32 [B, Hq, Lq, Lk]."""
    q, k = q.float(), k.float()
    if center_keys:
        k = k - k.mean(dim=-2, keepdim=True)
    if rotation:
        matrix = make_rotation(rotation).to(q.device)
        q, k = rotate_groups(q, matrix), rotate_groups(k, matrix)
    q_int, q_scale = quantize_rowwise(q)
    k_int, k_scale = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in quantize_rowwise(k))
    if scale is None:
        scale = q.shape[-1] ** -0.5
    products = (q_int.double() @ k_int.double().mT).float()  # exact: [B, Hq, Lq, D] x [B, Hq, D, Lk]
    scores: Tensor = products * k_scale.mT * (q_scale * scale)
    return scores


def mask_scores(scores: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """Add a mask to scores [B, Hq, Lq, Lk]; -inf where a row must not attend."""
    if is_causal:
        queries, keys = scores.shape[-2:]
        is_later = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(diagonal=1)
        scores = scores.masked_fill(is_later, -torch.inf)
    if mask is None:
        return scores
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.float()


def compute_probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    """`255 exp(score - maximum)` of each row and block, from 0 to 255 and not yet rounded.

    Args:
        scores: float32 [..., keys of a block].

    Returns:
        probabilities: float32 [..., keys], 0 where all scores are -inf; maximum: [..., 1].
    """
    maximum = scores.amax(dim=-1, keepdim=True)
    return CODE_MAX * exponentiate_differences(scores, maximum), maximum


def exponentiate_differences(scores: Tensor, maximum: Tensor) -> Tensor:
    """`exp(scores - maximum)`, and 0 where the maximum is -inf."""
    return (scores - maximum).exp().masked_fill(maximum == -torch.inf, 0.0)


def quantize_values(v: Tensor) -> QuantizedValues:
    """Round values [B, H, Lk, Dv] to int8 about the mean of each channel over all tokens.

    The probabilities of a row sum to 1, so that the mean can be added to the result (SageAttention2, arXiv
    2411.10958, calls it smoothing V).
    """
    v = v.float()
    mean = v.mean(dim=-2, keepdim=True)
    v = v - mean
    scale = (v.abs().amax(dim=-2, keepdim=True) / INT8_MAX).clamp(min=TINY)
    q = (v / scale).round().clamp(-INT8_MAX, INT8_MAX)
    return QuantizedValues(q.to(torch.int8), scale, mean)


def make_rotation(size: int) -> Tensor:
    """The Hadamard matrix of a group: the regular one of a power of 4, else Sylvester's of a power of 2.

    Returns:
        float32 [size, size], orthonormal and its own inverse.

    Raises:
        ValueError: when size is not a power of 2.
    """
    is_power_of_4 = size >= 4 and size & (size - 1) == 0 and size.bit_length() % 2 == 1
    return regular_hadamard(size) if is_power_of_4 else sylvester_hadamard(size)


def check_attention_shapes(q: Tensor, k: Tensor, v: Tensor, rotation: int) -> None:
    """Raise ValueError unless queries, keys, values and rotation fit each other; see `int8_attention`."""
    if not all(each.ndim == 4 for each in (q, k, v)):
        raise ValueError(f"q, k and v must have 4 dimensions, not {q.ndim}, {k.ndim} and {v.ndim}")
    same_tokens = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]
    if not same_tokens or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q [B, Hq, Lq, D], k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv] must share B, Hkv, Lk and D, "
            f"not {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if 0 in (*q.shape[1:], *k.shape[1:3], v.shape[3]):
        raise ValueError("attention needs at least one head, query, key and channel")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads of q cannot share {k.shape[1]} heads of k and v evenly")
    is_power_of_2 = rotation >= 2 and rotation & (rotation - 1) == 0
    if rotation and (not is_power_of_2 or q.shape[3] % rotation):
        raise ValueError(
            f"rotation must be 0 or a power of 2 that divides a head's {q.shape[3]} channels, not {rotation}"
        )
