"""Load a model: whole and in float, or as a skeleton whose weights are read when they are quantized.

build.py and task=bench call `load_model`. Nothing is quantized here, and no LoRA is known here.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from int8run.backends.base import Backend
from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.detect import list_quantized_weights, read_layers
from int8run.checkpoints.layer import FLOAT
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.unsupported import read_quant_config
from int8run.errors import BackendError, ConfigError, FileError
from int8run.generate.pipeline_call import find_unknown_arguments
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.int8_linear import get_linear
from int8run.layers.plan import LayerPlan, plan_layers
from int8run.models.dual_denoisers import DualDenoiser, split_denoiser
from int8run.models.family import (
    AutoFamily,
    ModelFamily,
    ModelSource,
    load_families,
    read_model_families,
)
from int8run.models.loader import list_block_prefixes, load_parts, load_pipeline, pick_device
from int8run.models.resolve_weights import download_side_files
from int8run.models.sampling import Sampling
from int8run.models.schedulers import set_scheduler
from int8run.models.source import ResolvedModel, resolve_model
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.pipeline.text_encoders import OpenedEncoder, open_encoders
from int8run.ptq.quantize import check_backend
from int8run.report.console import Progress
from int8run.text_encoders.base import TextEncoders
from int8run.utils.disk_cache import DiskCache
from int8run.utils.plurals import count_noun
from int8run.utils.text import shorten_error

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
# files of a diffusers folder that decide what a model computes
HASHED_SUFFIXES = (".safetensors", ".json", ".model", ".txt")


@dataclass(frozen=True)
class LoadSettings:
    """What decides how a model is loaded.

    Args:
        model: where it is.
        model_type: its family, or `auto`.
        sampling: with all defaults filled in.
        clip: which text encoders are to be quantized.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        attention: diffusers' attention backend.
        offload: diffusers' offloading: `none`, `model`, `group`.
        backend: of the INT8 layers; None where there will be none.
        needs_float_denoiser: read all weights of the denoiser; else it is a skeleton, to be filled as needed.
        needs_float_encoders: read the text encoders that `clip` changes, too.
    """

    model: ModelSource
    model_type: ModelFamily | AutoFamily
    sampling: Sampling
    clip: TextEncoders
    device: str
    attention: str
    offload: str
    backend: Backend | None
    needs_float_denoiser: bool
    needs_float_encoders: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the float model."""
        dtype: torch.dtype = getattr(torch, self.model.dtype)
        return dtype


@dataclass
class LoadedModel:
    """A model as it was loaded, and what is known about it.

    Args:
        component: the pipeline's name for its denoiser; of two, for the first one.
        denoiser: the float model, or a skeleton; of two denoisers a module that holds both.
        scheduler: as the checkpoint has it; a sampling may name another.
        checkpoint: the denoiser's weights; None where diffusers has read them.
        encoders: the text encoders that `clip=` changes, opened.
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
    seconds: float = 0.0

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

    def plan_layers(self) -> list[LayerPlan]:
        """Every Linear of the denoiser, with the family's reason where one stays float."""
        return plan_layers(self.denoiser, make_skip_rule(self.family, self.denoiser))

    def read_weight(self, name: str) -> Tensor:
        """The float weight of a Linear, on the device; read from the file where the model has none.

        Args:
            name: of the Linear.

        Returns:
            [N, K]
        """
        weight = get_linear(self.denoiser, name).weight.detach()
        if not weight.is_meta:
            return weight.to(self.device)  # with offload= the float model waits in memory
        assert self.checkpoint is not None
        return self.checkpoint.read_tensor(f"{name}.weight").to(self.device, weight.dtype)

    def fill_weights(self, except_for: Iterable[str] = ()) -> None:
        """Read what the skeleton lacks, except for the weights of some Linears.

        Args:
            except_for: names of the Linears.
        """
        left_out = {f"{name}.weight" for name in except_for}
        state = self.denoiser.state_dict()
        missing = [name for name, tensor in state.items() if tensor.is_meta and name not in left_out]
        if self.checkpoint is not None:
            self.checkpoint.fill_parameters(self.denoiser, missing, self.device)
        for module in self.denoiser.modules():  # buffers that no checkpoint holds
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)


