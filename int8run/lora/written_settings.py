"""What a LoRA's writer says about alpha and rank outside of the tensors, and in which place.

Three places are read: `adapter_config.json` beside the file (PEFT), JSON in the file's header (diffusers
writes `lora_adapter_metadata`), and plain keys of the header such as `network_alpha`. Everything is a
stranger's text. What it means for a module is told by `int8run.lora.scale`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int8run.errors import LoraError
from int8run.lora.key_parsing import DENOISER, TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3
from int8run.lora.untrusted_text import (
    MAX_SIDECAR_BYTES,
    get_nested,
    parse_json,
    read_optional_text,
    sanitize_text,
)
from int8run.utils.plurals import count_noun

ADAPTER_CONFIG = "adapter_config.json"
PEFT_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
DIFFUSERS_KEY = "lora_adapter_metadata"
# keys of a header whose text is JSON with the settings of PEFT
JSON_KEYS = (DIFFUSERS_KEY, "lora_config", "peft_config", "adapter_config")

# spellings of the same two numbers, in the places that are read
ALPHA_KEYS = ("lora_alpha", "alpha", "network_alpha")
RANK_KEYS = ("r", "rank", "lora_rank", "lora_r", "network_dim", "network_rank", "dim", "lora_dim")
RSLORA_KEY = "use_rslora"
INITIALIZATION_KEY = "init_lora_weights"
# initializations that took the initial factors out of the base weights, and their articles
RELATIVE_INITIALIZATIONS = {
    "pissa": "PiSSA, arXiv 2404.02948",
    "olora": "OLoRA, arXiv 2406.01775",
    "corda": "CorDA, arXiv 2406.05223",
    "lora_ga": "LoRA-GA, arXiv 2407.05000",
    "loftq": "LoftQ, arXiv 2310.08659",
}
# in the name of a file or folder with such factors
INITIAL_WORD = "init"
# settings that tell how the tensors of PEFT's OFT become a rotation
OFT_SETTINGS = (
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
    "coft",
    "eps",
    "block_share",
    "peft_version",
)
# records of a training in which initializations may be named
RECORDED_ARGUMENTS = ("ss_network_args", "ss_network_module")
# prefix of a setting -> component that it is for
COMPONENT_PREFIXES = {
    "transformer": DENOISER,
    "unet": DENOISER,
    "denoiser": DENOISER,
    "diffusion_model": DENOISER,
    "transformer_2": DENOISER,
    TEXT_ENCODER: TEXT_ENCODER,
    TEXT_ENCODER_2: TEXT_ENCODER_2,
    TEXT_ENCODER_3: TEXT_ENCODER_3,
}

# what kohya's trainers and those after it write about a training; the alpha that counts is in the tensors
TRAINING_ALPHA_KEY, TRAINING_RANK_KEY = "ss_network_alpha", "ss_network_dim"
RECORD_PREFIXES = ("ss_", "modelspec.", "sshs_")
# keys that are a factor of the change for some writer, and whose meaning is not known here
SCALE_WORDS = ("scale", "scaling", "scaling_factor", "lora_scale", "lora_scaling")
MAX_TEXT_CHARS = 40
# in a JSON text that is not read
QUOTED_ALPHA_WORDS = ('"lora_alpha"', '"network_alpha"', '"linear_alpha"')

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """One place outside of the tensors where settings stand.

    Args:
        name: for messages.
        by_component: component -> its settings; None: for all components.
        is_peft: the settings are those of a PEFT configuration, with PEFT's defaults.
    """

    name: str
    by_component: Mapping[str | None, Settings]
    is_peft: bool

    def get_settings(self, component: str) -> Settings:
        """The settings of a component: its own win over those for all."""
        return {**self.by_component.get(None, {}), **self.by_component.get(component, {})}


@dataclass(frozen=True)
class WrittenSettings:
    """Everything that a writer says outside of the tensors.

    Args:
        places: where settings stand.
        warnings: what was seen and not understood.
    """

    places: tuple[Place, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def get_oft_settings(self, component: str) -> dict[str, Any]:
        """What PEFT's configurations say about the OFT of a component, in any place.

        Raises:
            LoraError: when two places contradict each other; a sentence without its subject.
        """
        found: dict[str, Any] = {}
        for place in self.places:
            if not place.is_peft:
                continue
            settings = place.get_settings(component)
            for key in OFT_SETTINGS:
                if key not in settings:
                    continue
                known = found.setdefault(key, settings[key])
                if known != settings[key]:
                    first, second = str(known)[:MAX_TEXT_CHARS], str(settings[key])[:MAX_TEXT_CHARS]
                    raise LoraError(
                        f"is an OFT with {key} {first} in one place and {second} in {place.name}; which one "
                        "is meant cannot be told: ask its author"
                    )
        return found

    @property
    def has_settings(self) -> bool:
        """Whether any place says anything."""
        return any(any(place.by_component.values()) for place in self.places)

    @property
    def has_adapter_config(self) -> bool:
        """Whether PEFT's file is beside the LoRA."""
        return any(place.name == ADAPTER_CONFIG for place in self.places)


