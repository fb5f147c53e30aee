"""A model as it was loaded: its pipeline, its denoiser, and where the denoiser's weights are.

load.py makes it; everything that quantizes reads weights through it, whether they are in memory or still in a
file. Nothing is quantized here, and no LoRA is known here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.backends.convolution import read_geometry
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.int8_conv import CONV_CLASSES, count_conv_inputs, get_layer
from int8run.layers.int8_linear import DTYPE_MARKER
from int8run.layers.plan import FLOAT, LayerPlan, plan_layers
from int8run.models.dual_denoisers import split_denoiser
from int8run.models.family import ModelFamily
from int8run.models.given_model import find_controlnets
from int8run.models.sampling import Sampling
from int8run.models.source import ResolvedModel
from int8run.pipeline.checkpoint_weights import DenoiserWeights
from int8run.pipeline.offload import find_offload_device
from int8run.pipeline.text_encoders import OpenedEncoder
from int8run.pipeline.vae_file import VaeFile


@dataclass
class LoadedModel:
    """A model as it was loaded, and what is known about it.

    Args:
        component: the pipeline's name for its denoiser; of two, for the first one.
        denoiser: the float model, or a skeleton; of two denoisers a module that holds both.
        scheduler: as the checkpoint has it; a sampling may name another.
        checkpoint: the denoiser's weights; None where diffusers has read them.
        encoders: the text encoders that `clip=` changes, opened.
        vae: where its files hold quantized weights; None: diffusers has read it.
        offload: diffusers' offloading, see `set_offload`.
        seconds: that loading took.
    """

    pipe: DiffusionPipeline
    component: str
    denoiser: nn.Module
    scheduler: Any
    family: ModelFamily
    sampling: Sampling
    device: torch.device
    source: ResolvedModel
    checkpoint: DenoiserWeights | None
    encoders: Mapping[str, OpenedEncoder]
    vae: VaeFile | None = None
    offload: str = "none"
    seconds: float = 0.0

    @property
    def offload_device(self) -> torch.device:
        """Where its weights wait: on the device, or with offloading in memory."""
        return find_offload_device(self.offload, self.device)

    @property
    def skeleton_encoders(self) -> tuple[str, ...]:
        """Text encoders of the pipeline that are skeletons, to be replaced by quantized ones."""
        return tuple(
            name for name, opened in self.encoders.items() if getattr(self.pipe, name) is opened.skeleton
        )

    @property
    def float_bytes(self) -> int:
        """Size of the float denoiser in memory, whether its weights are read or not."""
        tensors = [*self.denoiser.parameters(), *self.denoiser.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def num_dequantized_layers(self) -> int:
        """Linears of the float model whose weights are quantized numbers of its own file."""
        if self.checkpoint is None:
            return 0
        return len(self.checkpoint.find_int8_layers()) + len(self.checkpoint.find_inexact_layers())

    def plan_layers(self, convolutions: str = FLOAT) -> list[LayerPlan]:
        """Every Linear of the denoiser, with the family's reason where one stays float.

        Args:
            convolutions: as `Int8Settings` has it; unless it is `float` they are there, too.
        """
        skip_rule = make_skip_rule(self.family, self.denoiser)
        return plan_layers(self.denoiser, skip_rule, convolutions=convolutions)

    def read_weight(self, name: str) -> Tensor:
        """The float weight of a layer, on the device; read from the file where the model has none.

        Args:
            name: of a Linear or a convolution.

        Returns:
            [N, K], or [N, K, *kernel].
        """
        weight = get_layer(self.denoiser, name).weight.detach()
        if not weight.is_meta:
            return weight.to(self.device)  # with offload= the float model waits in memory
        assert self.checkpoint is not None
        return self.checkpoint.read_tensor(f"{name}.weight").to(self.device, weight.dtype)

    def fill_weights(self, except_for: Iterable[str] = ()) -> None:
        """Read what the skeleton lacks, except for the weights of some layers.

        Args:
            except_for: names of the layers; one that a ControlNet computes with, too, is read all the same.
        """
        controlnets = find_controlnets(self.pipe.components).values()
        own_layers = set(except_for).difference(list_shared_layers(self.denoiser, controlnets))
        left_out = {f"{name}.weight" for name in own_layers}
        missing = []
        for name, tensor in self.denoiser.state_dict().items():
            if tensor.is_meta and name not in left_out:
                missing.append(name)
        if self.checkpoint is not None:
            before = {parameter: name for name, parameter in self.denoiser.named_parameters()}
            self.checkpoint.fill_parameters(self.denoiser, missing, self.offload_device)
            share_parameters(self.denoiser, controlnets, before)
        # buffers that no checkpoint holds have their numbers already
        move_buffers(self.denoiser, self.offload_device)


def list_shared_layers(denoiser: nn.Module, controlnets: Iterable[nn.Module]) -> list[str]:
    """Names of a denoiser's modules that ControlNets compute with, too: that of Z-Image has such.

    Args:
        denoiser: of a pipeline.
        controlnets: of the same.
    """
    elsewhere: set[nn.Module] = set()
    for controlnet in controlnets:
        elsewhere |= set(controlnet.modules())
    return [name for name, module in denoiser.named_modules() if module in elsewhere]


def share_parameters(
    denoiser: nn.Module, controlnets: Iterable[nn.Module], before: Mapping[nn.Parameter, str]
) -> None:
    """Give ControlNets a denoiser's parameters where they have those that it had before.

    Args:
        denoiser: with new parameters.
        controlnets: are changed.
        before: its parameters of before, and their names.
    """
    for controlnet in controlnets:
        for module in controlnet.modules():
            for child, old in list(module._parameters.items()):
                if old is not None and old in before:
                    module._parameters[child] = denoiser.get_parameter(before[old])


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of a module, and of those inside it, to a device; those on `meta` stay there."""
    for inner in module.modules():
        for name, buffer in inner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                inner._buffers[name] = buffer.to(device)


