"""Calibration: the float model generates a few images, and every layer's input is sampled on the way.

`int8run.pipeline.quantize_denoiser` calls it when the outlier method, the rounding or the mixed precision
search needs activations. The calibration prompts are other ones than those a result is judged by.
"""

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.backends.convolution import ConvGeometry, read_geometry
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.generate.capture import capture_calls, capture_layers, check_finite
from int8run.generate.prompts import split_batches
from int8run.layers.int8_conv import get_layer
from int8run.layers.plan import LayerPlan
from int8run.models.sampling import Sampling
from int8run.outlier.base import LayerStatistics
from int8run.report.console import Progress
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


def capture_calibration_calls(
    pipe: DiffusionPipeline,
    component: str,
    denoiser: nn.Module,
    *,
    calibration: CalibrationSettings,
    sampling: Sampling,
    progress: Progress,
) -> list[Mapping[str, Any]]:
    """The denoiser's arguments at some timesteps of each calibration image.

    Args:
        pipe: generates the images.
        component: the denoiser's name in the pipe.
        denoiser: the float model.
        calibration: prompts, seed and the number of timesteps.
        sampling: steps and size of the images.
        progress: shows one count per batch.
    """
    batches = split_batches(calibration.samples, sampling.batch)
    chosen = []
    with progress.track_loop("Generating calibration images", len(batches)) as advance:
        for batch in batches:
            calls = capture_calls(pipe, component, denoiser, batch, sampling)
            chosen += [calls[i] for i in spread_evenly(len(calls), calibration.num_timesteps)]
            advance(1)
    return chosen