def read_settings(path: Path, metadata: Mapping[str, str]) -> WrittenSettings:
    """Read every place.

    Args:
        path: of the LoRA.
        metadata: of its header.

    Raises:
        LoraError: when `adapter_config.json` is there and is not one.
    """
    places: list[Place] = []
    warnings: list[str] = []
    config, warning = read_adapter_config(path)
    if config is not None:
        places.append(Place(ADAPTER_CONFIG, {None: config}, is_peft=True))
    if warning is not None:
        warnings.append(warning)

    for key in JSON_KEYS:
        if key not in metadata:
            continue
        settings = parse_json(metadata[key])
        if isinstance(settings, dict):
            places.append(Place(f"{key} in its header", split_by_component(settings), is_peft=True))
        else:
            warnings.append(f"{key} in its header is not a JSON object and is ignored; it may hold alpha")

    plain, plain_warnings = read_plain_keys(metadata)
    if plain:
        places.append(Place("its header", plain, is_peft=False))
    return WrittenSettings(tuple(places), (*warnings, *plain_warnings))


# -- beside the file -----------------------------------------------------------------------------------------


def read_adapter_config(path: Path) -> tuple[Settings | None, str | None]:
    """PEFT's configuration beside a LoRA, and a warning where it may be that of another file.

    Raises:
        LoraError: when it cannot be read.
    """
    config_path = path.with_name(ADAPTER_CONFIG)
    if not config_path.is_file():
        return None, None
    settings = parse_json(read_optional_text(config_path))
    is_its_own = path.name == PEFT_FILE
    others = [] if is_its_own else list_other_loras(path, settings)
    if others:
        count = count_noun(len(others), "other LoRA")
        return None, (
            f"{ADAPTER_CONFIG} beside it is ignored, as the folder has {count}; "
            "give each LoRA of PEFT a folder with its own"
        )
    if not isinstance(settings, dict):
        raise LoraError(
            f"{config_path} is not a JSON object of at most {MAX_SIDECAR_BYTES // 10**6} MB; it says how "
            f"{path.name} is scaled: download both again"
        )
    return settings, None


def list_other_loras(path: Path, settings: object) -> list[Path]:
    """The LoRAs beside one, but for its initial factors where settings say that it has some.

    Args:
        path: of the LoRA.
        settings: as they stand beside it, untrusted.
    """
    others = [file for file in path.parent.glob("*.safetensors") if file.name != path.name]
    initialization = str(get_nested(settings, [INITIALIZATION_KEY])).lower()
    if not initialization.startswith(tuple(RELATIVE_INITIALIZATIONS)):
        return others
    return [file for file in others if INITIAL_WORD not in file.stem.lower()]


# -- in the header -------------------------------------------------------------------------------------------


def split_by_component(settings: Mapping[str, Any]) -> dict[str | None, dict[str, Any]]:
    """Settings by component: named `transformer.lora_alpha`, or a mapping under `transformer`.

    A mapping under one other name is that of an adapter (`default`), as PEFT's `peft_config` is.
    """
    if len(settings) == 1:
        ((name, inner),) = settings.items()
        if isinstance(inner, dict) and name not in COMPONENT_PREFIXES:
            settings = inner

    by_component: dict[str | None, dict[str, Any]] = {}
    for key, value in settings.items():
        prefix, _, setting = key.partition(".")
        component = COMPONENT_PREFIXES.get(prefix)
        if component is not None and setting:
            by_component.setdefault(component, {})[setting] = value
        elif component is not None and isinstance(value, dict):
            by_component.setdefault(component, {}).update(value)
        else:
            by_component.setdefault(None, {})[key] = value
    return by_component


