"""Whether a backend computes the right numbers on this machine, by small layers of each width.

`auto` asks before a backend takes part. The reference, on the CPU, says what is right.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from int8run.backends.base import Backend, run_plain_layer
from int8run.backends.reference import Reference
from int8run.backends.row_decoder import RowDecoder, choose_multiplier, run_grouped_layer
from int8run.backends.run_errors import find_run_failure
from int8run.quant.grouped_rounding import GroupLayout, draw_grouped_weight
from int8run.quant.weight import QuantizedWeight

CPU = torch.device("cpu")  # the definition computes in float64, which some GPUs do not have
ROWS, OUT_FEATURES = 8, 16  # not alike, so that a transposed result has another shape
# bfloat16 rounds to 0.4 %, and one step of a rounded input is 0.8 % of the largest
MAX_RANDOM_ERROR = 0.03


@dataclass(frozen=True)
class CheckedLayer:
    """A layer whose result is known.

    Args:
        x: float [8, K].
        weight: [16, K].
        max_error: how far the result may be from the reference, as a share of its largest number.
        fault: what is wrong with a backend that is farther from it.
    """

    x: Tensor
    weight: QuantizedWeight
    max_error: float
    fault: str

    def run(self, backend: Backend, device: torch.device) -> Tensor:
        """The result of a backend, float32 [8, 16] on the CPU."""
        weight = QuantizedWeight(self.weight.qdata.to(device), self.weight.scale.to(device))
        packed, scale = backend.pack_weight(weight), weight.scale[:, 0].contiguous()
        return run_plain_layer(backend, self.x.to(device), packed, scale, bias=None).float().cpu()

    def find_fault(self, backend: Backend, device: torch.device) -> str | None:
        """Why a backend cannot be used, because it does not run or is wrong; None: it can."""
        results: list[Tensor] = []
        failure = find_run_failure(lambda: results.append(self.run(backend, device)), device)
        if failure is not None:
            return failure
        (found,) = results
        expected = self.run(Reference(), CPU)
        if found.shape != expected.shape:
            return self.fault
        is_close = (found - expected).abs().max() <= self.max_error * expected.abs().max()
        return None if is_close else self.fault


def make_largest_sums(in_features: int) -> CheckedLayer:
    """+127 everywhere, which makes the largest sums there are; in float32, for they pass float16's range."""
    return CheckedLayer(
        x=torch.ones(ROWS, in_features),
        weight=QuantizedWeight(
            qdata=torch.full((OUT_FEATURES, in_features), 127, dtype=torch.int8),
            scale=torch.ones(OUT_FEATURES, 1),
        ),
        max_error=1e-3,
        fault="its sums saturate on this machine",
    )


def make_random_layer(in_features: int, dtype: torch.dtype) -> CheckedLayer:
    """Random integers and scales, the same ones at each call, and an input in the model's dtype."""
    generator = torch.Generator().manual_seed(0)
    size = (OUT_FEATURES, in_features)
    qdata = torch.randint(-127, 128, size, generator=generator, dtype=torch.int8)
    scale = torch.rand(OUT_FEATURES, 1, generator=generator).add(0.5) / (127 * in_features**0.5)
    return CheckedLayer(
        x=torch.randn(ROWS, in_features, generator=generator).to(dtype),
        weight=QuantizedWeight(qdata, scale),
        max_error=MAX_RANDOM_ERROR,
        fault="its products of random numbers are wrong on this machine",
    )


def find_wrong_result(
    backend: Backend, in_features: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a backend cannot be used for layers of this width on this machine; None: it can.

    Args:
        backend: to be checked.
        in_features: of the layers.
        device: where they run.
        dtype: of the model.
    """
    for make_layer in (make_largest_sums, partial(make_random_layer, dtype=dtype)):
        fault = make_layer(in_features).find_fault(backend, device)
        if fault is not None:
            return fault
    return None


def find_wrong_grouped_result(
    backend: Backend, in_features: int, layout: GroupLayout, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a backend cannot be used for weights of 4 or 6 bits of this width; None: it can.

    Args:
        backend: to be checked; one that has no product of its own for them is not.
        in_features: of the layers.
        layout: bits and group size.
        device: where they run.
        dtype: of the model.
    """
    generator = torch.Generator().manual_seed(0)
    weight = draw_grouped_weight(OUT_FEATURES, in_features, layout, generator)
    on_device = weight.to(device)
    multiplier = choose_multiplier(backend, on_device)
    if isinstance(multiplier, RowDecoder):
        return None
    x = torch.randn(ROWS, in_features, generator=generator).to(dtype)
    results: list[Tensor] = []

    def run() -> None:
        packed, scale = multiplier.pack_grouped_weight(on_device), on_device.scale[:, 0].contiguous()
        results.append(run_grouped_layer(backend, multiplier, x.to(device), packed, scale, bias=None))

    failure = find_run_failure(run, device)
    if failure is not None:
        return failure
    decoded = weight.decode()
    expected = run_plain_layer(Reference(), x, decoded.qdata, decoded.scale[:, 0], bias=None).float()
    found = results[0].float().cpu()
    is_close = found.shape == expected.shape and bool(
        (found - expected).abs().max() <= MAX_RANDOM_ERROR * expected.abs().max()
    )
    return None if is_close else f"its products with {layout.bits}-bit weights are wrong on this machine"
