"""The VAE of a pipeline in INT8, for `int8.vae=int8`: plan, quantize, and put beside the float one.

build.py calls `quantize_vae`. Which layers stay float is data (`models/vae_layers.yaml`). What its error
costs is measured by `tasks.vae_metrics` on latents that `QuantizedVae` recorded.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.fused_group_norm import defer_norms
from int8run.layers.int8_conv import CONV_CLASSES, Int8Layer, is_convolution
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.padding_conv import put_inside
from int8run.layers.plan import INT8, LayerPlan, plan_convolution
from int8run.layers.plan_summary import describe_skip_reasons, select_int8_plans
from int8run.models.loader import VAE
from int8run.models.sampling import Sampling
from int8run.models.vae_layers import VaeLayers, load_vae_layers
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.offload import has_group_offloading
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.pipeline.vae_file import VaeFile
from int8run.ptq.convolutions import ConvolutionBinder
from int8run.ptq.quantize import build_int8_layers, check_backend, keep_faster_layers, quantize_layers
from int8run.quant.rounding import AbsMax, Rounding
from int8run.report.console import Progress

log = logging.getLogger(__name__)
DEFAULT_SCALE = 8  # pixels of an image for one of its latents, where the pipeline does not say
DEFAULT_SIDE = 1024  # pixels of an image, where its size is left to the pipeline


class Place(NamedTuple):
    """Where a VAE is, and the dtype of its float tensors."""

    device: torch.device
    dtype: torch.dtype


@dataclass
class QuantizedVae:
    """A VAE as floats and in INT8.

    Args:
        float_vae: as the pipeline has it.
        int8_vae: a copy that shares every float tensor.
        plans: what happened to each layer.
        layers: those whose weights are integers, by name; with `backend=float` some compute in float.
        latents: what the INT8 one was asked to decode first, once it was.
    """

    float_vae: nn.Module
    int8_vae: nn.Module
    plans: list[LayerPlan]
    layers: dict[str, Int8Layer]
    latents: list[Tensor] = field(default_factory=list)

    def by_denoiser(self, candidate: str) -> dict[str, dict[str, nn.Module]]:
        """Which VAE decodes what a denoiser makes, as `Differences` takes it.

        Args:
            candidate: name of the denoiser that is compared with the float one.
        """
        return {"float": {VAE: self.float_vae}, candidate: {VAE: self.int8_vae}}

    @contextmanager
    def placed(self, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Bring both VAEs to a device and a dtype, and back to where they were.

        With offloading they wait in memory, and some pipelines decode in another dtype than that of the VAE,
        which overflows in half precision.
        """
        place = Place(device, dtype)
        # all are noted before one is moved, because they share tensors
        places = [(vae, find_place(vae)) for vae in (self.float_vae, self.int8_vae)]
        for vae, own_place in places:
            move_vae(vae, own_place, place)
        try:
            yield
        finally:
            for vae, own_place in places:
                move_vae(vae, place, own_place)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the first latents that the INT8 VAE decodes meanwhile."""
        vae: Any = self.int8_vae
        decode = vae.decode
        self.latents.clear()

        def record(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.latents:
                self.latents.append(z.detach().clone())
            return decode(z, *args, **kwargs)

        vae.decode = record
        try:
            yield
        finally:
            del vae.decode


def quantize_vae(
    loaded: LoadedModel, settings: QuantizationSettings, rows: int, progress: Progress
) -> QuantizedVae:
    """Make the INT8 VAE of a pipeline.

    Outlier methods and roundings that are fitted to a denoiser's calibration have nothing to say here: its
    Linears are plain INT8.

    Args:
        loaded: the model, whose VAE stays as it is.
        settings: backend and rounding.
        rows: pixels of the latents of an image, which its Linears see.
        progress: of the layers.

    Raises:
        ConfigError: when the pipeline has no VAE, or none of its layers can be INT8.
        BackendError: when the backend cannot run here or cannot take a layer.
    """
    vae = getattr(loaded.pipe, VAE, None)
    if not isinstance(vae, nn.Module):
        raise ConfigError(
            f"int8.vae=int8: {type(loaded.pipe).__name__} has no VAE to quantize; set int8.vae=float"
        )
    known = load_vae_layers()
    plans = plan_vae(vae, known)
    if loaded.vae is not None:
        loaded.vae.apply_to_plans(plans, known.padding_convolutions)
    chosen = select_int8_plans(plans)
    if not chosen:
        raise ConfigError(
            f"int8.vae=int8: no layer of {type(vae).__name__} became INT8 ({describe_skip_reasons(plans)}); "
            "set int8.vae=float"
        )
    check_backend(settings.backend, loaded.device, chosen)
    layers = quantize_chosen(loaded, vae, chosen, settings, rows=rows, progress=progress)
    # with backend=float its Linears compute in float: the convolutions alone are INT8 then
    computing = keep_faster_layers(chosen, layers)
    int8_vae = assemble_vae(vae, computing, known)
    log.info("%d of %d layers of %s are INT8", len(computing), len(plans), type(vae).__name__)
    return QuantizedVae(vae, int8_vae, plans, layers)


def select_vae_rounding(settings: QuantizationSettings) -> Rounding:
    """The rounding of the settings, or `absmax` for one that is fitted to the denoiser's calibration."""
    if settings.rounding.needs_calibration:
        return AbsMax()
    return settings.rounding


