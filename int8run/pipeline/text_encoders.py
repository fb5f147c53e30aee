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
from int8run.models.resolve_weights import to_local_path
from int8run.models.sampling import Sampling
from int8run.models.source import read_config, read_model_index, resolve_part_folder
from int8run.quant.formats import FORMATS, WeightFormat
from int8run.report.console import Progress
from int8run.text_encoders.base import KEEP, TextEncoders
from int8run.text_encoders.build import BuiltEncoder, build_encoder, fit_weights
from int8run.text_encoders.detect import find_encoders
from int8run.text_encoders.kernels import Kernels
from int8run.text_encoders.quantized_layers import WeightChange
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.weights import EncoderFile

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
        parts: by component, the class of transformers and its hub id or folder.
    """
    found = {}
    for name, value in read_model_index(folder, str(folder)).items():
        if (
            name.startswith(PREFIX)
            and isinstance(value, list)
            and None not in value
            and len(value) == 2
            and (folder / name).is_dir()
        ):
            found[name] = EncoderSlot(name, str(value[1]), folder / name)
    for name, (class_name, location) in parts.items():
        if name.startswith(PREFIX) and name not in found:
            found[name] = EncoderSlot(name, class_name, resolve_part_folder(name, location))
    return found


def open_encoders(
    clip: TextEncoders, folder: Path, parts: Mapping[str, Sequence[str]], dtype: torch.dtype
) -> dict[str, OpenedEncoder]:
    """The text encoders that `clip=` changes, by component; only headers are read.

    Raises:
        ConfigError: for a component that the pipeline does not have, a file that fits none, or a format that
            contradicts a file.
        FileError: when a file cannot be read.
    """
    if not clip.is_quantized:
        if clip.format != KEEP:
            log.info("clip=%s without clip.path leaves the text encoders as they are", clip.format)
        return {}
    there = find_encoder_slots(folder, parts)
    if not there:
        raise ConfigError(f"clip={clip.format}: the pipeline in {folder} has no text encoder; set clip=keep")
    if clip.path is None:
        chosen = list(there) if clip.components is None else [str(component) for component in clip.components]
        check_components("clip.components", chosen, there)
        form = FORMATS[clip.format]
        own = {c: EncoderFile(there[c].folder, class_name=there[c].class_name) for c in chosen}
        return {c: OpenedEncoder(c, there[c].skeleton(dtype), weights, form) for c, weights in own.items()}
    if isinstance(clip.path, Mapping):
        check_components("clip.path", [str(component) for component in clip.path], there)
        named = {str(component): str(path) for component, path in clip.path.items()}
        return {
            c: match_files_to_slots(open_encoder_files(path, clip.format), {c: there[c]}, dtype)[c]
            for c, path in named.items()
        }
    opened = match_files_to_slots(open_encoder_files(str(clip.path), clip.format), there, dtype)
    log.info("%s", describe_replaced(list(opened), list(there)))
    for component, one in opened.items():
        if not one.weights.format_counts:
            log.warning(
                "clip.path=%s: no layer of %s is quantized; it is a float encoder",
                one.weights.where,
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


def check_components(setting: str, named: Sequence[str], there: Mapping[str, EncoderSlot]) -> None:
    """Refuse components that the pipeline does not have.

    Raises:
        ConfigError: with those that it has.
    """
    for component in named:
        if component not in there:
            raise ConfigError(
                f"{setting} names {component}; {suggest_similar(component, list(there))}"
                f"the pipeline has {', '.join(there)}"
            )


def match_files_to_slots(
    files: Sequence[EncoderFile], there: Mapping[str, EncoderSlot], dtype: torch.dtype
) -> dict[str, OpenedEncoder]:
    """The places of the encoders of one file among those of a pipeline; each that has none is left out.

    Raises:
        ConfigError: when none fits, or one fits more than one place.
    """
    found: dict[str, OpenedEncoder] = {}
    whys = []
    for weights in files:
        places = []
        for component, slot in there.items():
            model = slot.skeleton(dtype)
            why = find_mismatch(weights, slot, model)
            if why:
                whys.append(f"{component} {why}")
            else:
                places.append(OpenedEncoder(component, model, weights, None))
        if len(places) > 1:
            raise ConfigError(
                f"clip.path={weights.where} fits {', '.join(opened.component for opened in places)}; say "
                f"which: 'clip.path={{{places[0].component}: FILE}}'"
            )
        for opened in places:
            if opened.component in found:
                raise ConfigError(
                    f"clip.path={weights.where} holds two encoders that fit {opened.component}; take a file "
                    "with one of them"
                )
            found[opened.component] = opened
    if not found:
        held = " and ".join(dict.fromkeys(weights.encoder.name for weights in files))
        raise ConfigError(f"clip.path={files[0].where} holds {held}, which fits no place: {'; '.join(whys)}")
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
        matches: the LoRAs' changes by component; they are put on at strength 0.
    """
    made = QuantizedEncoders()
    for component, one in opened.items():
        encoder = one.weights.encoder
        tokens = min(int(sampling.extra.get("max_sequence_length") or encoder.num_tokens), encoder.num_tokens)
        kernels = Kernels(clip.kernel_backend, device, tokens * sampling.batch)
        changes = matches.by_component.get(component, {})

        def adopt(model: nn.Module, component: str = component, changes: Any = changes) -> WeightChange:
            if not changes:
                return lambda name, read: None
            made.merges[component] = FloatMerge(model, changes)
            made.merges[component].attach()
            return make_merge_reader(made.merges[component])

        with (
            progress.track_step(f"{'load' if one.to is None else 'quantize'} {component}"),
            one.weights.files,
        ):
            made.built[component] = build_encoder(one.skeleton, one.weights, one.to, kernels, adopt)
    return made


def make_merge_reader(merge: FloatMerge) -> Callable[[str, Callable[[], Tensor]], Tensor | None]:
    """What LoRAs add to weights that are read: nothing at strength 0."""

    def merged(name: str, read: Callable[[], Tensor]) -> Tensor | None:
        return (
            merge.merge_weight(name, read())
            if name in merge.deferred and any(merge.strengths or ())
            else None
        )

    return merged
