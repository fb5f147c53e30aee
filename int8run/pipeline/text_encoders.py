"""The text encoders that `clip=` quantizes: opened before the pipeline is loaded, and built after it.

load.py opens them, build.py builds them. LoRA strengths change them without a new build.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError, suggest_similar
from int8run.layers.plan import LayerPlan
from int8run.lora.float_merge import FloatMerge
from int8run.lora.match import Matches
from int8run.models.model_folders import read_model_index, resolve_part_folder
from int8run.models.sampling import Sampling
from int8run.models.source import find_components, read_config
from int8run.quant.formats import FORMATS, WeightFormat
from int8run.report.console import Progress
from int8run.text_encoders.base import KEEP, TextEncoders
from int8run.text_encoders.build import BuiltEncoder, build_encoder, fit_weights
from int8run.text_encoders.detect import find_encoders
from int8run.text_encoders.kernels import Kernels
from int8run.text_encoders.quantized_layers import WeightChange
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.weights import EncoderFile
from int8run.utils.paths import to_local_path

log = logging.getLogger(__name__)
PREFIX = "text_encoder"


@dataclass(frozen=True)
class EncoderSlot:
    """One text encoder of a pipeline.

    Args:
        component: its name in the pipeline.
        class_name: of transformers.
        folder: with its config and weights.
    """

    component: str
    class_name: str
    folder: Path

    def skeleton(self, dtype: torch.dtype) -> nn.Module:
        """The module without weights."""
        return build_skeleton(self.class_name, dict(read_config(self.folder)), dtype)


@dataclass(frozen=True)
class OpenedEncoder:
    """A text encoder that is to be quantized, before anything of it is read.

    Args:
        skeleton: of the pipeline's class and config.
        to: what float layers become; None: they stay as they are.
    """

    component: str
    skeleton: nn.Module
    weights: EncoderFile
    to: WeightFormat | None


@dataclass
class QuantizedEncoders:
    """The quantized text encoders of a run."""

    built: dict[str, BuiltEncoder] = field(default_factory=dict)
    merges: dict[str, FloatMerge] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """By component."""
        return {component: built.module for component, built in self.built.items()}

    @property
    def plans(self) -> list[LayerPlan]:
        """What became of each Linear and embedding, the component before its name."""
        return [
            replace(plan, name=f"{component}.{plan.name}")
            for component, built in self.built.items()
            for plan in built.plans
        ]

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Set the LoRA strengths. Layers that change are quantized again, from their unchanged weight."""
        for component, merge in self.merges.items():
            merge.set_strengths(strengths)
            self.built[component].refresh({*merge.deferred, *merge.biases})


def find_encoder_slots(folder: Path, parts: Mapping[str, Sequence[str]]) -> dict[str, EncoderSlot]:
    """The text encoders of a pipeline's folder, and those that come from elsewhere.

    Args:
        folder: of the pipeline.
        parts: by component, the class of transformers and its hub id or folder.
    """
    slots = {}
    for name, (_, class_name) in find_components(read_model_index(folder, str(folder))).items():
        encoder_folder = folder / name
        if name.startswith(PREFIX) and class_name is not None and encoder_folder.is_dir():
            slots[name] = EncoderSlot(name, class_name, encoder_folder)
    # those that the folder lacks
    for name, (part_class, location) in parts.items():
        if name.startswith(PREFIX) and name not in slots:
            slots[name] = EncoderSlot(name, part_class, resolve_part_folder(name, location))
    return slots