def read_plain_keys(metadata: Mapping[str, str]) -> tuple[dict[str | None, dict[str, Any]], list[str]]:
    """The numbers that stand in the header itself, by component, and what looks like one and is not read."""
    by_component: dict[str | None, dict[str, Any]] = {}
    warnings: list[str] = []
    for key, text in metadata.items():
        if key in JSON_KEYS:
            continue
        if key in RECORDED_ARGUMENTS:
            warnings += list_unread_initializations(key, text)
        if key.startswith(RECORD_PREFIXES):
            continue
        component, setting = split_plain_key(key.lower())
        value = parse_plain_value(setting, text)
        if value is not None:
            by_component.setdefault(component, {})[setting] = value
        elif is_unread_scale(key, text):
            shown = f"{sanitize_text(key, MAX_TEXT_CHARS)} in its header is {text[:MAX_TEXT_CHARS]!r}"
            warnings.append(f"{shown}, which is not understood and is ignored")
        if setting not in (INITIALIZATION_KEY, RSLORA_KEY):
            warnings += list_unread_initializations(key, text)

    # a rank alone scales nothing
    deciding = {*ALPHA_KEYS, INITIALIZATION_KEY}
    used = {name: settings for name, settings in by_component.items() if deciding & settings.keys()}
    return used, warnings


def parse_plain_value(setting: str, text: str) -> str | bool | float | None:
    """The value of a setting that is read from a header; None: it is not read, or not understood."""
    if setting == INITIALIZATION_KEY:
        return text.strip()
    if setting == RSLORA_KEY:
        return text.strip().lower() in ("true", "1")
    if setting in (*ALPHA_KEYS, *RANK_KEYS):
        return parse_number(text)
    return None


def split_plain_key(key: str) -> tuple[str | None, str]:
    """`transformer.lora_alpha` -> denoiser, lora_alpha."""
    prefix, _, setting = key.rpartition(".")
    if prefix in COMPONENT_PREFIXES:
        return COMPONENT_PREFIXES[prefix], setting
    for name, component in COMPONENT_PREFIXES.items():
        if not key.startswith(f"{name}_"):
            continue
        setting = key.removeprefix(f"{name}_")
        if setting in (*ALPHA_KEYS, *RANK_KEYS, RSLORA_KEY, INITIALIZATION_KEY):
            return component, setting
    return None, key


def is_unread_scale(key: str, text: str) -> bool:
    """Whether a key of a header looks like a scale that is not read."""
    words = key.lower().replace(".", "_").replace("-", "_").split("_")
    last = key.lower().rpartition(".")[2]
    is_scale = "alpha" in words or "alphas" in words or last in SCALE_WORDS
    return is_scale and text.strip().lower() not in ("", "none", "null")


def list_unread_initializations(key: str, text: str) -> list[str]:
    """A line where a text of a header, which is not read, names an initialization that changes the base."""
    # `pissa_niter_16` is PiSSA, too
    names = "|".join(RELATIVE_INITIALIZATIONS)
    found = re.search(rf"(?<![a-z_])({names})(?![a-z])", text.lower())
    if found is None:
        return []
    return [
        f"{sanitize_text(key, MAX_TEXT_CHARS)} in its header names {found[0]}; if the LoRA was initialized "
        "so and not converted, it is no change of this model"
    ]


def parse_number(text: str) -> float | None:
    """A finite number written as text, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def list_unread_alphas(metadata: Mapping[str, str]) -> list[str]:
    """Lines about an alpha that stands in a header where it does not scale the tensors, or is not read.

    For files without any alpha that is read.
    """
    lines = []
    alpha = parse_number(metadata.get(TRAINING_ALPHA_KEY, ""))
    rank = metadata.get(TRAINING_RANK_KEY, "")
    if alpha is not None and alpha != parse_number(rank):
        shown_rank = sanitize_text(rank, MAX_TEXT_CHARS) or "unknown"
        lines.append(
            f"its header says that it was trained with alpha {alpha:g} ({TRAINING_ALPHA_KEY}) and rank "
            f"{shown_rank}, and no tensor says so: alpha / rank is taken as 1, as converters multiply it "
            "into the tensors; if it was lost instead, multiply the strength by alpha / rank"
        )
    for key, text in metadata.items():
        if key in JSON_KEYS:
            continue
        if any(word in text for word in QUOTED_ALPHA_WORDS):
            lines.append(
                f"{sanitize_text(key, MAX_TEXT_CHARS)} in its header has an alpha, which is not understood "
                "and is ignored"
            )
    return lines


def describe_rank_and_alpha(places: Iterable[Place]) -> dict[str, Any]:
    """`rank` and `alpha` as the first place with one of them says, for people."""
    shown: dict[str, Any] = {}
    for place in places:
        for settings in place.by_component.values():
            for name, spellings in (("rank", RANK_KEYS), ("alpha", ALPHA_KEYS)):
                value = get_first(settings, spellings)
                if value is not None:
                    shown.setdefault(name, value)
    return shown


def get_first(settings: Settings, spellings: Iterable[str]) -> Any:
    """The value of a setting under the first of its spellings that has one; None: none has."""
    for key in spellings:
        if settings.get(key) is not None:
            return settings[key]
    return None
