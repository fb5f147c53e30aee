"""Weights of 4 and 6 bits for tests: any codes, any scales."""

import torch

from int8run.kernels.grouped_weight.reference import pack_codes
from int8run.quant.grouped_weight import GroupedWeight


def draw_grouped_weight(
    outputs, columns, bits, group_size, scale_dtype=torch.float8_e4m3fn, *, has_codebook=False, seed=0
):
    """A weight whose int8 numbers fill their range, and now and then exceed it.

    Args:
        outputs: N.
        columns: K.
        bits: 4 or 6.
        group_size: columns that share a scale.
        scale_dtype: of the group scales.
        has_codebook: whether levels are 16 numbers between -1 and 1, and not integers.
        seed: of all of it.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (outputs, columns), generator=generator, dtype=torch.uint8)
    largest_level = 1 if has_codebook else 2 ** (bits - 1)
    group_scale = torch.rand(outputs, columns // group_size, generator=generator) * 140 / largest_level
    codebook = torch.linspace(-1, 1, 16).pow(3) if has_codebook else None
    return GroupedWeight(
        codes=pack_codes(codes, bits),
        group_scale=group_scale.to(scale_dtype),
        scale=0.1 + torch.rand(outputs, 1, generator=generator),
        bits=bits,
        codebook=codebook,
    )


def list_grouped_weights(outputs, columns, group_size):
    """Weights of both widths, with and without a codebook, with scales of one byte and of four."""
    for scale_dtype in (torch.float8_e4m3fn, torch.float32):
        for has_codebook in (False, True):
            yield draw_grouped_weight(
                outputs, columns, 4, group_size, scale_dtype=scale_dtype, has_codebook=has_codebook
            )
        if columns % 32 == 0 and group_size % 16 == 0:
            yield draw_grouped_weight(outputs, columns, 6, group_size, scale_dtype=scale_dtype)