def spread_evenly(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, the first and the last among them."""
    return torch.linspace(0, count - 1, min(most, count)).round().int().tolist()


@dataclass
class InputRecord:
    """What was seen of one layer's input so far.

    Args:
        generator: picks the tokens that are kept.
        absmax: float32 [K], the maxima over every row; None before the first call.
        pieces: [B, T, K] of each call, the tokens that are kept.
    """

    generator: torch.Generator
    absmax: Tensor | None = None
    pieces: list[Tensor] = field(default_factory=list)

    def add_input(self, x: Tensor, max_tokens: int) -> None:
        """Take note of one call's input. x: [..., K]; of its tokens at most `max_tokens` are kept."""
        rows = x.reshape(-1, x.shape[-1])
        absmax = rows.abs().amax(0).float()
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        # [B, T, K]; without a token axis each row is an input of one token
        tokens = x.flatten(0, -3) if x.dim() > 2 else rows[:, None]
        # some inputs are picked as well: there may be one per pixel, where the tokens are the frames of a
        # video
        inputs = self._pick_indices(tokens.shape[0], max_tokens)
        kept = self._pick_indices(tokens.shape[1], max_tokens // len(inputs))
        self.pieces.append(tokens[inputs[:, None].to(x.device), kept.to(x.device)].cpu())

    def _pick_indices(self, count: int, most: int) -> Tensor:
        picked = torch.randperm(count, generator=self.generator)[: max(1, most)]
        return picked.sort().values


@dataclass
class PatchRecord(InputRecord):
    """What was seen of a convolution's input: the patches that some of its output pixels are computed from.

    Args:
        geometry: of the convolution.
    """

    geometry: ConvGeometry | None = None

    def add_input(self, x: Tensor, max_tokens: int) -> None:
        """Take note of one call's input. x: [B, C, *size]; a patch counts as its pixels."""
        assert self.geometry is not None
        most = max(1, max_tokens // prod(self.geometry.kernel))
        inputs = self._pick_indices(x.shape[0], most)
        num_outputs = prod(self.geometry.compute_output_size(x.shape[2:]))
        kept = self._pick_indices(num_outputs, most // len(inputs))
        patches = extract_patches(x[inputs.to(x.device)], self.geometry, kept.to(x.device)).cpu()
        absmax = patches.flatten(0, 1).abs().amax(0).float()
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        self.pieces.append(patches)


def extract_patches(x: Tensor, geometry: ConvGeometry, positions: Tensor) -> Tensor:
    """What some output pixels of a convolution are computed from, zeros beyond the edge included.

    Args:
        x: [B, C, *size].
        geometry: of the convolution, which is not dilated.
        positions: int64 [T], indices of output pixels, row after row.

    Returns:
        [B, T, C * taps], channel after channel as in a row of the weight.
    """
    padding = [number for size in reversed(geometry.padding) for number in (size, size)]
    patches = F.pad(x, padding)
    for dimension, (kernel, stride) in enumerate(zip(geometry.kernel, geometry.stride, strict=True), start=2):
        patches = patches.unfold(dimension, kernel, stride)  # a view: [B, C, *output sizes, *kernel]
    indices = torch.unravel_index(positions, geometry.compute_output_size(x.shape[2:]))
    every = slice(None)
    places: tuple[Any, ...] = (every, every, *indices)
    chosen = patches[places]  # [B, C, T, *kernel]
    return chosen.flatten(3).transpose(1, 2).flatten(2)


def make_record(denoiser: nn.Module, plan: LayerPlan, seed: int) -> InputRecord:
    """An empty record of one layer's input."""
    generator = make_generator(seed, plan.name)
    if plan.is_linear:
        return InputRecord(generator)
    conv = get_layer(denoiser, plan.name)
    assert not isinstance(conv, nn.Linear)
    return PatchRecord(generator, geometry=read_geometry(conv))


def collect_layer_statistics(
    denoiser: nn.Module,
    plans: Sequence[LayerPlan],
    *,
    groups: Sequence[Sequence[str]],
    calls: Sequence[Mapping[str, Any]],
    calibration: CalibrationSettings,
) -> dict[str, LayerStatistics]:
    """Statistics of each planned layer's input in those calls; a layer that no call reaches is left out.

    Args:
        denoiser: the float model.
        plans: the layers to watch; of a convolution the sample holds patches, `[S, T, C * taps]`.
        groups: layers that read the same tensor; each planned layer stands in one group.
        calls: arguments of the denoiser, from `capture_calibration_calls`.
        calibration: seed, and how many tokens are kept of each layer.

    Raises:
        ConfigError: when a layer's input has NaN or infinity.
    """
    records = {plan.name: make_record(denoiser, plan, calibration.seed) for plan in plans}

    def record_input(name: str, x: Tensor, y: Tensor) -> None:
        if x.numel():
            check_finite(name, x, "a calibration step")
            records[name].add_input(x, max_tokens=calibration.max_tokens_per_layer // len(calls))

    for call in calls:
        capture_layers(denoiser, call, list(records), record_input)
    statistics = summarize_records(denoiser, groups, records)
    # the numbers beyond the edges of an image are always zeros
    linears = {plan.name for plan in plans if plan.is_linear}
    warn_constant_channels({name: layer for name, layer in statistics.items() if name in linears})
    return statistics


def summarize_records(
    denoiser: nn.Module, groups: Sequence[Sequence[str]], records: Mapping[str, InputRecord]
) -> dict[str, LayerStatistics]:
    """Statistics of each layer that a call reached; layers of a group share the maxima of their weights."""
    statistics = {}
    for group in groups:
        weights = [get_layer(denoiser, name).weight.detach().flatten(1) for name in group]
        maxima = [weight.abs().amax(0).float() for weight in weights]
        weight_absmax = torch.stack(maxima).amax(0).cpu()  # [layers, K] -> [K]
        for name in group:
            record = records[name]
            if record.absmax is not None:
                statistics[name] = LayerStatistics(
                    sample=interleave_by_image(record.pieces),
                    input_absmax=record.absmax.cpu(),
                    weight_absmax=weight_absmax,
                )
    return statistics


def make_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of one layer, the same for every order of the layers."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} calibration".encode()))


def interleave_by_image(pieces: Sequence[Tensor]) -> Tensor:
    """One sample of all calls with the inputs of an image side by side.

    Either half of the sample then holds other images than the other half.

    Args:
        pieces: [B, T, K] of each call; T may differ.

    Returns:
        [S, T, K] with the least T, S the sum of all B.
    """
    n_tokens = min(piece.shape[1] for piece in pieces)
    n_images = max(len(piece) for piece in pieces)
    parts = []
    for image in range(n_images):
        parts += [piece[image : image + 1, :n_tokens] for piece in pieces]
    return torch.cat(parts)


def warn_constant_channels(statistics: Mapping[str, LayerStatistics]) -> None:
    """Warn about layers with input channels of zero variance: their range is a guess."""
    counts = {}
    for name, layer in statistics.items():
        sample = layer.sample  # [S, T, K]
        if sample.shape[:2].numel() > 1:
            is_constant = (sample == sample[:1, :1]).all(0).all(0)  # [K]
            counts[name] = int(is_constant.sum())
    found = {name: count for name, count in counts.items() if count}
    if not found:
        return
    worst = max(found, key=found.__getitem__)
    log.warning(
        "calibration: %s input channels that never change (%s: %d of %d); what is fitted to them "
        "is a guess; more calibration.prompts or a larger calibration.num_timesteps may show them changing",
        count_noun(len(found), "layer", "have"),
        worst,
        found[worst],
        statistics[worst].sample.shape[-1],
    )
