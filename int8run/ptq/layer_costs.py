"""What a transform or a LoRA branch costs a layer in time, measured on this machine and remembered.

`outlier=auto` asks for the cost of each candidate method, and `lora.mode=auto` for that of runtime branches.
A cost is a ratio: the time of the changed layer over that of the plain one.
"""

import logging
import math
from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from int8run.backends.auto import AutoBackend, BackendChooser
from int8run.backends.autotune_cache import open_cache_of, parse_ratio
from int8run.backends.base import Backend, describe_settings
from int8run.backends.convolution import ConvBackend, ConvGeometry
from int8run.backends.run_errors import find_run_failure
from int8run.layers.grouped_int8_linear import GroupedInt8Linear, make_int8_linear
from int8run.layers.int8_conv import Int8Conv, Int8Layer
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.outlier.base import OutlierTransform
from int8run.quant.grouped_rounding import GroupLayout, draw_grouped_weight
from int8run.quant.grouped_weight import LayerWeight
from int8run.quant.weight import quantize_weight
from int8run.utils.timing import is_steady, time_in_turns

log = logging.getLogger(__name__)

# how often each layer is timed
ROUNDS = 15


class LayerCosts:
    """Times of a changed layer over those of the plain one, each measured once.

    Args:
        backend: of the config.
        device: where the layers run.
        dtype: of the float model.
    """

    def __init__(self, backend: Backend, device: torch.device, dtype: torch.dtype):
        self.cache = open_cache_of(backend, device, dtype)
        self.backend, self.device, self.dtype = backend, device, dtype
        self.measured: dict[str, float] = {}

    def look_up(self, key: str) -> float | None:
        """A ratio that was measured in this process or in one before."""
        return self.measured.get(key) or parse_ratio(self.cache.get(key))

    def random_tensor(self, *shape: int) -> Tensor:
        """Normal numbers, drawn on the device, the same ones at each call."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.device)

    def random_rows(self, rows: int, in_features: int) -> Tensor:
        """The input of a Linear, [1, M, K], in the dtype of the float model."""
        return self.random_tensor(1, rows, in_features).to(self.dtype)

    def draw_weight(self, rows: int, columns: int, layout: GroupLayout | None) -> LayerWeight:
        """A random weight [N, K] with the bits of a layout; None: with 8."""
        if layout is None:
            return quantize_weight(self.random_tensor(rows, columns))
        generator = torch.Generator(self.device).manual_seed(0)
        return draw_grouped_weight(rows, columns, layout, generator)

    @torch.no_grad()
    def measure_ratio(self, key: str, plain: Int8Layer, changed: Int8Layer, x: Tensor) -> float:
        """The ratio of the shortest times, of calls that take turns.

        Not the ratio of medians: other work on the machine adds to the medians and would double the ratio.
        A measurement that scatters is used in this process and not kept for later runs. A change that
        cannot run here costs infinitely much, so that nothing chooses it.

        Args:
            key: of the ratio in the cache.
            plain: the layer without the change.
            changed: the layer with it.
            x: what both compute.
        """
        failure = find_run_failure(partial(changed, x), self.device)
        if failure is not None:
            log.warning("%s: left out, because it cannot run here: %s", key, failure)
            self.measured[key] = math.inf
            return math.inf
        seconds = time_in_turns([partial(plain, x), partial(changed, x)], self.device, ROUNDS)
        plain_seconds, changed_seconds = map(min, seconds)
        ratio = round(changed_seconds / plain_seconds, 3)
        self.measured[key] = ratio
        if all(map(is_steady, seconds)):
            self.cache.put(key, str(ratio))
        else:
            log.warning(
                "%s: times scatter by more than twice: other work runs here; measured anew next time", key
            )
        return ratio


class TransformCosts(LayerCosts):
    """Time of an INT8 layer with an outlier transform over its time without, on the layer's backend."""

    @cached_property
    def chooser(self) -> BackendChooser | None:
        """What chooses the backend of a shape; None where the config names one backend."""
        if not isinstance(self.backend, AutoBackend):
            return None
        return self.backend.make_chooser(self.device, self.dtype)

    def get_ratio(
        self,
        transform: OutlierTransform,
        shape: tuple[int, int, int],
        sharing: int = 1,
        layout: GroupLayout | None = None,
    ) -> float:
        """The ratio for a layer; it depends on the steps of the transform, not on its numbers.

        Args:
            transform: of the layer.
            shape: rows, in_features and out_features.
            sharing: how many layers read the same tensor. One transform serves them all, unless it centers
                with factors of a single weight.
            layout: of a weight with 4 or 6 bits; None: it has 8.
        """
        extra = self.get_ratio_alone(transform, shape, layout) - 1
        if transform.centered:
            return 1 + extra
        return 1 + extra / sharing

    def get_ratio_alone(
        self, transform: OutlierTransform, shape: tuple[int, int, int], layout: GroupLayout | None = None
    ) -> float:
        """The ratio for a layer that shares its input with no other."""
        steps = describe_transform(transform)
        if not steps:
            return 1.0
        rows, in_features, out_features = shape
        backend = self.backend
        if self.chooser is not None:
            backend = self.chooser.choose_layer(shape, layout).backend
        key = f"cost of {steps} | {describe_settings(backend)} | {rows}x{in_features}x{out_features}"
        if layout is not None:
            key += f" | {layout.label}"
        known = self.look_up(key)
        if known is not None:
            return known
        weight = self.draw_weight(out_features, in_features, layout)
        plain = QuantizedLayer(weight, OutlierTransform(), bias=None)
        changed = QuantizedLayer(weight, transform.to(self.device), bias=None)
        return self.measure_ratio(
            key,
            make_int8_linear(plain, backend, self.dtype),
            make_int8_linear(changed, backend, self.dtype),
            self.random_rows(rows, in_features),
        )