def load_model(settings: LoadSettings, progress: Progress) -> LoadedModel:
    """Load the pipeline and recognize the family of its denoiser.

    Raises:
        BackendError: for a device or a backend that cannot run here; nothing is loaded then.
        ConfigError: for settings that this model does not have.
        FileError: when weights are missing, damaged or another model's.
    """
    device = pick_device(settings.device)
    check_device(settings, device)
    started = time.perf_counter()
    with progress.track_step("Loading the model"):
        source = resolve_model(settings.model)
        check_model_family(settings.model, source.denoisers[0].class_name)
        skeletons: dict[str, nn.Module] = {}
        checkpoint = None
        if source.has_single_files or not settings.needs_float_denoiser or needs_own_reader(source, settings):
            skeletons = {d.component: d.build_skeleton(settings.dtype) for d in source.denoisers}
            download_quantization_configs(source, settings.model)
            checkpoint = open_denoiser_weights(source, skeletons, settings.model)
        encoders = open_encoders(settings.clip, source.folder, settings.model.parts, settings.dtype)
        pipe = load_float_parts(source, settings, skeletons, encoders, device)
        denoisers = {d.component: getattr(pipe, d.component) for d in source.denoisers}
        for denoiser in denoisers.values():
            denoiser.eval().requires_grad_(False)
            set_attention(denoiser, settings.attention)
        check_sampling(pipe, settings.sampling)
        scheduler = pipe.scheduler
        set_scheduler(pipe, scheduler, settings.sampling)
        component, first = next(iter(denoisers.items()))
        family = resolve_family(settings.model_type, first)
        warn_of_other_family(settings.model, settings.model_type, family)
        loaded = LoadedModel(
            pipe=pipe,
            component=component,
            denoiser=first if len(denoisers) == 1 else DualDenoiser(denoisers),
            scheduler=scheduler,
            family=family,
            sampling=settings.sampling,
            device=device,
            source=source,
            checkpoint=checkpoint,
            encoders=encoders,
        )
        if settings.needs_float_denoiser and checkpoint is not None:
            loaded.fill_weights()
    loaded.seconds = time.perf_counter() - started
    return loaded


def check_device(settings: LoadSettings, device: torch.device) -> None:
    """Check that backend and offloading can run on a device, before anything is loaded.

    Raises:
        BackendError: when they cannot.
    """
    if settings.backend is not None:
        check_backend(settings.backend, device, ())
    if settings.offload != "none" and device.type != "cuda":
        raise BackendError(
            f"offload={settings.offload} moves parts of the model between memory and a GPU; on {device} "
            "there is nothing to move; set offload=none"
        )


def open_denoiser_weights(
    source: ResolvedModel, skeletons: Mapping[str, nn.Module], model: ModelSource
) -> DenoiserWeights:
    """Open the weights of every denoiser, by the prefix that its layers have beside those of another.

    Args:
        skeletons: of the denoisers, by component.
        model: what decides where the files leave open how their layers are stored.
    """
    declared = DeclaredFormat(model.quant_format, model.sdnq)
    files = {}
    for denoiser in source.denoisers:
        skeleton = skeletons[denoiser.component]
        files[denoiser.component] = FileWeights(denoiser.weights, skeleton, declared=declared)
    if len(files) == 1:
        return DenoiserWeights({"": next(iter(files.values()))})
    return DenoiserWeights({f"{component}.": file for component, file in files.items()})


def needs_own_reader(source: ResolvedModel, settings: LoadSettings) -> bool:
    """Whether a pipeline's folder has denoisers with quantized weights, which diffusers takes for floats."""
    declared = DeclaredFormat(settings.model.quant_format, settings.model.sdnq)
    if not declared.is_empty:
        return True
    return any(has_quantized_weights(denoiser.weights) for denoiser in source.denoisers)


