"""What INT8 ControlNets cost and bring: their layers, the error of each, and their memory.

`run_metrics` calls `measure_controlnets`. The quality of a run as a whole includes their error.
"""

from collections.abc import Sequence

from torch import nn

from int8run.layers.plan_summary import select_int8_plans
from int8run.metrics.layers import count_own_bytes, measure_layer_outputs
from int8run.pipeline.controlnets import BuiltControlnet


def measure_controlnets(
    controlnets: Sequence[BuiltControlnet], denoiser: nn.Module, *, with_outputs: bool
) -> dict[str, float]:
    """The memory of a pipeline's ControlNets, and how many of their layers are INT8 and how exact.

    Args:
        controlnets: of the pipeline, one at least; their plans get the error of each layer's output.
        denoiser: that generates with them; what they share with it is not counted as theirs.
        with_outputs: whether those are measured; only where the float ControlNets are in memory.

    Returns:
        Metrics by their public names; without layers where the run has no INT8 model.
    """
    num_bytes = sum(count_own_bytes(controlnet.module, denoiser) for controlnet in controlnets)
    metrics: dict[str, float] = {"memory/controlnet_bytes": num_bytes}
    plans = [plan for controlnet in controlnets for plan in controlnet.plans]
    if not plans:
        return metrics
    if with_outputs:
        for controlnet in controlnets:
            measure_outputs(controlnet)
    int8_plans = select_int8_plans(plans)
    metrics |= {
        "memory/controlnet_ratio": sum(item.float_bytes for item in controlnets) / num_bytes,
        "controlnet/layers_int8": len(int8_plans),
        "controlnet/layers_float": len(plans) - len(int8_plans),
    }
    for name in ("weight_sqnr_db", "output_sqnr_db"):
        values = [plan.measured[name] for plan in int8_plans if name in plan.measured]
        if values:
            metrics[f"controlnet/{name}_min"] = min(values)
    return metrics


def measure_outputs(controlnet: BuiltControlnet) -> None:
    """Note in the plan of each INT8 layer how exact its output is, where the float layer is in memory."""
    if controlnet.float_module is None or controlnet.float_module is controlnet.module:
        return
    measure_layer_outputs(controlnet.float_module, controlnet.module, controlnet.calls, controlnet.plans)