def open_encoders(
    clip: TextEncoders, folder: Path, parts: Mapping[str, Sequence[str]], dtype: torch.dtype
) -> dict[str, OpenedEncoder]:
    """The text encoders that `clip=` changes, by component; only headers are read.

    Args:
        clip: what becomes of which encoders, and the files of them.
        folder: of the pipeline.
        parts: encoders that the folder lacks, as of `find_encoder_slots`.
        dtype: of the float encoders.

    Raises:
        ConfigError: for a component that the pipeline does not have, a file that fits none, or a format that
            contradicts a file.
        FileError: when a file cannot be read.
    """
    if not clip.is_quantized:
        if clip.format != KEEP:
            log.info("clip=%s without clip.path leaves the text encoders as they are", clip.format)
        return {}
    slots = find_encoder_slots(folder, parts)
    if not slots:
        raise ConfigError(f"clip={clip.format}: the pipeline in {folder} has no text encoder; set clip=keep")
    if clip.path is None:
        return open_own_encoders(clip, slots, dtype)
    if isinstance(clip.path, Mapping):
        paths = {str(component): str(path) for component, path in clip.path.items()}
        return open_named_encoders(paths, slots, clip.format, dtype)
    return open_fitting_encoders(str(clip.path), slots, clip.format, dtype)


def open_own_encoders(
    clip: TextEncoders, slots: Mapping[str, EncoderSlot], dtype: torch.dtype
) -> dict[str, OpenedEncoder]:
    """The pipeline's own encoders, which become what `clip=` says: all, or those of `clip.components`."""
    chosen = list(slots)
    if clip.components is not None:
        chosen = [str(component) for component in clip.components]
    check_components("clip.components", chosen, slots)
    opened = {}
    for component in chosen:
        slot = slots[component]
        weights = EncoderFile(slot.folder, class_name=slot.class_name)
        opened[component] = OpenedEncoder(component, slot.skeleton(dtype), weights, FORMATS[clip.format])
    return opened


def open_named_encoders(
    paths: Mapping[str, str], slots: Mapping[str, EncoderSlot], quant_format: str, dtype: torch.dtype
) -> dict[str, OpenedEncoder]:
    """The encoders of a `clip.path` that names a file for each component."""
    check_components("clip.path", list(paths), slots)
    opened: dict[str, OpenedEncoder] = {}
    for component, path in paths.items():
        files = open_encoder_files(path, quant_format)
        opened |= match_files_to_slots(files, {component: slots[component]}, dtype)
    return opened


def open_fitting_encoders(
    path: str, slots: Mapping[str, EncoderSlot], quant_format: str, dtype: torch.dtype
) -> dict[str, OpenedEncoder]:
    """The encoders of a `clip.path` that is one file, at the components that they fit."""
    opened = match_files_to_slots(open_encoder_files(path, quant_format), slots, dtype)
    log.info("%s", describe_replaced(list(opened), list(slots)))
    for component, encoder in opened.items():
        if not encoder.weights.format_counts:
            log.warning(
                "clip.path=%s: no layer of %s is quantized; it is a float encoder",
                encoder.weights.where,
                component,
            )
    return opened


def describe_replaced(replaced: Sequence[str], components: Sequence[str]) -> str:
    """Say which components take their weights from `clip.path`, and which stay as they are.

    Args:
        replaced: components that the file is for.
        components: all text encoders of the pipeline.
    """
    line = f"clip.path has the weights of {' and '.join(replaced)}"
    kept = [component for component in components if component not in replaced]
    if not kept:
        return line
    verb = "stays as it is" if len(kept) == 1 else "stay as they are"
    return f"{line}; {' and '.join(kept)} {verb}"


def open_encoder_files(location: str, quant_format: str) -> list[EncoderFile]:
    """The text encoders in a file or folder: one, or those of a whole checkpoint."""
    path = to_local_path(location)
    with TensorFiles.open(path) as files:
        prefixes = list(find_encoders({key: info.shape for key, info in files.items()}))
    if len(prefixes) < 2:
        return [EncoderFile(path, quant_format)]
    return [EncoderFile(path, quant_format, which=prefix) for prefix in prefixes]


def check_components(setting: str, named: Sequence[str], slots: Mapping[str, EncoderSlot]) -> None:
    """Refuse components that the pipeline does not have.

    Raises:
        ConfigError: with those that it has.
    """
    for component in named:
        if component not in slots:
            raise ConfigError(
                f"{setting} names {component}; {suggest_similar(component, list(slots))}"
                f"the pipeline has {', '.join(slots)}"
            )


