"""Find and read LoRA files: tensors to changes of modules, under the names that the file gives them."""

import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.dora import DoRA
from int8run.lora.key_parsing import DENOISER, TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3, parse_key
from int8run.lora.parse import (
    AUXILIARY_PARTS,
    PART_NAMES,
    USUAL_SCALES,
    USUAL_VALUE,
    AdapterTensors,
    build_change,
    format_dtype,
    require_tensors,
)

SHIPPED_LORAS = Path(__file__).parents[1] / "assets" / "lora"
PICKLE_SUFFIXES = (".pt", ".bin", ".ckpt", ".pth")
BIAS_PARTS = {"diff_b", "b_norm", "up_bias"}
# components by their names in the header that diffusers writes
HEADER_COMPONENTS = {"transformer": DENOISER, "unet": DENOISER} | {
    name: name for name in (TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3)
}


@dataclass(frozen=True)
class LoraFile:
    """What a file holds.

    Args:
        changes: component -> module name as in the file, without prefixes -> what is done to that module.
        unknown: keys that nothing is done with, each with the reason.
        metadata: the header's own words, untrusted.
        notes: what a user should know of the file before using it.
    """

    path: Path
    changes: Mapping[str, Mapping[str, LoraChange]]
    skipped_keys: tuple[tuple[str, str], ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def all_changes(self) -> list[LoraChange]:
        """Of all components."""
        return [change for by_name in self.changes.values() for change in by_name.values()]

    @property
    def adapter_types(self) -> Counter[str]:
        """How many modules each kind changes."""
        return Counter(change.adapter_type for change in self.all_changes)

    @property
    def ranks(self) -> Counter[int]:
        """How many modules have each rank."""
        return Counter(
            c.weight_delta.rank
            for c in self.all_changes
            if c.weight_delta is not None and c.weight_delta.rank is not None
        )

    @property
    def scales(self) -> Counter[float]:
        """How many modules have each alpha / rank."""
        return Counter(
            c.weight_delta.scale
            for c in self.all_changes
            if c.weight_delta is not None and c.weight_delta.rank is not None
        )

    @cached_property
    def identity(self) -> str:
        """A hash of the tensors' bytes: equal for copies of a file, whatever their names and headers say."""
        with self.path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_lora(source: str, weight_name: str | None, folder: Path | None = None) -> Path:
    """The file of a source: a path, a name in `folder`, a shipped name, or a hub id with `weight_name`.

    Names may leave `.safetensors` out.

    Raises:
        LoraError: naming the path tried, the folders searched and the nearest names in them.
    """
    name = Path(weight_name or source)
    if name.suffix.lower() in PICKLE_SUFFIXES:
        raise LoraError(
            f"{name} is a pickled file, which can run code when opened; convert it to .safetensors first"
        )
    if weight_name is not None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(source, weight_name))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise LoraError(
                f"LoRA {weight_name!r} of {source!r} could not be had from the hub: {reason}"
            ) from error
    path = Path(source).expanduser()
    named = path.suffix.lower() == ".safetensors"
    file = path if named else Path(f"{path}.safetensors")
    bare = path.parent == Path()
    homes = (
        []
        if path.is_absolute()
        else [home for home in (folder, SHIPPED_LORAS if bare else None) if home is not None]
    )
    for candidate in (path, *(home.expanduser() / file for home in homes)):
        if candidate.is_file():
            return candidate
    places = ([path.parent] if named or not bare else []) + [
        (home.expanduser() / file).parent for home in homes
    ]
    there = sorted(
        {
            p.name if named else p.stem
            for place in places
            if place.is_dir()
            for p in place.glob("*.safetensors")
        }
    )
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.0)
    nearest = f"; nearest there: {', '.join(near)}" if near else "; no .safetensors file there"
    if bare and folder is None:
        nearest += "; lora_dir=FOLDER adds a folder of yours"
    if not named and not path.is_absolute() and len(path.parts) == 2:
        nearest += "; a repository on the hub needs weight_name as well"
    raise LoraError(
        f"LoRA file not found: {path}; searched {', '.join(str(p.resolve()) for p in places)}{nearest}"
    )


