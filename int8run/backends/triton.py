"""int8run's own GPU kernels, in Triton. A layer takes two of them, without torch.compile.

The first passes over the input: GELU, factor, rotation, rounding and the first half of a LoRA branch. The
second is the product, with scales, bias and the second half of the branch.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import (
    NO_GELU,
    FusedBranch,
    Limits,
    PackedGroups,
    QuantizedInput,
    Shape,
    Timer,
)
from int8run.backends.branch_part import select_branch_part
from int8run.backends.grouped_tuning import GroupedKey, find_fastest_choice, has_float_scales
from int8run.backends.tile_check import find_wrong_tile
from int8run.backends.triton_tiles import (
    check_tile,
    grouped_tile_key,
    load_grouped_tiles,
    load_tiles,
    tile_key,
)
from int8run.errors import ConfigError
from int8run.kernels.grouped_weight.layout import (
    GROUP_MULTIPLE,
    PackedCodes,
    is_supported_group,
    pack_pieces,
    pack_scales,
    unpack_pieces,
    unpack_scales,
)
from int8run.kernels.grouped_weight.reference import pack_codes, unpack_codes
from int8run.kernels.grouped_weight.tile import fit_tile, shrink_tile
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.int8_linear.layouts import MAX_K
from int8run.kernels.int8_linear.tile import (
    AMD_ARCHITECTURES,
    BUCKETS,
    PORTABLE,
    Tile,
    find_bucket_index,
    list_candidates,
)
from int8run.kernels.triton_calls import MAX_RANK
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.weight import QuantizedWeight
from int8run.utils.hardware import get_gpu_architecture
from int8run.utils.paths import expand_path

log = logging.getLogger(__name__)
RANK_MULTIPLE = 16  # of what tensor cores take: ranks are padded with zeros


class Kernels(NamedTuple):
    """The functions that launch the Triton kernels."""

    quantize_rowwise: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    int8_linear: Callable[..., Tensor]
    grouped_linear: Callable[..., Tensor]
    decode_weight: Callable[..., Tensor]


@dataclass(frozen=True)
class Triton:
    """INT8 tensor cores; scales, bias and the low-rank branch in the product's registers.

    Args:
        tile: one tile for all shapes; None: what `task=bench` found for the shape on this GPU, else a default
            for its generation.
        table: file of measured tiles; None: the one that `backend=auto` uses.
    """

    tile: Tile | None = None
    table: str | None = None
    name: ClassVar[str] = "triton"
    limits: ClassVar[Limits] = Limits(
        devices=("cuda",),
        cuda_capability=(8, 0),
        amd_architectures=AMD_ARCHITECTURES,
        python_packages=("triton",),
        fuses_gelu=True,
        max_in_features=MAX_K,
    )

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """The integers as they are, [N, K]: one copy, K contiguous for the tensor cores."""
        n, k = weight.qdata.shape
        self.prepare_tiles(weight.qdata.device, k, n)
        return weight.qdata.contiguous()

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """x: [M, K] -> int8 [M, K], scales [M, 1] and, with `down`, its product with the transformed x."""
        if x.shape[0] == 0:  # an empty grid cannot be launched
            no_rows = x.new_empty(x.shape, dtype=torch.int8)
            return QuantizedInput(no_rows, scale=x.new_empty((0, 1), dtype=torch.float32))
        if x.shape[1] != 1 and x.stride(1) != 1:
            x = x.contiguous()
        if down is not None and down.dtype != x.dtype:  # an input that is not in the model's dtype
            down = down.to(x.dtype)
        q, scale, h = self.kernels.quantize_rowwise(
            x,
            factor=factor,
            rotation=0 if rotation is None else rotation.group,
            sylvester=rotation is not None and rotation.sylvester,
            gelu_from=NO_GELU if gelu_from is None else gelu_from,
            down=down,
        )
        return QuantizedInput(q, scale, down_product=None if down is None else h)

    def linear(
        self,
        x: QuantizedInput,
        packed: Tensor,
        w_scale: Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        branch: FusedBranch | None = None,
        strengths: Tensor | None = None,
    ) -> Tensor:
        """x: [M, K] -> [M, N].

        Raises:
            ValueError: for a branch whose product with x is missing: `quantize` computes it.
        """
        if x.q.shape[0] == 0:
            return x.q.new_empty((0, packed.shape[0]), dtype=dtype)
        rows, (n, k) = x.q.shape[0], packed.shape
        tile = self.tile or self.tiles[k, n][find_bucket_index(rows)]
        part = select_branch_part(x, branch, strengths)
        return self.kernels.int8_linear(
            x.q,
            x.scale,
            packed,
            w_scale,
            group=0,
            bias=bias,
            h=part.h,
            up=part.up,
            out_dtype=dtype,
            tile=tile,
            strengths=part.strengths,
        )

    def unsupported_group_reasons(self, weight: GroupedWeight) -> list[str]:
        """Groups that a tile's columns do not divide into."""
        group = weight.group_size
        if is_supported_group(group):
            return []
        return [f"groups of {group} columns are neither a divisor nor a multiple of {GROUP_MULTIPLE}"]

    def pack_grouped_weight(self, weight: GroupedWeight) -> PackedGroups:
        """Codes, scales and the table that decodes them, as `kernels/grouped_weight/layout.py` draws them."""
        n, k = weight.shape
        device, codebook = weight.codes.device, weight.codebook
        group_scale = pack_scales(weight.group_scale, weight.bits, codebook)
        is_float = has_float_scales(group_scale)
        key = (k, n, weight.bits, is_float)
        if key not in self.grouped_tiles:
            self.prepare_tiles(device, k, n)
            self.grouped_tiles[key] = self.load_grouped_tiles(device, k, n, weight.bits, is_float=is_float)
        return PackedGroups(
            codes=pack_pieces(unpack_codes(weight.codes, weight.bits), weight.bits),
            group_scale=group_scale,
            codebook=None if codebook is None else codebook.to(device, torch.float32).contiguous(),
            bits=weight.bits,
            group_size=weight.group_size,
        )

    def unpack_grouped_weight(self, packed: PackedGroups, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Codes [N, K * bits / 8] and group scales [N, K / g] as they were packed. shape: N and K."""
        rows, columns = shape
        codes = unpack_pieces(packed.codes, packed.bits, columns)
        return pack_codes(codes, packed.bits), unpack_scales(packed.group_scale, packed.bits, rows)

    def grouped_linear(
        self,
        x: QuantizedInput,
        packed: PackedGroups,
        w_scale: Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        branch: FusedBranch | None = None,
        strengths: Tensor | None = None,
    ) -> Tensor:
        """x: [M, K] -> [M, N].

        Raises:
            ValueError: for a branch whose product with x is missing: `quantize` computes it.
        """
        (rows, k), n = x.q.shape, packed.codes.shape[0]
        if rows == 0:
            return x.q.new_empty((0, n), dtype=dtype)
        weight = PackedCodes(*packed)
        tiles = self.grouped_tiles[k, n, packed.bits, has_float_scales(packed.group_scale)]
        tile = tiles[find_bucket_index(rows)]
        if tile is None:
            decoded = self.kernels.decode_weight(weight, k)
            return self.linear(
                x, decoded, w_scale, dtype=dtype, bias=bias, branch=branch, strengths=strengths
            )
        part = select_branch_part(x, branch, strengths)
        return self.kernels.grouped_linear(
            x.q,
            x.scale,
            weight,
            w_scale,
            bias=bias,
            h=part.h,
            up=part.up,
            out_dtype=dtype,
            tile=tile,
            strengths=part.strengths,
        )

    def fuse_branch(self, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> FusedBranch | None:
        """Both factors in the model's dtype, ranks padded with zeros.

        None beyond the rank that the kernel's registers hold.
        """
        if lora_A.shape[0] > MAX_RANK:
            return None
        missing = -lora_A.shape[0] % RANK_MULTIPLE
        down = F.pad(lora_A, (0, 0, 0, missing))  # [r, K] -> [r padded, K]
        up = F.pad(lora_B, (0, missing))  # [N, r] -> [N, r padded]
        return FusedBranch(
            down=down.to(dtype).contiguous(),
            up=up.to(dtype).contiguous(),
            needs_input=True,
            max_rank=MAX_RANK,
        )

    @cached_property
    def kernels(self) -> "Kernels":
        """The kernels, imported at the first call: machines without a GPU need not have Triton."""
        from int8run.kernels.grouped_weight.kernel import decode_weight, grouped_linear
        from int8run.kernels.int8_linear.kernel import int8_linear
        from int8run.kernels.quantize_rowwise.kernel import quantize_rowwise

        return Kernels(quantize_rowwise, int8_linear, grouped_linear, decode_weight)

    @cached_property
    def tiles(self) -> dict[tuple[int, int], tuple[Tile, ...]]:
        """For each (K, N) packed so far, a tile per bucket of rows. A backend serves GPUs of one kind."""
        return {}

    @cached_property
    def grouped_tiles(self) -> dict[GroupedKey, tuple[Tile | None, ...]]:
        """For each kind of weight packed so far, a tile per bucket of rows.

        None: the weight is decoded before the INT8 product, at each call.
        """
        return {}

    def prepare_tiles(self, device: torch.device, k: int, n: int) -> None:
        """Check the tile of the config, or find those for a shape, once; and import the kernels.

        Not at the product, because a compiled graph can neither read a file nor import.

        Raises:
            BackendError: for a tile that this GPU cannot run.
        """
        if self.tile is not None:
            check_tile(self.tile, device)
        elif (k, n) not in self.tiles:
            self.tiles[k, n] = self.load_tiles(device, k, n)
        if device.type == "cuda":
            _ = self.kernels

    def open_autotune_cache(self, device: torch.device) -> AutotuneCache:
        """What was measured on this GPU."""
        path = expand_path(self.table) if self.table else None
        return AutotuneCache(path, device)

    def load_tiles(self, device: torch.device, k: int, n: int) -> tuple[Tile, ...]:
        """A tile for each bucket of rows: the measured one, else the default of this GPU."""
        return load_tiles(self.open_autotune_cache(device), get_gpu_architecture(device), k, n)

    def load_grouped_tiles(
        self, device: torch.device, k: int, n: int, bits: int, *, is_float: bool
    ) -> tuple[Tile | None, ...]:
        """The same for weights of 4 or 6 bits; where the config names a tile, it alone, in whole spans.

        `is_float`: whether scales are float32.
        """
        tiles: tuple[Tile | None, ...]
        if self.tile is not None:
            tiles = (fit_tile(self.tile, bits),) * len(BUCKETS)
        else:
            architecture = get_gpu_architecture(device)
            tiles = load_grouped_tiles(self.open_autotune_cache(device), architecture, k, n, bits)
        if is_float:
            return tuple(tile and shrink_tile(tile, bits) for tile in tiles)
        return tiles

    def tune(self, timer: Timer, shape: Shape) -> None:
        """Time every candidate tile and keep the fastest of those that can run.

        Does nothing where the config names a tile.
        """
        if self.tile is not None:
            return
        rows, _, _ = shape
        candidates = list_candidates(get_gpu_architecture(timer.device), rows)
        tiles = {str(tile): tile for tile in candidates}
        times = timer.measure({name: replace(self, tile=tile) for name, tile in tiles.items()}, shape)
        for name, reason in times.failures.items():
            log.debug("%s is left out: %s", name, reason)
        for name in sorted(times.seconds, key=times.seconds.__getitem__):
            mistake = find_wrong_tile(tiles[name], shape, timer.device)
            if mistake is None:
                self.keep_tile(timer.device, shape, tiles[name])
                return
            log.warning("%s is left out: %s", name, mistake)

    def tune_grouped(self, timer: Timer, shape: Shape, bits: int) -> None:
        """As `tune`, for weights of 4 or 6 bits with scales of a byte, and for decoding them first."""
        rows, k, n = shape
        if self.tile is not None or k % GROUP_MULTIPLE:
            return
        choice = find_fastest_choice(lambda: replace(self), timer, shape, bits)
        if choice is None:
            return
        self.open_autotune_cache(timer.device).put(grouped_tile_key(rows, k, n, bits), choice)
        for key in [key for key in self.grouped_tiles if key[:3] == (k, n, bits)]:
            del self.grouped_tiles[key]

    def keep_tile(self, device: torch.device, shape: Shape, tile: Tile) -> None:
        """Remember the fastest tile for a shape on this GPU; layers that are packed from now on use it."""
        rows, in_features, out_features = shape
        fields = ",".join(map(str, tile.as_list()))
        self.open_autotune_cache(device).put(tile_key(rows, in_features, out_features), fields)
        self.tiles.pop((in_features, out_features), None)


def parse_tile(
    block_m: int | None,
    block_n: int | None,
    block_k: int | None,
    group_m: int | None,
    warps: int | None,
    stages: int | None,
    kernel: str | None = None,
) -> Tile | None:
    """The tile that a config names; None when it names none. `conf/backend/triton.yaml` calls it.

    The arguments are the fields of `Tile`, all of them or none; without a kernel it is the portable one.

    Raises:
        ConfigError: when it names some fields and not others, or a value that the kernel does not take.
    """
    fields = {
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "group_m": group_m,
        "warps": warps,
        "stages": stages,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    if not given and kernel is None:
        return None
    if len(given) < len(fields):
        missing = ", ".join(f"backend.tile.{name}" for name in fields if name not in given)
        raise ConfigError(f"backend.tile needs all of its fields or none; missing: {missing}")
    if kernel is None:
        kernel = PORTABLE
    try:
        return Tile(**given, kernel=kernel)
    except ValueError as error:
        raise ConfigError(f"backend.{error}") from error
