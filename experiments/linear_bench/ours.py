"""Our layers, built as the runner builds them.

What the benchmarks know about int8run's own interfaces is in this file.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor, nn

from int8run.backends.base import Backend
from int8run.errors import BackendError
from int8run.kernels.quantize_rowwise.reference import quantize_rowwise
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.layers.plan import Int8Settings, plan_layers
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.ptq.quantize import build_int8_layers, check_backend, quantize_layers
from int8run.quant.rounding import AbsMax
from int8run.quant.weight import quantize_weight

CPU_BACKENDS = {"reference": "Reference", "torch_int_mm": "TorchIntMM", "onednn": "OneDnn", "cpu": "Cpu"}
GROUP_M = 8  # blocks of rows that share a column of the weight
OUTLIERS = {"none": NoOutlier(), "convrot": ConvRot(256)}


def make_backend(name: str, class_name: str, **settings: Any) -> Backend:
    """The backend `int8run.backends.NAME.CLASS`.

    Raises:
        BackendError: when this int8run has no such backend.
    """
    try:
        module = importlib.import_module(f"int8run.backends.{name}")
    except ModuleNotFoundError as error:
        raise BackendError(f"this int8run has no backend {name}") from error
    return getattr(module, class_name)(**settings)


def int8_layer(case: Case, chosen: Backend, outlier: str = "none") -> nn.Module:
    """An `Int8Linear` through the runner's own loops, with its default settings.

    Raises:
        BackendError: when the backend cannot run on the case's device.
    """
    model = case.linear()
    plans = plan_layers(model, lambda name: None)
    check_backend(chosen, case.x.device, plans)
    layers = quantize_layers(model, plans, methods={"0": OUTLIERS[outlier]}, rounding=AbsMax(), statistics={})
    return build_int8_layers(
        model, layers, backend=chosen, settings=Int8Settings(), rows={"0": case.x.shape[0]}
    )["0"]


def with_branch(case: Case, layer: Any) -> nn.Module:
    """The layer with the case's LoRA beside it, attached as the runner attaches a stack."""
    assert case.lora_A is not None and case.lora_B is not None
    branch = LowRankBranch([(case.lora_A, case.lora_B)], case.x.dtype, case.x.device)
    branch.fuse_into_backend(layer.backend, layer.transform)
    branch.set_strengths([1.0])
    layer.adapter = branch
    return layer


@dataclass
class NaiveBranch:
    """The layer with the case's LoRA as two float products and a sum."""

    layer: nn.Module
    lora_A: Tensor
    lora_B: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def triton_backend(device: torch.device, tile: Any = None) -> Backend:
    """The Triton backend, with its own choice of tile or a given one; on a CPU its definition."""
    if device.type == "cpu":
        return make_backend("reference", "Reference")
    return make_backend("triton", "Triton", **({} if tile is None else {"tile": tile}))


def triton_tiles(case: Case, wanted: Sequence[str] | None = None) -> list[Any]:
    """What a tuner should try for this case.

    Where tiles are wanted these, and the one in use, which they have to beat.

    Raises:
        NotImplementedError: on a CPU.
    """
    from int8run.kernels.int8_linear.tile import list_candidates
    from int8run.utils.hardware import get_gpu_architecture

    if case.x.device.type == "cpu":
        raise NotImplementedError("a CPU has no tiles")
    if wanted is not None:
        return [find_tile_in_use(case), *map(parse_tile, wanted)]
    return list_candidates(get_gpu_architecture(case.x.device), case.x.shape[0])


def find_tile_in_use(case: Case) -> Any:
    """The tile that the backend takes for this case: a measured one, else a default."""
    from int8run.kernels.int8_linear.tile import BUCKETS, find_bucket

    rows, in_features, out_features = case.shape
    tiles = make_backend("triton", "Triton").load_tiles(case.x.device, in_features, out_features)
    return tiles[BUCKETS.index(find_bucket(rows))]


def keep_tile(case: Case, tile: Any, table: str | None = None) -> None:
    """Keep the fastest tile of a case where `backend=triton` and `backend=auto` look for it.

    Args:
        case: that it was measured with.
        tile: the fastest.
        table: file of measured tiles; None: the user's.
    """
    make_backend("triton", "Triton", table=table).keep_tile(case.x.device, case.shape, tile)


def parse_tile(text: str) -> Any:
    """The tile that `128x256x128/8/3` means, its block, warps and stages; `/hopper` names the kernel."""
    from int8run.kernels.int8_linear.tile import Tile

    block, warps, stages, *kernel = text.split("/")
    block_m, block_n, block_k = map(int, block.split("x"))
    return Tile(block_m, block_n, block_k, GROUP_M, int(warps), int(stages), *kernel)


def triton_product(case: Case) -> Callable[[Any], Tensor]:
    """The product of the Triton kernel alone, x quantized before: from a tile to y."""
    from int8run.kernels.int8_linear.kernel import int8_linear

    weight, (q, x_scale) = quantize_weight(case.weight), quantize_rowwise(case.x)
    w_scale = weight.scale[:, 0].contiguous()
    return lambda tile: int8_linear(
        q, x_scale, weight.qdata, w_scale, 0, case.bias, None, None, case.x.dtype, tile
    )