class BranchCosts(LayerCosts):
    """Time of an INT8 layer with a low-rank branch over its time without."""

    def get_ratio(self, layer: Int8Linear, rank: int, rows: int) -> float:
        """The ratio for a layer of this shape and backend; it does not depend on the branch's numbers.

        Args:
            layer: any of that shape, on the backend that runs it.
            rank: of all LoRAs together.
            rows: that it sees in one call.
        """
        shape = f"{rows}x{layer.in_features}x{layer.out_features}"
        # the backend with its settings, because these change what a branch costs
        key = f"cost of a branch of rank {rank} | {layer.backend!r} | {shape}"
        layout = find_layout(layer)
        if layout is not None:
            key += f" | {layout.label}"
        known = self.look_up(key)
        if known is not None:
            return known
        weight = self.draw_weight(layer.out_features, layer.in_features, layout)
        quantized = QuantizedLayer(weight, OutlierTransform(), bias=None)
        plain = make_int8_linear(quantized, layer.backend, self.dtype)
        changed = make_int8_linear(quantized, layer.backend, self.dtype)
        changed.adapter = self._make_branch(changed, rank)
        return self.measure_ratio(key, plain, changed, self.random_rows(rows, layer.in_features))

    def _make_branch(self, layer: Int8Linear, rank: int) -> LowRankBranch:
        lora_A = self.random_tensor(rank, layer.in_features)
        lora_B = self.random_tensor(layer.out_features, rank)
        branch = LowRankBranch([(lora_A, lora_B)], self.dtype, self.device)
        if layer.can_fuse_branch:
            branch.fuse_into_backend(layer.backend, OutlierTransform())
        branch.set_strengths([1.0])
        return branch


def find_layout(layer: Int8Linear) -> GroupLayout | None:
    """The groups of a layer with 4 or 6 bits; None of one with 8."""
    if isinstance(layer, GroupedInt8Linear):
        return GroupLayout(layer.bits, layer.group_size)
    return None


def describe_convolution(layer: Int8Conv, input_shape: Sequence[int]) -> str:
    """What the time of a convolution depends on: its geometry, the shapes, and what computes it.

    Args:
        layer: the INT8 one.
        input_shape: [B, C, *size].
    """
    key = describe_plain_convolution(layer.geometry, layer.out_features, input_shape, layer.backend)
    steps = describe_transform(layer.transform)
    if steps:
        key += f" | {steps}"
    if layer.deferred is not None:
        key += f" | after {layer.deferred.label}"
    return key


def describe_plain_convolution(
    geometry: ConvGeometry, outputs: int, input_shape: Sequence[int], backend: ConvBackend
) -> str:
    """The same of one without an outlier method, before there is a layer.

    Args:
        geometry: of the convolution.
        outputs: its output channels.
        input_shape: [B, C, *size].
        backend: computes it.
    """
    sizes = "x".join(map(str, input_shape))
    return f"convolution {geometry.label} padding {geometry.padding} | {sizes} -> {outputs} | {backend!r}"


def describe_transform(transform: OutlierTransform) -> str:
    """The steps of a transform on the input, as far as its time depends on them; empty without any."""
    steps = []
    if transform.centered:
        steps.append("centering")
    if transform.factor is not None:
        steps.append("factor")
    if transform.group_size:
        kind = "Sylvester" if transform.sylvester else "regular"
        steps.append(f"{kind} rotation of {transform.group_size}")
    return ", ".join(steps)
