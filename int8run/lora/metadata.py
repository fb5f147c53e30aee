"""What `task=inspect` shows of a LoRA's metadata: title, author, trainer, rank, license, advised strength.

All of it is a stranger's text, for people to read: nothing here decides how a LoRA is applied.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from int8run.errors import LoraError
from int8run.lora.untrusted_text import (
    get_nested,
    is_empty,
    parse_json,
    read_front_matter,
    read_optional_text,
    sanitize_text,
)
from int8run.lora.written_settings import describe_rank_and_alpha, read_settings

MAX_TEXT_CHARS = 200
MAX_NUMBER_CHARS = 100
# metadata key -> trainer; the first that is there counts
TRAINER_BY_KEY = {
    "ot_revision": "OneTrainer",
    "ot_branch": "OneTrainer",
    "ot_config": "OneTrainer",
    "lora_adapter_metadata": "diffusers / PEFT",
}
# part of a key -> layout, where the metadata names no trainer; the first that is there counts
LAYOUT_BY_KEY_PART = {
    "hada_w": "LyCORIS layout",
    "lokr_w": "LyCORIS layout",
    "lycoris_": "LyCORIS layout",
    "lora_transformer_": "OneTrainer layout",
    "lora_unet_": "kohya layout",
    "lora_te": "kohya layout",
    "processor.": "diffusers layout, old or xlabs",
    "diffusion_model.": "ComfyUI / ai-toolkit layout",
    "lora_A": "diffusers / PEFT layout",
}


def describe_header(path: Path, metadata: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    """What is worth showing of a LoRA's header, as name -> text; what it does not say is left out.

    Args:
        path: of the LoRA; files beside it are read as well.
        metadata: of its header, untrusted.
        keys: names of the tensors, which show the layout where no trainer is named.
    """
    sidecar = parse_json(read_optional_text(path.with_name(path.stem + ".json")))
    values = {
        "title": metadata.get("modelspec.title"),
        "author": metadata.get("modelspec.author"),
        "trainer": detect_trainer(metadata, keys),
        "rank and alpha": format_rank_and_alpha(path, metadata),
        "resolution": metadata.get("modelspec.resolution") or metadata.get("ss_resolution"),
        "license": metadata.get("modelspec.license") or read_front_matter(path).get("license"),
        "usage hint": metadata.get("modelspec.usage_hint"),
        "tags": metadata.get("modelspec.tags"),
        "advised strength": get_nested(sidecar, ("preferred weight",)),
    }
    texts = {name: sanitize_text(value, MAX_TEXT_CHARS) for name, value in values.items()}
    return {name: text for name, text in texts.items() if not is_empty(text)}


def detect_trainer(metadata: Mapping[str, str], keys: Iterable[str]) -> str | None:
    """The program that made a file, else the program whose layout it has, or None.

    Args:
        metadata: of the header, untrusted.
        keys: names of the tensors.
    """
    software = get_nested(parse_json(metadata.get("software")), ("name",))
    if isinstance(software, str):
        return software

    module = metadata.get("ss_network_module")
    if isinstance(module, str) and module:
        return describe_kohya_module(module, metadata)
    for key, trainer in TRAINER_BY_KEY.items():
        if key in metadata:
            return trainer
    keys = list(keys)
    for key_part, layout in LAYOUT_BY_KEY_PART.items():
        if any(key_part in key for key in keys):
            return layout
    return None


def describe_kohya_module(module: str, metadata: Mapping[str, str]) -> str:
    """`kohya (networks.lora)` or `LyCORIS (lokr)`, which trains within kohya's scripts.

    Args:
        module: of Python, that made the layers.
        metadata: of the header, untrusted.
    """
    if not module.startswith("lycoris"):
        return f"kohya ({module})"
    algorithm = get_nested(parse_json(metadata.get("ss_network_args")), ("algo",))
    if not isinstance(algorithm, str):
        return "LyCORIS"
    return f"LyCORIS ({algorithm})"


def format_rank_and_alpha(path: Path, metadata: Mapping[str, str]) -> str | None:
    """`rank 16, alpha 8` as the header or PEFT's file beside it has them; ranks of the tensors may differ.

    Args:
        path: of the LoRA.
        metadata: of its header, untrusted.
    """
    try:
        written = describe_rank_and_alpha(read_settings(path, metadata).places)
    except LoraError as error:
        return f"cannot be read: {error}"
    numbers = {
        "rank": metadata.get("ss_network_dim") or written.get("rank"),
        "alpha": metadata.get("ss_network_alpha") or written.get("alpha"),
    }
    parts = []
    for name, value in numbers.items():
        if not is_empty(sanitize_text(value, MAX_NUMBER_CHARS)):
            parts.append(f"{name} {value}")
    return ", ".join(parts) or None
