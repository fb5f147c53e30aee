"""Calibration: the float model draws a few prompts, and every layer's input is looked at on the way."""

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.generate.calibration_settings import CalibrationSettings
from int8run.generate.capture import capture_calls, capture_layers, check_finite
from int8run.layers.int8_linear import get_linear
from int8run.layers.plan import LayerPlan
from int8run.models.sampling import Sampling
from int8run.outlier.base import LayerStatistics
from int8run.report.console import Progress

log = logging.getLogger(__name__)


@dataclass
class InputRecord:
    """What was seen of one layer so far."""

    absmax: Tensor | None = None
    pieces: list[Tensor] = field(default_factory=list)  # [B, T, K] each


def capture_calibration_calls(
    pipe: DiffusionPipeline,
    component: str,
    denoiser: nn.Module,
    calibration: CalibrationSettings,
    sampling: Sampling,
    progress: Progress,
) -> list[Mapping[str, Any]]:
    """The denoiser's arguments at some moments of each calibration picture."""
    calls = []
    batches = [
        calibration.samples[i : i + sampling.batch]
        for i in range(0, len(calibration.prompts), sampling.batch)
    ]
    with progress.track_loop("calibrate", len(batches)) as advance:
        for batch in batches:
            made = capture_calls(pipe, component, denoiser, batch, sampling)
            moments = (
                torch.linspace(0, len(made) - 1, min(calibration.num_timesteps, len(made)))
                .round()
                .int()
                .tolist()
            )
            calls += [made[i] for i in moments]
            advance(1)
    return calls


def collect_layer_statistics(
    denoiser: nn.Module,
    plans: Sequence[LayerPlan],
    groups: Sequence[Sequence[str]],
    calls: Sequence[Mapping[str, Any]],
    calibration: CalibrationSettings,
) -> dict[str, LayerStatistics]:
    """What each planned layer is given in those calls; a layer that no call reaches is left out.

    Args:
        groups: layers that read the same tensor; each planned layer stands in one group.

    Raises:
        ConfigError: when a layer is given NaN or infinity.
    """
    seen = {plan.name: InputRecord() for plan in plans}
    generators = {
        name: torch.Generator().manual_seed(zlib.crc32(f"{calibration.seed} {name} calibration".encode()))
        for name in seen
    }

    def some(name: str, count: int, most: int) -> Tensor:
        return torch.randperm(count, generator=generators[name])[: max(1, most)].sort().values

    def see(name: str, x: Tensor, y: Tensor) -> None:
        if not x.numel():
            return
        check_finite(name, x, "a calibration step")
        layer, rows = seen[name], x.reshape(-1, x.shape[-1])
        absmax = rows.abs().amax(0).float()
        layer.absmax = absmax if layer.absmax is None else torch.maximum(layer.absmax, absmax)
        tokens = (
            x.flatten(0, -3) if x.dim() > 2 else rows[:, None]
        )  # without a token axis each row stands alone
        room = calibration.max_tokens_per_layer // len(calls)
        inputs = some(
            name, tokens.shape[0], room
        )  # there may be as many as there are pixels, where the tokens are frames
        kept = some(name, tokens.shape[1], room // len(inputs))
        layer.pieces.append(tokens[inputs[:, None].to(x.device), kept.to(x.device)].cpu())

    for call in calls:
        capture_layers(denoiser, call, list(seen), see)

    weight_absmax = {name: get_linear(denoiser, name).weight.detach().abs().amax(0).float() for name in seen}
    statistics = {}
    for group in groups:
        together = torch.stack([weight_absmax[name] for name in group]).amax(0).cpu()
        for name in group:
            if (absmax := seen[name].absmax) is not None:
                statistics[name] = LayerStatistics(
                    interleave_by_image(seen[name].pieces), absmax.cpu(), together
                )
    warn_constant_channels(statistics)
    return statistics


def interleave_by_image(pieces: Sequence[Tensor]) -> Tensor:
    """One sample of all calls, the inputs of a picture side by side, so that either half holds other pictures than the other.

    pieces: [B, T, K] of each call, whose T may differ -> [S, T, K] with the least T.
    """
    length = min(piece.shape[1] for piece in pieces)
    most = max(len(piece) for piece in pieces)
    return torch.cat([piece[i : i + 1, :length] for i in range(most) for piece in pieces])


def warn_constant_channels(statistics: Mapping[str, LayerStatistics]) -> None:
    """Say which layers have input channels of zero variance: their range is a guess."""
    constant = {
        name: int((s.sample == s.sample[:1, :1]).all(0).all(0).sum())
        for name, s in statistics.items()
        if s.sample.shape[:2].numel() > 1
    }
    found = {name: count for name, count in constant.items() if count}
    if found:
        worst = max(found, key=found.__getitem__)
        log.warning(
            "calibration: %d layers have input channels that never change (%s: %d of %d); what is fitted to them is a guess, "
            "more calibration.prompts or calibration.num_timesteps may show them at work",
            len(found),
            worst,
            found[worst],
            statistics[worst].sample.shape[-1],
        )
