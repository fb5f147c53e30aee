"""Load a model: whole and in float, or as a skeleton whose weights are read when they are quantized."""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.config.run_spec import RunSpec
from int8run.errors import BackendError, ConfigError
from int8run.generate.generate import find_unknown_arguments
from int8run.layers.fusion import copy_sharing_tensors
from int8run.layers.int8_linear import get_linear
from int8run.layers.plan import LayerPlan, plan_layers
from int8run.models.dual_denoisers import DualDenoiser, split_denoiser
from int8run.models.family import ModelFamily
from int8run.models.loader import list_block_prefixes, load_parts, load_pipeline, pick_device
from int8run.models.sampling import Sampling
from int8run.models.schedulers import set_scheduler
from int8run.models.source import ResolvedModel, resolve_model
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.pipeline.text_encoders import OpenedEncoder, open_encoders
from int8run.ptq.quantize import check_backend
from int8run.report.console import Progress
from int8run.utils.disk_cache import DiskCache

log = logging.getLogger(__name__)
# files of a diffusers folder that say what a model computes
HASHED_SUFFIXES = (".safetensors", ".json", ".model", ".txt")


@dataclass
class LoadedModel:
    """A model as it comes, and what is known about it.

    Args:
        component: where the pipeline has its denoiser; of two, the first one's place.
        denoiser: the float model, or a skeleton.
        scheduler: as the checkpoint has it; a sampling may name another.
        files: the denoiser's weights; None where diffusers has read them.
        encoders: the text encoders that `clip=` changes, opened.
    """

    pipe: DiffusionPipeline
    component: str
    denoiser: nn.Module
    scheduler: Any
    family: ModelFamily
    sampling: Sampling
    device: torch.device
    source: ResolvedModel
    files: DenoiserWeights | None
    encoders: Mapping[str, OpenedEncoder]
    seconds: float

    @property
    def skeleton_encoders(self) -> tuple[str, ...]:
        """Text encoders of the pipeline that are skeletons, to be replaced by quantized ones."""
        return tuple(
            name for name, opened in self.encoders.items() if getattr(self.pipe, name) is opened.skeleton
        )

    def plan_layers(self) -> list[LayerPlan]:
        """What the family says of every Linear."""
        single = "" in split_denoiser(self.denoiser)
        return plan_layers(
            self.denoiser,
            lambda name: self.family.find_skip_reason(name if single else name.partition(".")[2]),
        )

    def read_weight(self, name: str) -> Tensor:
        """The float weight of a Linear, on the device; read from the file where the model has none."""
        weight = get_linear(self.denoiser, name).weight.detach()
        if not weight.is_meta:
            return weight.to(self.device)  # with offload= the float model waits in memory
        assert self.files is not None
        return self.files.read_tensor(f"{name}.weight").to(self.device, weight.dtype)

    def fill_weights(self, but: Iterable[str] = ()) -> None:
        """Read what the skeleton lacks, except the weights of these Linears."""
        left = {f"{name}.weight" for name in but}
        empty = [
            name for name, tensor in self.denoiser.state_dict().items() if tensor.is_meta and name not in left
        ]
        if self.files is not None:
            self.files.fill_parameters(self.denoiser, empty, self.device)
        for module in self.denoiser.modules():  # buffers that no checkpoint holds
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    @property
    def float_bytes(self) -> int:
        """What the float denoiser takes in memory, whether it is there or not."""
        return sum(
            t.numel() * t.element_size() for t in [*self.denoiser.parameters(), *self.denoiser.buffers()]
        )