def read_lora(path: Path) -> LoraFile:
    """Read every change in a file, and check what can be told without the model it is for.

    The scale is `alpha / rank`, from `<module>.alpha` or the PEFT header (`lora_adapter_metadata`), else 1.

    Raises:
        LoraError: for a damaged file, a module with parts missing or that do not fit each other, integers without their scale,
            a name that is there twice, or values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return read_modules(path, list(file.keys()), file.get_tensor, metadata)
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path} is not a readable safetensors file: {error}") from error


def read_modules(
    path: Path, keys: Iterable[str], get_tensor: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> LoraFile:
    """`read_lora` of an open file: its keys by module, then one module after the other."""
    modules: dict[tuple[str, str], dict[str, str]] = {}
    unknown: dict[str, str] = {}
    left_out: dict[tuple[str, str], str] = {}
    for key in keys:
        component, name, part, reason = parse_key(key)
        if part is None:
            unknown[key] = left_out[component, name] = reason
        elif (twice := modules.setdefault((component, name), {}).setdefault(part, key)) != key:
            raise LoraError(
                f"{path}: {name} is in the file twice, as {twice} and {key}; which one is meant cannot be told"
            )
    header, survey = PeftHeader(metadata), FileSurvey()
    changes: dict[str, dict[str, LoraChange]] = {}
    for (component, name), by_part in modules.items():
        # without a part that is not applied, the rest would be another LoRA
        why_not = left_out.get((component, name)) or find_skip_reason(by_part.keys())
        if why_not:
            unknown |= dict.fromkeys(by_part.values(), why_not)
            continue
        try:
            parts = dequantize_factors(
                {part: to_computable_dtype(part, get_tensor(key)) for part, key in by_part.items()}
            )
            peaks = compute_peaks(parts)
            change = build_change(parts, partial(header.scale, component, name, parts.get("alpha")))
        except LoraError as error:
            raise LoraError(f"{path}: {name} {error}") from error
        survey.add(name, peaks, change)
        changes.setdefault(component, {})[name] = change
    return LoraFile(path, changes, tuple(unknown.items()), metadata, survey.notes())


def find_skip_reason(parts: Iterable[str]) -> str | None:
    """Why a module's parts do nothing; None: they do something."""
    if set(parts) == {"alpha"}:
        return "an alpha without a change"
    if "weight" in parts and "on_input" not in parts:
        return "a weight of a model, not a change of one"
    return None


def to_computable_dtype(part: str, tensor: Tensor) -> Tensor:
    """The tensor in a dtype that PyTorch computes in: 8-bit floats become bfloat16, which has all their values."""
    if tensor.numel() == 0:
        raise LoraError(f"has an empty {PART_NAMES.get(part, part)}; the file is broken")
    if tensor.is_complex():
        raise LoraError(f"has a {PART_NAMES.get(part, part)} of {format_dtype(tensor)}; the file is broken")
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def compute_peaks(parts: AdapterTensors) -> dict[str, float]:
    """The largest magnitude of each part.

    Raises:
        LoraError: for NaN or infinity.
    """
    peaks = {part: tensor.abs().max().item() for part, tensor in parts.items() if part != "on_input"}
    for part, peak in peaks.items():
        if not math.isfinite(peak):
            raise LoraError(
                f"has values that are not finite numbers in its {PART_NAMES.get(part, part)}; the file is broken"
            )
    return peaks


def dequantize_factors(parts: AdapterTensors) -> dict[str, Tensor]:
    """The parts with quantized halves multiplied out.

    Raises:
        LoraError: integers without their scales, or packed ones.
    """
    floats = dict(parts)
    for half in ("down", "up"):
        scale = floats.pop(f"{half}_scale", None)
        if scale is not None:
            (tensor,) = require_tensors(parts, half)
            if tensor.dtype != torch.int8 and not tensor.is_floating_point():
                raise LoraError(
                    f"has a {PART_NAMES[half]} of {format_dtype(tensor)}; only int8 and floats are multiplied by a scale"
                )
            if scale.numel() not in (1, tensor.shape[0]):
                raise LoraError(
                    f"has {scale.numel()} scales for the {tensor.shape[0]} rows of its {PART_NAMES[half]}; the file is broken"
                )
            floats[half] = tensor.float() * scale.float().reshape(-1, *[1] * (tensor.dim() - 1))
    for part, tensor in floats.items():
        if part not in AUXILIARY_PARTS and not tensor.is_floating_point():
            raise LoraError(
                f"has a {PART_NAMES.get(part, part)} of {format_dtype(tensor)} without a scale (scale_weight); "
                "the file was quantized and its scales are gone: take the unquantized one"
            )
    return floats


