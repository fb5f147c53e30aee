"""Find and read LoRA files: names to low-rank pairs, header facts to show."""

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from int8run.errors import LoraError
from int8run.layers.linear import LowRank

SHIPPED = Path(__file__).parents[1] / "assets" / "lora"
# suffixes of the two halves in the PEFT, diffusers and ComfyUI layouts
DOWN = (".lora_A.default.weight", ".lora_A.weight", ".lora_down.weight")
UP = (".lora_B.default.weight", ".lora_B.weight", ".lora_up.weight")
ALPHA = ".alpha"
DENOISER_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "unet.")
TRIGGER_KEYS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger_phrase", "instance_prompt")


@dataclass(frozen=True)
class LoraFile:
    """What a file holds: low-rank pairs by module name, keys of no known kind, and the header's own words."""

    path: Path
    pairs: Mapping[str, LowRank]
    unknown: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def ranks(self) -> list[int]:
        """The different ranks in the file."""
        return sorted({p.lora_A.shape[0] for p in self.pairs.values()})


def find_lora(source: str, weight_name: str | None) -> Path:
    """The file of a source: a path, a shipped name, or a hub id with `weight_name`.

    Raises:
        LoraError: naming the path tried, the folder searched and the nearest names in it.
    """
    name = Path(weight_name or source)
    if name.suffix.lower() in (".pt", ".bin", ".ckpt", ".pth"):
        raise LoraError(f"{name} is a pickled file, which can run code when opened; convert it to .safetensors first")
    if weight_name is not None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(source, weight_name))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise LoraError(f"LoRA {weight_name!r} of {source!r} could not be had from the hub: {reason}") from error
    path = Path(source).expanduser()
    shipped = SHIPPED / f"{source}.safetensors"
    for candidate in (path, shipped):
        if candidate.is_file():
            return candidate
    folder = path.parent if path.suffix or path.parent != Path() else SHIPPED
    there = sorted(p.name if path.suffix else p.stem for p in folder.glob("*.safetensors")) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.0)
    nearest = f"; nearest there: {', '.join(near)}" if near else "; no .safetensors file there"
    raise LoraError(f"LoRA file not found: {path}; searched {folder.resolve()}{nearest}")


def read_lora(path: Path) -> LoraFile:
    """Read the low-rank pairs of the denoiser from a PEFT, diffusers or ComfyUI style file.

    The scale is `alpha / rank`, from `<module>.alpha` or the PEFT header (`lora_adapter_metadata`), else 1.

    Raises:
        LoraError: for a damaged file, a half pair, or shapes that do not fit each other.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise LoraError(f"{path} is not a readable safetensors file: {error}") from error
    halves: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        name, part = split_key(key)
        if part is None:
            unknown.append(key)
        else:
            halves.setdefault(strip_prefixes(name), {})[part] = tensor
    pairs = {}
    for name, half in halves.items():
        if "down" not in half or "up" not in half:
            missing = "lora_B (up)" if "down" in half else "lora_A (down)"
            raise LoraError(f"{path}: {name} has no {missing}; the file is incomplete")
        down, up = half["down"], half["up"]
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            shapes = f"lora_A {list(down.shape)}, lora_B {list(up.shape)}"
            raise LoraError(f"{path}: {name} has {shapes}; a pair is [rank, in] and [out, rank]")
        pairs[name] = LowRank(down, up, scale_of(name, down.shape[0], half.get("alpha"), metadata))
    return LoraFile(path, pairs, tuple(unknown), metadata)


def split_key(key: str) -> tuple[str, str | None]:
    """`a.b.lora_A.weight` -> (`a.b`, `down`); part is None for a key of no known kind."""
    for suffixes, part in ((DOWN, "down"), (UP, "up"), ((ALPHA,), "alpha")):
        for suffix in suffixes:
            if key.endswith(suffix):
                return key.removesuffix(suffix), part
    return key, None


def strip_prefixes(name: str) -> str:
    """Remove component prefixes, which may nest, until none is left."""
    for prefix in DENOISER_PREFIXES:
        if name.startswith(prefix):
            return strip_prefixes(name.removeprefix(prefix))
    return name


def scale_of(name: str, rank: int, alpha: torch.Tensor | None, metadata: Mapping[str, str]) -> float:
    """alpha / rank; an `.alpha` tensor wins over the header; alpha 0 means rank, as in kohya's files."""
    if alpha is not None:
        return (alpha.item() or rank) / rank
    try:
        peft = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError:
        return 1.0
    if not isinstance(peft, dict):
        return 1.0
    by_name = {strip_prefixes(key): value for key, value in peft.items()}
    patterns = by_name.get("alpha_pattern") or {}
    try:
        value = next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), by_name.get("lora_alpha"))
    except re.error as error:
        raise LoraError(f"the file's alpha_pattern is no regular expression: {error}") from error
    if value is None:
        return 1.0
    return value / math.sqrt(rank) if by_name.get("use_rslora") else value / rank


def trigger_words(metadata: Mapping[str, str]) -> str | None:
    """The first trigger words that the header names, at most 200 characters of them."""
    return next((metadata[key][:200] for key in TRIGGER_KEYS if metadata.get(key)), None)
