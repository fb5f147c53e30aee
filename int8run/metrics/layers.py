"""Per-layer fidelity: each INT8 layer's output beside the float layer's, on real activations; and memory."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.generate.capture import capture_layers
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.plan import FLOAT_FALLBACK, LayerPlan
from int8run.quant.weight import sqnr_db

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def measure_layer_outputs(
    float_denoiser: nn.Module,
    int8_denoiser: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    plans: Sequence[LayerPlan],
) -> None:
    """Add `output_sqnr_db` to the plan of every INT8 layer: the same input through both layers."""
    by_name = {p.name: p for p in plans if p.skip_reason is None}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        layer = int8_denoiser.get_submodule(name)
        # the float model's activation has run already
        ours = layer.compute(x, gelu_from=-1, shared=None) if isinstance(layer, Int8Linear) else layer(x)
        if not torch.isfinite(ours).all():
            raise ConfigError(
                f"{name}: the INT8 layer computes NaN or infinity where the float layer does not, in the first step; "
                f"choose another backend= or keep the layer float"
            )
        by_name[name].measured["output_sqnr_db"] = sqnr_db(y, ours)

    for call in calls:
        capture_layers(float_denoiser, call, list(by_name), see)


def count_macs(denoiser: nn.Module, calls: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Multiply-adds of every Linear and convolution in these calls, by name. Attention's products are not counted."""
    found: Counter[str] = Counter()
    layers = [
        n for n, m in denoiser.named_modules() if hasattr(m, "in_features") or isinstance(m, CONVOLUTIONS)
    ]

    def see(name: str, x: Tensor, y: Tensor) -> None:
        layer: Any = denoiser.get_submodule(name)
        found[name] += y.numel() * (
            layer.in_features if hasattr(layer, "in_features") else layer.weight[0].numel()
        )

    for call in calls:
        capture_layers(denoiser, call, layers, see)
    return dict(found)


def compute_int8_shares(plans: Sequence[LayerPlan], work: Mapping[str, int], params: int) -> dict[str, float]:
    """How much of the denoiser is INT8.

    Args:
        work: multiply-adds by layer.
        params: numbers in the denoiser's parameters.
    """
    int8 = [p for p in plans if p.skip_reason is None]
    return {
        "quant/macs_int8_share": sum(work.get(p.name, 0) for p in int8) / max(1, sum(work.values())),
        "quant/params_int8_share": sum(p.in_features * p.out_features for p in int8) / max(1, params),
    }


def compute_layer_metrics(plans: Sequence[LayerPlan]) -> dict[str, float]:
    """Counts, and mean and minimum of the per-layer ratios."""
    int8 = [p for p in plans if p.skip_reason is None]
    values: dict[str, float] = {
        "quant/layers_int8": len(int8),
        "quant/layers_float": len(plans) - len(int8),
        "quant/fallback_layers": sum(
            p.backend_asked not in ("auto", p.backend_used) or p.backend_used == FLOAT_FALLBACK for p in int8
        ),
    }
    for name in ("weight_sqnr_db", "output_sqnr_db"):
        measured = [p.measured[name] for p in int8 if name in p.measured]
        if measured:
            values[f"quant/{name}_mean"] = sum(measured) / len(measured)
            values[f"quant/{name}_min"] = min(measured)
    return values


def count_module_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each tensor once; opaque packed weights count their logical size."""
    return sum(t.numel() * t.element_size() for t in {*module.parameters(), *module.buffers()})