def has_quantized_weights(path: Path) -> bool:
    """Whether a safetensors file, or those of a folder, hold quantized weights."""
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return False
    with TensorFiles.open(path) as files:
        return bool(list_quantized_weights(files))


def download_quantization_configs(source: ResolvedModel, model: ModelSource) -> None:
    """Download what may say how quantized files on the hub were made, where nothing is beside them yet."""
    if not source.has_single_files:
        return
    for denoiser in source.denoisers:
        location = model.location
        if isinstance(location, Mapping):
            location = location[denoiser.component]
        if has_quantized_weights(denoiser.weights):
            download_side_files(str(location), model.revision)


def check_float_components(folder: Path, without: Collection[str]) -> None:
    """Check that diffusers and transformers read the right numbers in the components of a pipeline.

    They take quantized weights for floats and leave out scales that they do not know. Plain casts to fp8 are
    floats. A component whose config names a method is left to the library of that method.

    Args:
        folder: of the pipeline.
        without: components that are not loaded from there.

    Raises:
        FileError: naming the component and what reads it.
    """
    for part in sorted(folder.iterdir()):
        if not part.is_dir() or part.name in without or not has_quantized_weights(part):
            continue
        with TensorFiles.open(part) as files:
            if read_quant_config(files):
                continue
            layers = read_layers(files)
        quantized = [layer for layer in layers.values() if layer.storage_dtype != FLOAT and layer.granularity]
        if not quantized:
            continue
        how = "take a pipeline with its float weights"
        if part.name.startswith("text_encoder"):
            how = f"set clip=auto 'clip.path={{{part.name}: {part}}}' metrics.baseline=none, which reads them"
        weights = count_noun(len(quantized), "quantized weight")
        raise FileError(
            f"{part} holds {weights} ({quantized[0].label}), which diffusers would "
            f"use without their scales; {how}"
        )


def load_float_parts(
    source: ResolvedModel,
    settings: LoadSettings,
    skeletons: Mapping[str, nn.Module],
    encoders: Mapping[str, OpenedEncoder],
    device: torch.device,
) -> DiffusionPipeline:
    """Load the pipeline with everything in float that is not a skeleton.

    Args:
        skeletons: denoisers whose weights are not read here.
        encoders: text encoders that are quantized later.
        device: of the model; with offloading, parts wait in memory until they are moved there.
    """
    empty_encoders: dict[str, nn.Module] = {}
    if not settings.needs_float_encoders:
        empty_encoders = {name: opened.skeleton for name, opened in encoders.items()}
    check_float_components(source.folder, without={*skeletons, *empty_encoders})
    needed_parts = {n: part for n, part in settings.model.parts.items() if n not in empty_encoders}
    parts = load_parts(source.folder, needed_parts, settings.dtype)
    place = device if settings.offload == "none" else CPU
    return load_pipeline(source.folder, {**skeletons, **empty_encoders}, settings.dtype, place, parts)