def make_skip_rule(family: ModelFamily, denoiser: nn.Module) -> Callable[[str], str | None]:
    """Why a Linear of a denoiser stays float, by its name; None: it does not.

    Of two denoisers, the family describes the layers of each.
    """
    is_single = "" in split_denoiser(denoiser)

    def find_skip_reason(name: str) -> str | None:
        return family.find_skip_reason(name if is_single else name.partition(".")[2])

    return find_skip_reason


class SkeletonLayer(nn.Module):
    """Takes the place of a layer whose weight is not read: zeros of the right shape.

    The denoiser runs with it, and so the other layers show how many rows they see.

    Args:
        in_features: K.
        out_features: N.
        dtype: of the model.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__()
        self.register_buffer(DTYPE_MARKER, torch.empty(0, dtype=dtype), persistent=False)
        self.in_features = in_features
        self.out_features = out_features


class SkeletonLinear(SkeletonLayer):
    """In the place of a Linear."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> zeros [..., N]."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


class SkeletonConv(SkeletonLayer):
    """In the place of a convolution.

    Args:
        conv: without a weight.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d):
        super().__init__(count_conv_inputs(conv), conv.out_channels, conv.weight.dtype)
        self.geometry = read_geometry(conv)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, *size] -> zeros [B, N, *size]."""
        size = self.geometry.compute_output_size(x.shape[2:])
        return x.new_zeros(x.shape[0], self.out_features, *size)


def computes_values(denoiser: nn.Module) -> bool:
    """Whether a denoiser has all its weights, so that its activations are real ones."""
    return not any(isinstance(module, SkeletonLayer) for module in denoiser.modules())


def replace_missing_layers(denoiser: nn.Module) -> nn.Module:
    """A copy of the module tree with a SkeletonLayer for every Linear and convolution without a weight.

    Returns:
        The copy, which shares all tensors; the module itself where every layer has a weight.
    """
    skeletons: dict[str, SkeletonLayer] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear) and module.weight.is_meta:
            skeletons[name] = SkeletonLinear(module.in_features, module.out_features, module.weight.dtype)
        elif isinstance(module, CONV_CLASSES) and module.weight.is_meta:
            skeletons[name] = SkeletonConv(module)
    if not skeletons:
        return denoiser
    copy = copy_sharing_tensors(denoiser)
    for name, skeleton in skeletons.items():
        parent, _, child = name.rpartition(".")
        setattr(copy.get_submodule(parent), child, skeleton)
    return copy