def count_latent_pixels(pipe: Any, sampling: Sampling) -> int:
    """How many pixels the latents of an image have.

    Args:
        pipe: says how much smaller they are.
        sampling: height and width of the image.
    """
    scale = int(getattr(pipe, "vae_scale_factor", 0) or DEFAULT_SCALE)
    height, width = sampling.height or DEFAULT_SIDE, sampling.width or DEFAULT_SIDE
    return max(1, (height // scale) * (width // scale))


def plan_vae(vae: nn.Module, known: VaeLayers) -> list[LayerPlan]:
    """A plan for every Linear and convolution of a VAE, in its order.

    Args:
        vae: the float one.
        known: which layers stay float.
    """
    plans = []
    for name, module in vae.named_modules():
        reason = known.find_skip_reason(name)
        if is_convolution(module):
            plan = plan_convolution(name, module, reason, known_subclasses=known.padding_convolutions)
            plans.append(plan)
        elif isinstance(module, nn.Linear):
            plans.append(LayerPlan(name, module.in_features, module.out_features, reason))
    return plans


def quantize_chosen(
    loaded: LoadedModel,
    vae: nn.Module,
    plans: list[LayerPlan],
    settings: QuantizationSettings,
    *,
    rows: int,
    progress: Progress,
) -> dict[str, Int8Layer]:
    """Quantize layers of a VAE, or take them out of its file.

    Args:
        loaded: says where they run, and has the file.
        vae: the float one.
        plans: of the layers.
        settings: backend and rounding.
        rows: that its Linears see.
        progress: of the layers.
    """
    rounding = select_vae_rounding(settings)
    # asked for as INT8, whatever is faster: `int8.vae` has no `auto`
    int8 = replace(settings.int8, only_if_faster=False, convolutions=INT8)
    binder = ConvolutionBinder(settings.backend, loaded.device, int8, inputs={})
    with progress.track_loop("Quantizing the VAE", len(plans)) as advance:

        def finish_layer(layer: Int8Layer) -> None:
            layer.to(loaded.offload_device)
            advance(1)

        existing, new = split_existing(loaded.vae, plans)
        quantized = quantize_layers(
            vae,
            new,
            methods={},
            rounding=rounding,
            statistics={},
            read=lambda name: vae.get_submodule(name).weight.detach().to(loaded.device),  # type: ignore[operator]
        )
        read = loaded.vae.read_layers(existing, loaded.device) if loaded.vae is not None else ()
        linears = build_int8_layers(
            vae,
            binder.take_convolutions(vae, chain(read, quantized), finish_layer),
            backend=settings.backend,
            settings=int8,
            rows=dict.fromkeys((plan.name for plan in plans), rows),
            on_layer=finish_layer,
            device=loaded.device,
        )
    return {**linears, **binder.made}


def split_existing(file: VaeFile | None, plans: list[LayerPlan]) -> tuple[list[LayerPlan], list[LayerPlan]]:
    """The plans of layers that a file has in INT8, and of those to quantize.

    Args:
        file: of the VAE, where it holds quantized weights.
        plans: of all layers that become INT8.
    """
    if file is None:
        return [], plans
    existing = [plan for plan in plans if plan.name in file.layers]
    new = [plan for plan in plans if plan.name not in file.layers]
    return existing, new


def assemble_vae(vae: nn.Module, layers: dict[str, Int8Layer], known: VaeLayers) -> nn.Module:
    """A copy of a VAE with these layers in it, sharing every float tensor.

    Args:
        vae: the float one.
        layers: by the name of the layer whose place they take.
        known: which norms and activations the layers can compute.
    """
    target = copy_sharing_tensors(vae)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        float_layer = target.get_submodule(name)
        replacement: nn.Module = layer
        is_subclass = type(float_layer) not in (*CONV_CLASSES, nn.Linear)
        if is_subclass and not isinstance(layer, Int8Linear):
            replacement = put_inside(float_layer, layer)
        setattr(target.get_submodule(parent), child, replacement)
    defer_norms(target, known.deferred_norms)
    return target


def find_place(vae: Any) -> Place:
    """Where a VAE is now, and in which dtype."""
    return Place(next(vae.parameters()).device, vae.dtype)


def move_vae(vae: Any, old: Place, new: Place) -> None:
    """Move a VAE from one place to another; what diffusers moves in groups stays where it waits.

    Args:
        vae: is changed.
        old: where it is. What does not differ is not asked for, because diffusers warns of it.
        new: where it is to be.
    """
    changes: dict[str, Any] = {}
    if new.device != old.device and not has_group_offloading(vae):
        changes["device"] = new.device
    if new.dtype != old.dtype:
        changes["dtype"] = new.dtype
    if changes:
        vae.to(**changes)


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents as a pipeline does, by a VAE that is where they are. Returns images, [B, 3, ...]."""
    images: Tensor = vae.decode(latents, return_dict=False)[0]
    return images.float().cpu()