def resolve_family(model_type: ModelFamily | AutoFamily, denoiser: nn.Module) -> ModelFamily:
    """The family of a denoiser; see `AutoFamily.resolve_family`."""
    linears = {name: m.in_features for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    return model_type.resolve_family(type(denoiser).__name__, list_block_prefixes(denoiser), linears)


def check_model_family(model: ModelSource, denoiser: str) -> None:
    """Refuse a denoiser of another architecture than a model's settings are made for, before it is read.

    Args:
        model: the settings.
        denoiser: its class in diffusers.

    Raises:
        ConfigError: naming what the location holds, and the models of that family.
    """
    families = load_families()
    if model.family is None or model.family not in families or denoiser in families[model.family].denoisers:
        return
    found = [name for name, family in families.items() if denoiser in family.denoisers]
    options = [option for option, family in read_model_families().items() if family in found]
    choice = f"choose model={' or '.join(options)}" if options else "write a model of your own"
    raise ConfigError(
        f"model.location={model.location} holds a {denoiser} ({' or '.join(found) or 'no known family'}), "
        f"and the steps, guidance and size of this model are made for {model.family}; {choice}, or set "
        "model.family=null to use it anyway"
    )


def warn_of_other_family(
    model: ModelSource, model_type: ModelFamily | AutoFamily, family: ModelFamily
) -> None:
    """Warn where only the widths of the layers show another family: denoisers of one class may differ so."""
    is_named = isinstance(model_type, ModelFamily)
    if model.family in (None, family.name) or is_named:
        return
    log.warning(
        "The denoiser is of the family %s, and the steps, guidance and size are those of a model of %s; set "
        "them with sampler.*, or choose another model",
        family.name,
        model.family,
    )


def make_skip_rule(family: ModelFamily, denoiser: nn.Module) -> Callable[[str], str | None]:
    """Why a Linear of a denoiser stays float, by its name; None: it does not.

    Of two denoisers, the family describes the layers of each.
    """
    is_single = "" in split_denoiser(denoiser)

    def find_skip_reason(name: str) -> str | None:
        return family.find_skip_reason(name if is_single else name.partition(".")[2])

    return find_skip_reason


def hash_model_files(source: ResolvedModel, cache: DiskCache) -> list[tuple[str, str]]:
    """Name and SHA-256 of every file that decides what a model generates.

    Args:
        cache: remembers hashes of files that did not change.
    """
    files = {
        path.relative_to(source.folder).as_posix(): path
        for path in source.folder.rglob("*")
        if path.suffix in HASHED_SUFFIXES
    }
    if source.has_single_files:
        for denoiser in source.denoisers:
            for path in list_safetensors(denoiser.weights):
                files[f"{denoiser.component}: {path.name}"] = path
    return [(name, cache.hash_file(path)) for name, path in sorted(files.items())]


def list_safetensors(path: Path) -> list[Path]:
    """The `.safetensors` files of a folder, or the one file that a path names."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


class SkeletonLinear(nn.Module):
    """Takes the place of a Linear whose weight is not read: zeros of the right shape.

    The denoiser runs with it, and so the other layers show how many rows they see.

    Args:
        in_features: K.
        out_features: N.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> zeros [..., N]."""
        return x.new_zeros(*x.shape[:-1], self.out_features)


def replace_missing_linears(denoiser: nn.Module) -> nn.Module:
    """A copy of the module tree with a SkeletonLinear for every Linear without a weight.

    Returns:
        The copy, which shares all tensors; the module itself where every Linear has a weight.
    """
    linears = {name: m for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    missing = {name: linear for name, linear in linears.items() if linear.weight.is_meta}
    if not missing:
        return denoiser
    copy = copy_sharing_tensors(denoiser)
    for name, linear in missing.items():
        parent, _, child = name.rpartition(".")
        setattr(copy.get_submodule(parent), child, SkeletonLinear(linear.in_features, linear.out_features))
    return copy


def set_offload(pipe: DiffusionPipeline, mode: str, device: torch.device) -> None:
    """Turn on diffusers' offloading for everything that the pipeline has now.

    Args:
        mode: `none`; `model`: one component on the GPU at a time; `group`: one block at a time.
        device: the GPU.
    """
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode == "group":
        pipe.enable_group_offload(
            onload_device=device, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
        )


def set_attention(denoiser: Any, name: str) -> None:
    """Set diffusers' attention backend.

    Raises:
        ConfigError: when this denoiser or this machine cannot use it.
    """
    if name == "native":
        return
    try:
        denoiser.set_attention_backend(name)
    except (AttributeError, ValueError, ImportError, RuntimeError) as error:
        reason = shorten_error(error)
        raise ConfigError(
            f"attention={name} cannot be used with {type(denoiser).__name__}: {reason}"
        ) from error


def check_sampling(pipe: DiffusionPipeline, sampling: Sampling) -> None:
    """Raise ConfigError for sampler settings that the pipeline does not take."""
    unknown = find_unknown_arguments(pipe, sampling)
    if unknown:
        raise ConfigError(
            f"sampler.extra.{unknown[0]} is not an argument of {type(pipe).__name__}; see the pipeline's "
            "documentation"
        )