def match_files_to_slots(
    files: Sequence[EncoderFile], slots: Mapping[str, EncoderSlot], dtype: torch.dtype
) -> dict[str, OpenedEncoder]:
    """The encoders of one file at the components that they fit; an encoder that fits none is left out.

    Args:
        files: the encoders of the file.
        slots: of the pipeline, by component.
        dtype: of the float encoders.

    Raises:
        ConfigError: when none fits, or one fits more than one component.
    """
    found: dict[str, OpenedEncoder] = {}
    mismatches: list[str] = []
    for weights in files:
        fitting = []
        for component, slot in slots.items():
            skeleton = slot.skeleton(dtype)
            mismatch = find_mismatch(weights, slot, skeleton)
            if mismatch:
                mismatches.append(f"{component} {mismatch}")
            else:
                fitting.append(OpenedEncoder(component, skeleton, weights, None))
        if len(fitting) > 1:
            raise ConfigError(
                f"clip.path={weights.where} fits {', '.join(opened.component for opened in fitting)}; say "
                f"which: 'clip.path={{{fitting[0].component}: FILE}}'"
            )
        for opened in fitting:
            if opened.component in found:
                raise ConfigError(
                    f"clip.path={weights.where} holds two encoders that fit {opened.component}; take a file "
                    "with one of them"
                )
            found[opened.component] = opened
    if not found:
        held = " and ".join(dict.fromkeys(weights.encoder.name for weights in files))
        raise ConfigError(
            f"clip.path={files[0].where} holds {held}, which fits no place: {'; '.join(mismatches)}"
        )
    return found


def find_mismatch(weights: EncoderFile, slot: EncoderSlot, model: nn.Module) -> str:
    """Why a file cannot be a pipeline's encoder; empty where it can."""
    if slot.class_name not in weights.encoder.classes:
        return f"is a {slot.class_name}"
    try:
        layout = fit_weights(weights, model)
    except FileError as error:
        return f"has another size ({error})"
    return f"needs {layout.missing[0]}" if layout.missing else ""


def build_encoders(
    opened: Mapping[str, OpenedEncoder],
    clip: TextEncoders,
    device: torch.device,
    sampling: Sampling,
    matches: Matches,
    progress: Progress,
) -> QuantizedEncoders:
    """Read and quantize the encoders that were opened.

    Args:
        opened: by component.
        clip: has the backend of their kernels.
        device: where they run.
        sampling: how many tokens an encoder sees.
        matches: the LoRAs' changes by component; they are put on at strength 0.
        progress: of each encoder.
    """
    made = QuantizedEncoders()
    for component, encoder in opened.items():
        rows = count_tokens(encoder, sampling) * sampling.batch
        kernels = Kernels(clip.kernel_backend, device, rows)
        changes = matches.by_component.get(component, {})

        def adopt(model: nn.Module, component: str = component, changes: Any = changes) -> WeightChange:
            if not changes:
                return lambda name, read: None
            merge = FloatMerge(model, changes)
            merge.attach()
            made.merges[component] = merge
            return make_merge_reader(merge)

        verb = "load" if encoder.to is None else "quantize"
        with progress.track_step(f"{verb} {component}"), encoder.weights.files:
            made.built[component] = build_encoder(
                encoder.skeleton, encoder.weights, encoder.to, kernels, adopt
            )
    return made


def count_tokens(opened: OpenedEncoder, sampling: Sampling) -> int:
    """How many tokens of a prompt an encoder sees: what the sampling asks for, at most what it has."""
    most = opened.weights.encoder.num_tokens
    asked = sampling.extra.get("max_sequence_length") or most
    return min(int(asked), most)


def make_merge_reader(merge: FloatMerge) -> Callable[[str, Callable[[], Tensor]], Tensor | None]:
    """What LoRAs make of weights that are read; None, so that nothing is read, where they change nothing."""

    def read_merged(name: str, read: Callable[[], Tensor]) -> Tensor | None:
        has_strength = any(merge.strengths or ())
        if name not in merge.deferred or not has_strength:
            return None
        return merge.merge_weight(name, read())

    return read_merged