def load_model(spec: RunSpec, progress: Progress, whole: bool = True) -> LoadedModel:
    """Load the pipeline and recognise its family.

    Args:
        whole: with the float denoiser's weights. Without, it is a skeleton, to be filled as far as needed.
    """
    device = pick_device(spec.device)
    if spec.int8.enable:
        check_backend(spec.backend, device, ())  # before anything is loaded
    if spec.offload != "none" and device.type != "cuda":
        raise BackendError(
            f"offload={spec.offload} moves parts of the model between memory and a GPU; on {device} there is nothing to move: offload=none"
        )
    started = time.perf_counter()
    dtype = getattr(torch, spec.model.dtype)
    with progress.track_step("load"):
        source = resolve_model(spec.model)
        skeletons: dict[str, nn.Module] = {}
        files = None
        if source.has_single_files or not whole:
            skeletons = {d.component: d.build_skeleton(dtype) for d in source.denoisers}
            single = len(skeletons) == 1
            weights = {d.component: FileWeights(d.weights, skeletons[d.component]) for d in source.denoisers}
            files = DenoiserWeights({"" if single else f"{name}.": part for name, part in weights.items()})
        # parts that are moved to the GPU when they are needed wait in memory
        place = torch.device("cpu") if spec.offload != "none" else device
        encoders = open_encoders(spec.clip, source.folder, spec.model.parts, dtype)
        empty = (
            {} if spec.needs_float_encoders else {name: opened.skeleton for name, opened in encoders.items()}
        )
        parts = load_parts(
            source.folder, {n: part for n, part in spec.model.parts.items() if n not in empty}, dtype
        )
        pipe = load_pipeline(source.folder, skeletons | empty, dtype, place, parts)
        modules = {
            d.component: getattr(pipe, d.component).eval().requires_grad_(False) for d in source.denoisers
        }
        component, denoiser = next(iter(modules.items()))
        first = denoiser
        if len(modules) > 1:
            denoiser = DualDenoiser(modules)
        for module in modules.values():
            set_attention(module, spec.attention)
        sampling = spec.sampling
        check_sampling(pipe, sampling)
        scheduler = pipe.scheduler
        set_scheduler(pipe, scheduler, sampling)
        linears = {name: m.in_features for name, m in first.named_modules() if isinstance(m, nn.Linear)}
        family = spec.model_type.resolve_family(type(first).__name__, list_block_prefixes(first), linears)
        loaded = LoadedModel(
            pipe, component, denoiser, scheduler, family, sampling, device, source, files, encoders, 0.0
        )
        if whole and files is not None:
            loaded.fill_weights()
    loaded.seconds = time.perf_counter() - started
    return loaded


def hash_model_files(source: ResolvedModel, cache: DiskCache) -> list[tuple[str, str]]:
    """Name and SHA-256 of every file that decides what a model draws."""
    folder = source.folder
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.suffix in HASHED_SUFFIXES
    }
    for denoiser in source.denoisers if source.has_single_files else ():
        weights = denoiser.weights
        files |= {
            f"{denoiser.component}: {p.name}": p
            for p in (sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights])
        }
    return [(name, cache.hash_file(path)) for name, path in sorted(files.items())]


class SkeletonLinear(nn.Module):
    """In the place of a Linear whose weight is not there: zeros of the right shape, so that the rest of a model shows its shapes."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> zeros [..., N]."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


def replace_missing_linears(denoiser: nn.Module) -> nn.Module:
    """A copy of the module tree in which every Linear without a weight is a Blank; the same module where there is none."""
    empty = {name: m for name, m in denoiser.named_modules() if isinstance(m, nn.Linear) and m.weight.is_meta}
    if not empty:
        return denoiser
    target = copy_sharing_tensors(denoiser)
    for name, linear in empty.items():
        parent, _, child = name.rpartition(".")
        setattr(target.get_submodule(parent), child, SkeletonLinear(linear.in_features, linear.out_features))
    return target


def set_offload(pipe: DiffusionPipeline, mode: str, device: torch.device) -> None:
    """diffusers' offloading of everything that the pipeline has now."""
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode == "group":
        pipe.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
        )


def set_attention(denoiser: Any, name: str) -> None:
    """diffusers' attention backend, and a check of its name."""
    if name == "native":
        return
    try:
        denoiser.set_attention_backend(name)
    except (AttributeError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"attention={name} cannot be used with {type(denoiser).__name__}: {reason}"
        ) from error


def check_sampling(pipe: DiffusionPipeline, sampling: Sampling) -> None:
    """Refuse sampler settings that the pipeline does not have."""
    unknown = find_unknown_arguments(pipe, sampling)
    if unknown:
        raise ConfigError(
            f"sampler.extra.{unknown[0]} is no argument of {type(pipe).__name__}; see the pipeline's documentation"
        )
