"""What the static gate compiles: every kernel, for every GPU, with every option that its code depends on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from support.exact_kernels import list_hopper_tiles

from int8run.kernels.grouped_weight import kernel as grouped
from int8run.kernels.grouped_weight.tile import choose_grouped_tile, shrink_tile
from int8run.kernels.int8_attention import kernel as attention
from int8run.kernels.int8_attention.tile import AttentionTile, choose_attention_tile, pad_width
from int8run.kernels.int8_conv import kernel as convolution
from int8run.kernels.int8_conv.tile import choose_conv_tile
from int8run.kernels.int8_linear import hopper
from int8run.kernels.int8_linear import kernel as linear
from int8run.kernels.int8_linear.tile import (
    BUCKETS,
    FEW_ROWS,
    HOPPER_PIECE,
    MANY_ROWS,
    Tile,
    choose_block_r,
    choose_tile,
    find_architecture,
)
from int8run.kernels.quantize_rowwise import kernel as rowwise
from int8run.kernels.triton_calls import choose_dot_precision

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
AMD = ("gfx942", "gfx1100", "gfx1201")
FLOAT32 = dict.fromkeys(("x_ptr", "down_ptr"), "*fp32")


@dataclass(frozen=True)
class Build:
    """One compiled variant of a kernel."""

    architecture: str
    name: str
    function: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    types: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.architecture} {self.name}"


def linear_build(architecture: str, tile: Tile, rank: int = 0, group: int = 0, even: bool = True) -> Build:
    """The INT8 linear kernel with a bias, bfloat16 out."""
    block_k = linear.limit_block_k(tile.block_k, group)
    constants = {
        "GROUP": group,
        "SCALE_ROWS": 1,
        "HAS_BIAS": True,
        "BLOCK_R": choose_block_r(rank),
        "PRECISION": choose_dot_precision(torch.bfloat16, is_amd=architecture in AMD),
        "EVEN_N": even,
        "EVEN_K": even,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
        "GROUP_M": tile.group_m,
    }
    name = f"linear {tile.block_m}x{tile.block_n}x{block_k} w{tile.warps} s{tile.stages}"
    if rank:
        name += f" rank {rank}"
    if group:
        name += f" group {group}"
    if not even:
        name += " tails"
    return Build(
        architecture,
        name,
        linear.int8_linear_kernel,
        constants,
        tile.warps,
        tile.stages,
    )


def grouped_build(
    architecture: str,
    tile: Tile,
    bits: int,
    rank: int = 0,
    group: int = 16,
    is_float: bool = False,
    even: bool = True,
) -> Build:
    """The product with a grouped weight, a bias, bfloat16 out. `is_float`: scales in float32, a codebook."""
    constants = {
        "BITS": bits,
        "GROUP": group,
        "HAS_BIAS": True,
        "BLOCK_R": choose_block_r(rank),
        "PRECISION": choose_dot_precision(torch.bfloat16, is_amd=architecture in AMD),
        "EVEN_N": even,
        "EVEN_K": even,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
    }
    if not is_float or bits != 4:
        constants["codebook_ptr"] = None
    name = f"grouped {bits} bits {tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages}"
    if rank:
        name += f" rank {rank}"
    if group != 16:
        name += f" group {group}"
    if is_float:
        name += " float32"
    if not even:
        name += " tails"
    types = {"group_scale_ptr": "*fp32"} if is_float else {}
    kernel = grouped.grouped_linear_kernel
    return Build(architecture, name, kernel, constants, tile.warps, tile.stages, types)


def decode_build(architecture: str, bits: int) -> Build:
    """The kernel that decodes a whole weight with scales of e4m3."""
    constants = {
        "codebook_ptr": None,
        "BITS": bits,
        "GROUP": 16,
        "BLOCK_N": grouped.DECODED_ROWS,
        "BLOCK_K": grouped.DECODED_COLUMNS,
    }
    name = f"decode {bits} bits {grouped.DECODED_ROWS}x{grouped.DECODED_COLUMNS} w{grouped.DECODING_WARPS}"
    types = {"qdata_ptr": "*i8"}
    kernel = grouped.decode_weight_kernel
    return Build(architecture, name, kernel, constants, grouped.DECODING_WARPS, 1, types)


def hopper_build(tile: Tile, rank: int = 0, out: str = "bf16") -> Build:
    """The Hopper kernel with a bias."""
    constants = {
        "BLOCK_R": choose_block_r(rank),
        "GROUP_M": tile.group_m,
        "STAGES": tile.stages,
        "PIECE": HOPPER_PIECE,
    }
    if not rank:
        constants |= dict.fromkeys(("h_ptr", "up_ptr", "strengths_ptr"))
    types = {
        "q_desc": _operand_type(tile.block_m, tile.block_k),
        "qdata_desc": _operand_type(tile.block_n, tile.block_k),
        "y_ptr": f"*{out}",
    }
    name = f"hopper {tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages}"
    if rank:
        name += f" rank {rank}"
    if out != "bf16":
        name += f" {out}"
    return Build("sm_90", name, hopper._hopper_kernel, constants, tile.warps, tile.stages, types)


def _operand_type(rows: int, columns: int) -> str:
    """The type of an operand's descriptor in a kernel's signature."""
    return f"tensordesc<i8[{rows},{columns}],{hopper.choose_operand_layout(rows, columns)!r}>"


def rowwise_build(
    architecture: str,
    rotation: int,
    rank: int,
    before: bool,
    sylvester: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Build:
    """The quantize kernel for a low-rank branch. `before`: with GELU and factor."""
    block_r = rowwise.choose_block_r(rank)
    constants = {
        "HAS_FACTOR": before,
        "GELU": before,
        "ROTATION": rotation,
        "SYLVESTER": sylvester,
        "BLOCK_R": block_r,
        "PRECISION": choose_dot_precision(dtype, is_amd=architecture in AMD),
        "EVEN_K": True,
        "PARTS": rowwise.choose_block_parts(rotation),
    }
    kind = "sylvester" if sylvester else "rotation"
    name = (
        f"quantize {kind} {rotation} rank "
        f"{rank}{' gelu factor' if before else ''}{' float32' if dtype == torch.float32 else ''}"
    )
    warps = rowwise.choose_row_block_warps(block_r)
    return Build(
        architecture,
        name,
        rowwise.quantize_row_block_kernel,
        constants,
        warps,
        1,
        FLOAT32 if dtype == torch.float32 else {},
    )


def resident_build(architecture: str, block_k: int) -> Build:
    """The quantize kernel for whole rows, with GELU and factor."""
    constants = {"HAS_FACTOR": True, "GELU": True, "BLOCK_K": block_k}
    return Build(
        architecture,
        f"quantize row of {block_k}",
        rowwise.quantize_row_kernel,
        constants,
        rowwise.choose_row_warps(block_k),
        3,
    )


def row_matrix_build(
    architecture: str,
    columns: int,
    rotation: int,
    before: bool,
    sylvester: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Build:
    """The quantize kernel for rows as matrices. `before`: with GELU and factor."""
    parts = rowwise.choose_row_parts(rotation)
    block_g = rowwise.choose_block_g(columns, parts)
    size = 64 * parts * block_g
    constants = {
        "HAS_FACTOR": before,
        "GELU": before,
        "ROTATION": rotation,
        "SYLVESTER": sylvester,
        "PRECISION": choose_dot_precision(dtype, is_amd=architecture in AMD),
        "EVEN_K": columns % size == 0,
        "IN_REGISTERS": columns <= size,
        "PARTS": parts,
        "BLOCK_G": block_g,
    }
    name = f"quantize row of {columns} {'sylvester' if sylvester else 'rotation'} {rotation}"
    if before:
        name += " gelu factor"
    if dtype == torch.float32:
        name += " float32"
    return Build(
        architecture,
        name,
        rowwise.quantize_row_matrix_kernel,
        constants,
        rowwise.choose_row_warps(size),
        1,
        FLOAT32 if dtype == torch.float32 else {},
    )


def attention_build(
    architecture: str,
    width: int,
    tile: AttentionTile,
    mask: str = "none",
    causal: bool = False,
    tails: bool = False,
) -> Build:
    """The attention kernel, bfloat16; a mask has rows of its own. `tails`: of keys, and of a head's width."""
    constants = {
        "MASK": mask,
        "ROW_MASK": mask != "none",
        "CAUSAL": causal,
        "EVEN_K": not tails,
        "EVEN_V": not tails,
        "BLOCK_D": pad_width(width),
        "BLOCK_V": pad_width(width),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    if mask == "none":
        constants["mask_ptr"] = None
    name = f"attention {width} {tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages}"
    if mask != "none":
        name += f" {mask} mask"
    if causal:
        name += " causal"
    if tails:
        name += " tails"
    types = {"mask_ptr": "*u8" if mask == "bool" else "*bf16"}
    return Build(architecture, name, attention.attention_kernel, constants, tile.warps, tile.stages, types)


def heads_build(
    architecture: str, width: int, rotation: int, centered: bool, dtype: torch.dtype = torch.bfloat16
) -> Build:
    """The kernel that rounds queries or keys."""
    block_d = pad_width(width)
    parts = attention.count_parts(block_d)
    is_amd = architecture in AMD
    constants = {
        "HAS_MEAN": centered,
        "ROTATION": rotation,
        "SYLVESTER": not attention.is_regular(rotation),
        "PRECISION": choose_dot_precision(dtype, is_amd=is_amd),
        "MEAN_PRECISION": choose_dot_precision(torch.float32, is_amd=is_amd),
        "EVEN_D": width == 64 * parts,
        "PARTS": parts,
        "BLOCK_D": block_d,
        "BLOCK_L": attention.BLOCK_L,
    }
    name = f"quantize heads of {width} rotation {rotation}"
    if centered:
        name += " centered"
    if dtype == torch.float32:
        name += " float32"
    types = FLOAT32 if dtype == torch.float32 else {}
    return Build(
        architecture, name, attention.quantize_heads_kernel, constants, attention.HEADS_WARPS, 1, types
    )


def attention_builds(architecture: str) -> Iterator[Build]:
    """Each default tile with the narrowest and the widest head, every kind of mask, tails."""
    for width, queries in ((32, 16), (64, 4096), (128, 4608), (256, 4096), (256, 16)):
        tile = choose_attention_tile(architecture, width, queries)
        yield attention_build(architecture, width, tile)
        yield attention_build(architecture, width, tile, tails=True)
    for width, queries, mask in (
        (64, 4096, "bool"),
        (128, 4608, "float"),
        (256, 4096, "bool"),
        (128, 16, "bool"),
    ):
        tile = choose_attention_tile(architecture, width, queries, has_row_mask=True)
        yield attention_build(architecture, width, tile, mask=mask, tails=True)
    tile = choose_attention_tile(architecture, 128, 4608)
    yield attention_build(architecture, 128, tile, causal=True, tails=True)
    yield heads_build(architecture, 64, 64, centered=True)
    yield heads_build(architecture, 128, 64, centered=False)
    yield heads_build(architecture, 128, 128, centered=True, dtype=torch.float32)
    yield heads_build(architecture, 256, 256, centered=True)
    yield heads_build(architecture, 40, 8, centered=False)


def conv_build(architecture: str, tile: Tile, channels: int, kernel: int = 3, video: bool = False) -> Build:
    """The convolution with a bias, stride 1, bfloat16 out."""
    block_k = convolution.choose_block_k(tile, channels)
    sizes = {"KT": kernel if video else 1, "KH": kernel, "KW": kernel, "ST": 1, "SH": 1, "SW": 1}
    constants = {
        **sizes,
        "PT": sizes["KT"] // 2,
        "PH": kernel // 2,
        "PW": kernel // 2,
        "HAS_BIAS": True,
        "EVEN_C": channels % block_k == 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": block_k,
    }
    shape = f"{kernel}x{kernel}x{kernel}" if video else f"{kernel}x{kernel}"
    name = f"conv {shape} {tile.block_m}x{tile.block_n}x{block_k} w{tile.warps} s{tile.stages}"
    if channels % block_k:
        name += " tails"
    return Build(architecture, name, convolution.conv_kernel, constants, tile.warps, tile.stages)


def pixels_build(architecture: str, rotation: int, silu: bool, dtype: torch.dtype = torch.bfloat16) -> Build:
    """The kernel that rounds pixels."""
    constants = {
        "SILU": silu,
        "ROTATION": rotation,
        "SYLVESTER": False,
        "PRECISION": choose_dot_precision(dtype, is_amd=architecture in AMD),
        "PARTS": rowwise.choose_block_parts(rotation),
        "BLOCK_P": convolution.BLOCK_P,
    }
    name = f"quantize pixels rotation {rotation}"
    if silu:
        name += " silu"
    if dtype == torch.float32:
        name += " float32"
    types = FLOAT32 if dtype == torch.float32 else {}
    warps = convolution.PIXELS_WARPS
    return Build(architecture, name, convolution.quantize_pixels_kernel, constants, warps, 1, types)


def conv_builds(architecture: str) -> Iterator[Build]:
    """Each default tile with SDXL's channels; the largest with every option."""
    for rows in BUCKETS:
        yield conv_build(architecture, choose_conv_tile(architecture, rows), 640)
    tile = choose_conv_tile(architecture, MANY_ROWS)
    yield conv_build(architecture, tile, 640, kernel=1)
    yield conv_build(architecture, tile, 200)
    yield conv_build(architecture, tile, 128, video=True)
    yield pixels_build(architecture, 0, silu=True)
    yield pixels_build(architecture, 256, silu=True)
    yield pixels_build(architecture, 64, silu=False, dtype=torch.float32)


def linear_builds(architecture: str) -> Iterator[Build]:
    """Each default tile; the smallest and the largest with every option."""
    for rows in BUCKETS:
        tile, grouped = choose_tile(architecture, rows), choose_tile(architecture, rows, grouped=True)
        yield linear_build(architecture, tile)
        if rows in (FEW_ROWS, MANY_ROWS):
            yield linear_build(architecture, tile, rank=64)
            yield linear_build(architecture, grouped, group=128)
            yield linear_build(architecture, tile, even=False)


def grouped_builds(architecture: str) -> Iterator[Build]:
    """Each default tile with both numbers of bits; the smallest and the largest with every option."""
    for bits in (4, 6):
        yield decode_build(architecture, bits)
        for rows in BUCKETS:
            tile = choose_grouped_tile(architecture, rows, bits)
            yield grouped_build(architecture, tile, bits)
            if rows in (FEW_ROWS, MANY_ROWS):
                yield grouped_build(architecture, tile, bits, rank=64)
                yield grouped_build(architecture, tile, bits, group=64)
                yield grouped_build(architecture, shrink_tile(tile, bits), bits, is_float=True)
                yield grouped_build(architecture, tile, bits, even=False)


def hopper_builds() -> Iterator[Build]:
    """Each tile of the Hopper kernel that a tuner tries, with every option."""
    for tile in list_hopper_tiles():
        yield hopper_build(tile)
        yield hopper_build(tile, rank=16)
        yield hopper_build(tile, rank=64)
        yield hopper_build(tile, out="fp16")
        yield hopper_build(tile, out="fp32")


def rowwise_builds(architecture: str) -> Iterator[Build]:
    """What FLUX needs: plain rows, GELU before ff.net.2, both kinds of rotation, LoRA of small and large
    rank.
    """
    yield resident_build(architecture, 4096)
    yield resident_build(architecture, 16384)
    yield row_matrix_build(architecture, 3072, 256, before=False)
    yield row_matrix_build(architecture, 15360, 256, before=True)
    yield row_matrix_build(architecture, 3072, 128, before=True, sylvester=True)
    yield row_matrix_build(architecture, 3072, 1024, before=True)
    yield row_matrix_build(architecture, 20480, 0, before=False)
    yield row_matrix_build(architecture, 8192, 256, before=True, dtype=torch.float32)
    yield rowwise_build(architecture, 256, 16, before=True)
    yield rowwise_build(architecture, 256, 64, before=False)
    yield rowwise_build(architecture, 128, 16, before=True, sylvester=True)
    yield rowwise_build(architecture, 0, 256, before=True)
    if architecture in ("sm_80", "sm_90", *AMD):
        yield rowwise_build(architecture, 1024, 16, before=False)
        yield rowwise_build(architecture, 256, 16, before=False, dtype=torch.float32)


def builds(architecture: str) -> list[Build]:
    """Everything that the gate compiles for one architecture."""
    found = [*linear_builds(architecture), *rowwise_builds(architecture)]
    found += [*attention_builds(architecture), *conv_builds(architecture), *grouped_builds(architecture)]
    if find_architecture(architecture).has_hopper_kernel:
        found += hopper_builds()
    return found