class PeftHeader:
    """Settings of the adapters as diffusers writes them into the header, by component."""

    def __init__(self, metadata: Mapping[str, str]):
        try:
            settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except (json.JSONDecodeError, RecursionError):
            settings = None
        self.by_component: dict[str | None, dict[str, object]] = {}
        for key, value in settings.items() if isinstance(settings, dict) else ():
            first, _, rest = key.partition(".")
            component, setting = (
                (HEADER_COMPONENTS[first], rest) if first in HEADER_COMPONENTS and rest else (None, key)
            )
            self.by_component.setdefault(component, {})[setting] = value

    def scale(self, component: str, name: str, alpha: Tensor | None, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) where the header says rsLoRA. An `.alpha` tensor wins; 0 means rank, as in kohya's files.

        Raises:
            LoraError: an alpha that is no number, or a pattern that is no regular expression.
        """
        if alpha is not None:
            if alpha.numel() != 1:
                raise LoraError(
                    f"has an alpha of shape {list(alpha.shape)}; it is one number, the file is broken"
                )
            return (alpha.item() or rank) / rank
        settings = self.by_component.get(None, {}) | self.by_component.get(component, {})
        patterns = settings.get("alpha_pattern")
        try:
            matching = (
                (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name))
                if isinstance(patterns, dict)
                else iter(())
            )
            value = next(matching, settings.get("lora_alpha"))
        except re.error as error:
            raise LoraError(
                f"cannot be scaled: the file's alpha_pattern is no regular expression: {error}"
            ) from error
        if value is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise LoraError(f"cannot be scaled: the file's lora_alpha is {value!r}, which is no number")
        return value / math.sqrt(rank) if settings.get("use_rslora") else value / rank


class FileSurvey:
    """What is odd about a file's modules, gathered for one line each."""

    def __init__(self) -> None:
        self.modules = 0
        self.idle: list[str] = []
        self.scaled: list[tuple[str, float]] = []
        self.large: list[tuple[str, float]] = []

    def add(self, name: str, peaks: Mapping[str, float], change: LoraChange) -> None:
        """Look at one module; `peaks` are the largest magnitudes of its parts."""
        self.modules += 1
        peaks = {part: value for part, value in peaks.items() if part not in AUXILIARY_PARTS}
        factors = [value for part, value in peaks.items() if part not in BIAS_PARTS]
        moves_bias = any(peaks.get(part) for part in BIAS_PARTS)
        # a product with a factor of zeros is zero; DoRA's norms change a weight even then
        if not isinstance(change.weight_delta, DoRA) and not moves_bias and not all(factors or [0.0]):
            self.idle.append(name)
        if (largest := max(peaks.values())) > USUAL_VALUE:
            self.large.append((name, largest))
        low, high = USUAL_SCALES
        if (
            change.weight_delta is not None
            and change.weight_delta.rank is not None
            and not low <= change.weight_delta.scale <= high
        ):
            self.scaled.append((name, change.weight_delta.scale))

    def notes(self) -> tuple[str, ...]:
        """One line for each thing worth knowing."""
        notes = []
        if self.idle and len(self.idle) == self.modules:
            notes.append(
                f"the LoRA has no effect (B = 0 in {self.modules}/{self.modules} modules): untrained or zero-initialised file"
            )
        elif self.idle:
            notes.append(
                f"{len(self.idle)} of {self.modules} modules have no effect (B = 0; first: {self.idle[0]})"
            )
        if self.scaled:
            name, scale = self.scaled[0]
            low, high = USUAL_SCALES
            notes.append(
                f"alpha / rank is {scale:g} in {name} (and so unusual in {len(self.scaled)} of {self.modules} modules); "
                f"usual is {low:g} to {high:g}: the LoRA may need another strength"
            )
        if self.large:
            name, value = max(self.large, key=lambda pair: pair[1])
            notes.append(
                f"values up to {value:.3g} in {name} ({len(self.large)} modules above {USUAL_VALUE:g}): the file may be damaged"
            )
        return tuple(notes)
