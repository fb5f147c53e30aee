"""Read INT8 layers that need not be made, and check that they were made from the model's float weights.

`quantize_denoiser.py` calls it, with what `prequantized.py` found.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from int8run.errors import FileError
from int8run.layers.int8_conv import get_layer
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import LayerPlan
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.prequantized import PrequantizedLayers, get_layer_facts
from int8run.ptq.quantize import check_weight
from int8run.quant.grouped_weight import count_bits
from int8run.quant.weight import quantize_weight, sqnr_db

# an INT8 weight has 30 dB and more; another model's weight 0
MIN_SQNR_DB = 15.0
# by how much a rounding that fits the layer's output may be worse than the nearest integers
MAX_ROUNDING_LOSS_DB = 6.0


def read_prequantized_layers(
    loaded: LoadedModel,
    plans: Sequence[LayerPlan],
    found: PrequantizedLayers,
    read_weight: Callable[[str], Tensor],
) -> Iterator[tuple[LayerPlan, QuantizedLayer]]:
    """Read the layers of a file, each compared with the float weight where that comes from elsewhere.

    Args:
        loaded: the model.
        plans: of the layers; what is known of each is put there.
        found: the file.
        read_weight: gives the float weight of a layer by its name.

    Raises:
        FileError: when a layer was made from another weight.
    """
    facts_by_layer = get_layer_facts(found.provenance, "layers")
    for plan in plans:
        layer = read_prequantized_layer(loaded, plan, found)
        facts = facts_by_layer.get(plan.name)
        if isinstance(facts, Mapping):
            plan.outlier_skip_reason = str(facts.get("outlier_why_not", ""))
            plan.bits_reason = str(facts.get("bits_why_not", ""))
            plan.measured |= {name: value for name, value in facts.items() if isinstance(value, float)}
        if not found.is_cached and found.weights is not loaded.checkpoint:
            check_against_float(plan, layer, read_weight(plan.name).flatten(1), found.source)
        plan.measured.setdefault("saturated_share", layer.weight.saturated_share)
        yield plan, layer


def read_prequantized_layer(
    loaded: LoadedModel, plan: LayerPlan, found: PrequantizedLayers
) -> QuantizedLayer:
    """Read one layer of a file, with the bias of the float model, on the device."""
    layer = found.weights.read_int8_layer(plan.name)
    layer.transform.to(loaded.device)
    weight = layer.weight.to(loaded.device)
    plan.bits = count_bits(weight)
    plan.outlier = layer.transform.label
    plan.rounding = found.rounding
    return QuantizedLayer(weight, layer.transform, get_layer(loaded.denoiser, plan.name).bias)


def check_against_float(plan: LayerPlan, layer: QuantizedLayer, weight: Tensor, source: str) -> None:
    """Check that a layer of a file was made from the model's float weight; the plan gets how near it is.

    Args:
        plan: of the layer.
        layer: as it is in the file.
        weight: float, [N, K].
        source: the file, for messages.

    Raises:
        FileError: when it was made from another weight.
    """
    check_weight(plan, weight)
    # In the basis in which it was quantized: transformed back, a factor would make a good weight look bad in
    # columns that the input hardly uses.
    transformed = layer.transform.transform_weight(weight.float())
    sqnr = sqnr_db(transformed, layer.weight.dequantize())
    # In a wide layer with one huge weight per row, not even the nearest integers come near the usual SQNR.
    nearest_sqnr = sqnr_db(transformed, quantize_weight(transformed).dequantize())
    min_sqnr = min(MIN_SQNR_DB, nearest_sqnr - MAX_ROUNDING_LOSS_DB)
    if not sqnr >= min_sqnr:  # also for NaN
        raise FileError(
            f"{source}: {plan.name} does not hold this model's weight (SQNR {sqnr:.1f} dB, at least "
            f"{min_sqnr:.0f} expected); it was made from another checkpoint, or with LoRAs baked in"
        )
    plan.measured.setdefault("weight_sqnr_db", sqnr)  # that of the file was summed in another order
