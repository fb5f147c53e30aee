"""Metrics of layers: each INT8 layer's output beside the float layer's, and how much is INT8."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.generate.capture import capture_layers
from int8run.layers.int8_conv import Int8Layer
from int8run.layers.plan import ATTENTION, FLOAT_FALLBACK, LayerPlan
from int8run.quant.weight import sqnr_db

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def measure_layer_outputs(
    float_denoiser: nn.Module,
    int8_denoiser: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    plans: Sequence[LayerPlan],
) -> None:
    """Add `output_sqnr_db` to the plan of every INT8 layer: both layers get the same input.

    Args:
        float_denoiser: whose activations are the inputs.
        int8_denoiser: with layers of the same names.
        calls: arguments of the float denoiser, by name.
        plans: of all layers; those of the INT8 layers are changed. Attentions are measured elsewhere.

    Raises:
        ConfigError: an INT8 layer computes NaN or infinity where the float layer does not.
    """
    plans_by_name = {plan.name: plan for plan in plans if plan.skip_reason is None and plan.kind != ATTENTION}

    def measure(name: str, x: Tensor, float_output: Tensor) -> None:
        layer = int8_denoiser.get_submodule(name)
        # In isolation: the float model's activation has run already.
        output = layer.forward_isolated(x) if isinstance(layer, Int8Layer) else layer(x)
        if not torch.isfinite(output).all():
            raise ConfigError(
                f"{name}: the INT8 layer computes NaN or infinity where the float layer does not, in the "
                "first step; choose another backend= or keep the layer float"
            )
        plans_by_name[name].measured["output_sqnr_db"] = sqnr_db(float_output, output)

    for call in calls:
        capture_layers(float_denoiser, call, list(plans_by_name), measure)


def count_macs(denoiser: nn.Module, calls: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Run the denoiser, and count the multiply-adds of every Linear and convolution in it, by name.

    Attention's own products are not counted.

    Args:
        denoiser: runs once for each call.
        calls: its arguments, by name; the results are sums over these calls.
    """
    macs: Counter[str] = Counter()
    layers = [name for name, module in denoiser.named_modules() if is_linear_or_convolution(module)]

    def count(name: str, x: Tensor, output: Tensor) -> None:
        macs[name] += output.numel() * count_macs_per_output(denoiser.get_submodule(name))

    for call in calls:
        capture_layers(denoiser, call, layers, count)
    return dict(macs)


def is_linear_or_convolution(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a weight; INT8 layers have `in_features`, too."""
    return hasattr(module, "in_features") or isinstance(module, CONVOLUTIONS)


def count_macs_per_output(layer: Any) -> int:
    """Multiply-adds for one number of a layer's output."""
    if hasattr(layer, "in_features"):
        return int(layer.in_features)
    weight: Tensor = layer.weight  # [out, in / groups, *kernel]
    return weight[0].numel()


def note_macs_shares(plans: Sequence[LayerPlan], macs: Mapping[str, int]) -> None:
    """Note in each plan its share of all multiply-adds.

    Args:
        plans: are changed.
        macs: multiply-adds in one step by name, of everything that was counted.
    """
    total = sum(macs.values())
    if not total:
        return
    for plan in plans:
        plan.macs_share = macs.get(plan.name, 0) / total


def compute_int8_shares(plans: Sequence[LayerPlan], num_params: int) -> dict[str, float]:
    """How much of the denoiser is INT8.

    Args:
        plans: of all layers, with their `macs_share`.
        num_params: of the denoiser.
    """
    int8_plans = [plan for plan in plans if plan.skip_reason is None]
    int8_params = sum(plan.num_weights for plan in int8_plans)
    return {
        "quant/macs_int8_share": sum(plan.macs_share or 0.0 for plan in int8_plans),
        "quant/params_int8_share": int8_params / max(1, num_params),
    }


def compute_layer_metrics(plans: Sequence[LayerPlan]) -> dict[str, float]:
    """Numbers of layers with weights, and mean and minimum of the ratios that were measured."""
    plans = [plan for plan in plans if plan.kind != ATTENTION]
    int8_plans = [plan for plan in plans if plan.skip_reason is None]
    metrics: dict[str, float] = {
        "quant/layers_int8": len(int8_plans),
        "quant/layers_float": len(plans) - len(int8_plans),
        "quant/fallback_layers": sum(map(is_fallback, int8_plans)),
        "quant/layers_float_by_choice": sum(plan.is_float_by_choice for plan in plans),
        "quant/layers_with_backends_left_out": sum(bool(plan.backends_left_out) for plan in plans),
    }
    metrics |= count_bits(int8_plans)
    for name in ("weight_sqnr_db", "output_sqnr_db"):
        values = [plan.measured[name] for plan in int8_plans if name in plan.measured]
        if values:
            metrics[f"quant/{name}_mean"] = sum(values) / len(values)
            metrics[f"quant/{name}_min"] = min(values)
    return metrics


def count_bits(int8_plans: Sequence[LayerPlan]) -> dict[str, float]:
    """How many layers have weights of 4 and 6 bits, and how many have 8 though fewer were asked for.

    Nothing where all have 8 and nothing else was asked for.
    """
    counts = Counter(plan.bits for plan in int8_plans)
    num_refused = sum(bool(plan.bits_reason) for plan in int8_plans)
    if not num_refused and set(counts) <= {8}:
        return {}
    return {
        "quant/layers_4_bits": counts[4],
        "quant/layers_6_bits": counts[6],
        "quant/layers_without_their_bits": num_refused,
    }


def compute_attention_metrics(plans: Sequence[LayerPlan]) -> dict[str, float]:
    """Numbers of attentions, and mean and minimum of the SQNR of those in INT8.

    Args:
        plans: of all layers; those of another kind are passed over.
    """
    attentions = [plan for plan in plans if plan.kind == ATTENTION]
    int8_plans = [plan for plan in attentions if plan.skip_reason is None]
    metrics: dict[str, float] = {
        "quant/attention_int8": len(int8_plans),
        "quant/attention_float": len(attentions) - len(int8_plans),
    }
    values = [plan.measured["output_sqnr_db"] for plan in int8_plans if "output_sqnr_db" in plan.measured]
    if values:
        metrics["quant/attention_sqnr_db_mean"] = sum(values) / len(values)
        metrics["quant/attention_sqnr_db_min"] = min(values)
    return metrics


def is_fallback(plan: LayerPlan) -> bool:
    """Whether a layer runs on another backend than the requested one, or in float for small batches."""
    is_replaced = plan.backend_asked not in ("auto", plan.backend_used)
    return is_replaced or plan.backend_used == FLOAT_FALLBACK


def count_module_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers, each tensor once; opaque packed weights count their logical size."""
    return count_tensor_bytes({*module.parameters(), *module.buffers()})


def count_own_bytes(module: nn.Module, other: nn.Module) -> int:
    """Bytes of the parameters and buffers that a module has and another has not.

    Args:
        module: whose tensors are counted.
        other: may share some of them, which are counted as its own.
    """
    tensors = {*module.parameters(), *module.buffers()}
    return count_tensor_bytes(tensors.difference(other.parameters(), other.buffers()))


def count_tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; opaque packed weights count their logical size."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
