"""Which tile decodes weights of 4 and 6 bits fastest on a GPU, for the tuner of `backends/triton.py`.

Beside the tiles one other way is timed: the whole weight is decoded first and multiplied as INT8's. With many
rows every tile of the product would decode the same codes again.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from int8run.backends.base import (
    Backend,
    FusedBranch,
    Limits,
    MultipliesGroupedWeights,
    PackedGroups,
    QuantizedInput,
    Shape,
    Timer,
)
from int8run.backends.run_errors import find_run_failure
from int8run.backends.tile_check import SAMPLED_COLUMNS, SAMPLED_ROWS, spread
from int8run.backends.triton_tiles import AHEAD
from int8run.kernels.grouped_weight.reference import pack_codes
from int8run.kernels.grouped_weight.tile import list_grouped_candidates
from int8run.kernels.hadamard.reference import Rotation
from int8run.kernels.int8_linear import reference
from int8run.kernels.int8_linear.tile import BUCKETS, Tile
from int8run.quant.grouped_weight import GroupedWeight
from int8run.quant.weight import QuantizedWeight
from int8run.utils.hardware import get_gpu_architecture

log = logging.getLogger(__name__)
SEED = 0
# a kind of weight: K, N, bits, whether scales are float32; no dtype, of which torch.compile makes no guard
GroupedKey = tuple[int, int, int, bool]
GROUP = 16  # columns that share a scale, as in most files


class TiledBackend(Backend, MultipliesGroupedWeights, Protocol):
    """The Triton backend."""

    @property
    def grouped_tiles(self) -> dict[GroupedKey, tuple[Tile | None, ...]]:
        """For each kind of weight a tile per bucket of rows; None: decoded first."""
        ...


@dataclass(frozen=True)
class GroupedProbe:
    """A backend whose weights have few bits, as a timer calls it; their values do not matter for the time.

    Args:
        backend: one of its own.
        choice: the tile that it takes for every number of rows; None: the weight is decoded first.
        bits: 4 or 6.
        packed: the weight that was packed last.
    """

    backend: TiledBackend
    choice: Tile | None
    bits: int
    packed: list[PackedGroups] = field(default_factory=list)
    name: ClassVar[str] = "triton"
    limits: ClassVar[Limits] = Limits()

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """Random codes for a weight of this shape."""
        n, k = weight.qdata.shape
        grouped = draw_grouped_weight(n, k, self.bits, weight.qdata.device)
        self.packed[:] = [self.pack_grouped_weight(grouped)]
        return self.packed[0].codes

    def pack_grouped_weight(self, weight: GroupedWeight) -> PackedGroups:
        """A weight, with this choice for its shape."""
        packed = self.backend.pack_grouped_weight(weight)
        n, k = weight.shape
        key = (k, n, self.bits, has_float_scales(packed.group_scale))
        self.backend.grouped_tiles[key] = (self.choice,) * len(BUCKETS)
        return packed

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """As the backend."""
        return self.backend.quantize(x, factor=factor, rotation=rotation, gelu_from=gelu_from, down=down)

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
        """The product with the weight that was packed last."""
        return self.backend.grouped_linear(
            x, self.packed[0], w_scale, dtype=dtype, bias=bias, branch=branch, strengths=strengths
        )


def has_float_scales(group_scale: Tensor) -> bool:
    """Whether packed scales are float32, and not bytes."""
    return group_scale.dtype == torch.float32


def find_fastest_choice(
    make_backend: Callable[[], TiledBackend], timer: Timer, shape: Shape, bits: int
) -> str | None:
    """What is fastest of all that runs and computes what it should, as the autotune cache keeps it.

    Args:
        make_backend: a Triton backend for each choice.
        timer: of the GPU.
        shape: of the layer: rows, input and output features.
        bits: of the weight.

    Returns:
        A tile's fields, or `AHEAD`; None where nothing runs.
    """
    rows, _, _ = shape
    choices: dict[str, Tile | None] = {AHEAD: None}
    for tile in list_grouped_candidates(get_gpu_architecture(timer.device), rows, bits):
        choices[",".join(map(str, tile.as_list()))] = tile
    probes = {name: GroupedProbe(make_backend(), choice, bits) for name, choice in choices.items()}
    times = timer.measure(probes, shape)
    for name, reason in times.failures.items():
        log.debug("%s for %d bits is left out: %s", name, bits, reason)
    for name in sorted(times.seconds, key=times.seconds.__getitem__):
        mistake = find_wrong_choice(probes[name], shape, timer.device)
        if mistake is None:
            return name
        log.warning("tile %s for %d bits is left out: %s", name, bits, mistake)
    return None


def find_wrong_choice(probe: GroupedProbe, shape: Shape, device: torch.device) -> str | None:
    """Why a fast choice must not be kept; None where its results are those of the definition."""
    differences: list[str | None] = []
    failure = find_run_failure(lambda: differences.append(find_difference(probe, shape, device)), device)
    return failure if failure is not None else differences[0]


def find_difference(probe: GroupedProbe, shape: Shape, device: torch.device) -> str | None:
    """How some rows and columns of a product differ from the definition's on the CPU; None: not at all.

    Scales are powers of two, so that results are equal to the last bit.
    """
    rows, k, n = shape
    generator = torch.Generator(device=device).manual_seed(SEED)
    q = torch.empty(rows, k, dtype=torch.int8, device=device).random_(-127, 128, generator=generator)
    x = QuantizedInput(q, torch.full((rows, 1), 2.0**-10, device=device))
    weight = draw_grouped_weight(n, k, probe.bits, device)
    w_scale = torch.full((n,), 0.5, device=device)
    packed = probe.pack_grouped_weight(weight)
    y = probe.backend.grouped_linear(x, packed, w_scale, dtype=torch.float32)

    sampled_rows, sampled_columns = spread(rows, SAMPLED_ROWS), spread(n, SAMPLED_COLUMNS)
    on_device = sampled_columns.to(device)
    sample = GroupedWeight(
        codes=weight.codes[on_device].cpu(),
        group_scale=weight.group_scale.view(torch.uint8)[on_device].cpu().view(torch.float8_e4m3fn),
        scale=weight.scale[on_device].cpu(),
        bits=probe.bits,
        codebook=None if weight.codebook is None else weight.codebook.cpu(),
    )
    expected = reference.int8_linear(
        q[sampled_rows.to(device)].cpu(),
        x.scale[sampled_rows.to(device)].cpu(),
        sample.decode().qdata,
        w_scale[on_device].cpu(),
        None,
    )
    found = y[sampled_rows.to(device)][:, on_device].cpu()
    return None if torch.equal(found, expected) else "its sums differ from the definition's"


def draw_grouped_weight(n: int, k: int, bits: int, device: torch.device) -> GroupedWeight:
    """A random weight [n, k], the same each time: of 4 bits with a codebook."""
    generator = torch.Generator(device=device).manual_seed(SEED)
    codes = torch.empty(n, k, dtype=torch.uint8, device=device).random_(0, 2**bits, generator=generator)
    group_scale = torch.rand(n, k // GROUP, device=device, generator=generator) * 127
    codebook = None
    if bits == 4:
        codebook = torch.linspace(-0.98, 0.98, 16, device=device)
    else:
        group_scale /= 2 ** (bits - 1)
    return GroupedWeight(
        codes=pack_codes(codes, bits),
        group_scale=group_scale.to(torch.float8_e4m3fn),
        scale=torch.full((n, 1), 2.0**-10, device=device),
        bits=bits,
        codebook=codebook,
    )
