"""The settings of a run that an image does not say otherwise, and the words of a command that set them again.

`image_writer` writes them into each image, `inspect_image` makes the words. Which settings there are is read
from `RunSpec`, `conf/config.yaml` and the classes behind the groups, so that a new setting is in every image
unless it is named here as one that changes no pixel, or that an image says in another way.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from int8run.cache_steps.base import NONE, StepCache, list_cache_settings
from int8run.config.effects import METADATA_KEY, Effects
from int8run.config.prompt_argument import quote_text
from int8run.config.run_spec import RunSpec
from int8run.lora.config import LoraSettings
from int8run.models.family import MODEL_FOLDER, AutoFamily, ModelSource, load_families
from int8run.outlier.auto import AutoOutlier
from int8run.tasks.file_description import format_setting
from int8run.tasks.model_facts import list_plain_settings, name_model
from int8run.text_encoders.base import TextEncoders
from int8run.utils.text import quote_for_shell

CONF = MODEL_FOLDER.parent
# of RunSpec: what changes no pixel of an image
WITHOUT_PIXELS = frozenset(
    {
        "task",
        "metrics",
        "tracker",
        "cache",
        "progress",
        "resume",
        "recipe",
        "sync",
        "save",
        "lora_dir",
        "offload",
    }
)
# of RunSpec: what an image says by facts of its own
SAID_BY_FACTS = frozenset({"int8", "outlier", "rounding", "backend", "sampler", "prompts", "seed"})
# of a model: what an image says by facts of its own, and what only names it
MODEL_SAID_BY_FACTS = frozenset({"location", "sampling", "pipeline", "mode", "lora_base", "family"})
# of a LoRA stack: names and strengths are facts; the others change nothing in an image that was generated
LORA_SAID_BY_FACTS = frozenset({"adapters", "strength", "strict", "insert_triggers"})
ENCODERS_SAID_BY_FACTS = frozenset({"format"})
FAMILY_SETTINGS = ("mixed_precision", "keep_blocks", "families")
NO_SETTINGS = frozenset({"inputs"})  # of the calibration: what the samples bring
FILE = "file"  # key of a value that stands for a path of the machine, of which an image has the name alone


def list_other_settings(spec: RunSpec, *, is_int8: bool) -> dict[str, Any]:
    """What of a run an image does not say otherwise, by the keys of the command line.

    Args:
        spec: the settings.
        is_int8: whether the image is the INT8 model's; the float model's depends on less.

    Returns:
        The model's own settings all, because each option has its own defaults; of everything else what
        differs from its default.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        effects: Effects = field.metadata[METADATA_KEY]
        is_said = field.name in WITHOUT_PIXELS | SAID_BY_FACTS
        if is_said or not (is_int8 or effects.float_baseline):
            continue
        found |= list_settings_of(field.name, spec, is_int8=is_int8)
    return {key: hide_path(value) for key, value in found.items()}


def list_settings_of(name: str, spec: RunSpec, *, is_int8: bool) -> dict[str, Any]:
    """What one field of RunSpec adds; see `list_other_settings`."""
    value = getattr(spec, name)
    if name == "model":
        return flatten("model", value, left_out=MODEL_SAID_BY_FACTS)
    if name == "model_type":
        return describe_family(value)
    if name == "calibration" and not spec.uses_calibration_prompts:
        return {}
    if name == "cache_steps":
        return describe_step_cache(value) if is_int8 else {}
    if name == "lora" and not (is_int8 and spec.lora.adapters):
        return {}
    defaults: Mapping[str, object]
    if name == "lora":
        defaults = flatten("lora", LoraSettings())
        changed = flatten("lora", value, left_out=LORA_SAID_BY_FACTS)
    elif name == "clip":
        defaults = flatten("clip", TextEncoders())
        changed = flatten("clip", value, left_out=ENCODERS_SAID_BY_FACTS)
    else:
        defaults = read_own_defaults()
        changed = flatten(name, value, left_out=NO_SETTINGS)
    return {key: item for key, item in changed.items() if key not in defaults or item != defaults[key]}


def describe_step_cache(cache: StepCache) -> dict[str, Any]:
    """The step cache and its settings; nothing where there is none."""
    if cache.name == NONE:
        return {}
    return {"cache_steps": cache.name} | {
        f"cache_steps.{name}": list(setting) if isinstance(setting, tuple) else setting
        for name, setting in list_cache_settings(cache).items()
    }


def describe_family(family: Any) -> dict[str, Any]:
    """The family of a model, where it is not the one that `model_type=auto` finds among those that ship."""
    found: dict[str, Any] = {}
    if family.mixed_precision != "none":
        found["model_type.mixed_precision"] = family.mixed_precision
    if family.keep_blocks is not None:
        found["model_type.keep_blocks"] = family.keep_blocks
    if isinstance(family, AutoFamily):
        if family.families is not None:
            found["model_type.families"] = {FILE: "families of a user"}
        return found
    found["model_type"] = family.name
    shipped = load_families().get(family.name)
    plain = dataclasses.replace(family, mixed_precision="none", keep_blocks=None)
    if shipped is None or dataclasses.replace(shipped, mixed_precision="none", keep_blocks=None) != plain:
        found["model_type"] = {FILE: family.name}
    return found


def flatten(prefix: str, value: Any, left_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of a settings class by dotted keys, sequences as lists; any other value by its own key.

    Args:
        prefix: of the keys.
        value: of a setting.
        left_out: fields that are not listed.
    """
    if not dataclasses.is_dataclass(value):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        if field.name not in left_out:
            flat |= flatten(f"{prefix}.{field.name}", getattr(value, field.name))
    return flat


def hide_path(value: Any) -> Any:
    """A value for a file that others see: of a path of this machine its name, marked as such."""
    is_path = isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).exists())
    return {FILE: name_model(value)} if is_path else value


@functools.cache
def read_own_defaults() -> Mapping[str, Any]:
    """The settings without a group, with their defaults, by dotted keys."""
    settings = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    names = {field.name for field in dataclasses.fields(RunSpec)}
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in names:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in value.items() if key != "_target_"}
        else:
            flat[name] = value
    return flat


# -- the candidates of outlier=auto --------------------------------------------------------------------------


def list_candidates(spec: RunSpec) -> dict[str, dict[str, Any]] | None:
    """The candidates of `outlier=auto` with their settings, by name; None of another method."""
    if not isinstance(spec.outlier, AutoOutlier):
        return None
    candidates = {}
    for name, method in spec.outlier.candidates.items():
        candidates[name] = {"method": method.name, **list_plain_settings(method)}
    return candidates


@functools.cache
def read_default_candidates() -> Mapping[str, Mapping[str, Any]]:
    """The same of `conf/outlier/auto.yaml`."""
    folder = CONF / "outlier"
    option = yaml.safe_load((folder / "auto.yaml").read_text(encoding="utf-8"))
    candidates = {}
    for entry in option["defaults"]:
        method, _, place = entry.partition("@candidates.")
        if place:
            settings = yaml.safe_load((folder / f"{method}.yaml").read_text(encoding="utf-8"))
            changed = settings | option["candidates"].get(place, {})
            candidates[place] = {"method": method} | {k: v for k, v in changed.items() if k != "_target_"}
    return candidates


# -- words of a command --------------------------------------------------------------------------------------


class UnrepeatableSettingError(Exception):
    """A setting that no word of a command sets again; the message says what is missing."""


def list_other_words(settings: object, model_option: Mapping[str, Any]) -> list[str]:
    """The words that set what `list_other_settings` found.

    Args:
        settings: of the text chunk; somebody else may have written it.
        model_option: the YAML of the option of `model=`, whose settings need no word.

    Raises:
        UnrepeatableSettingError: for a file whose folder is not known, what this version does not have, and
            what is no value of a setting.
    """
    if not isinstance(settings, Mapping):
        raise UnrepeatableSettingError("needs settings, of which the image has no names and values")
    known = list_known_keys()
    words = []
    for key, value in settings.items():
        if key not in known:
            raise UnrepeatableSettingError(f"needs {key!r}, which is no setting of this version")
        section, _, name = key.partition(".")
        if section == "model" and value == model_option.get(name, get_model_default(name)):
            continue
        words.append(format_value(key, value))
    return words


def list_known_keys() -> frozenset[str]:
    """Every key that `list_other_settings` may have."""
    keys = {*read_own_defaults(), "model_type", *(f"model_type.{name}" for name in FAMILY_SETTINGS)}
    for prefix, settings in (("model", ModelSource), ("lora", LoraSettings), ("clip", TextEncoders)):
        keys |= {f"{prefix}.{field.name}" for field in dataclasses.fields(settings)}
    for option in sorted((CONF / "cache_steps").glob("*.yaml")):
        names = yaml.safe_load(option.read_text(encoding="utf-8")).keys() - {"_target_"}
        keys |= {"cache_steps", *(f"cache_steps.{name}" for name in names)}
    return frozenset(keys)


def get_model_default(name: str) -> Any:
    """What an option of `model=` has for a setting that it does not name."""
    for field in dataclasses.fields(ModelSource):
        if field.name != name:
            continue
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        return list(field.default) if isinstance(field.default, tuple) else field.default
    return None


def format_value(key: str, value: object) -> str:
    """The word that sets a setting.

    Raises:
        UnrepeatableSettingError: for a file whose folder is not known, and what is no value of a setting.
    """
    if isinstance(value, Mapping) and FILE in value:
        raise UnrepeatableSettingError(f"needs {key} ({value[FILE]}), whose folder the image does not name")
    if value is None:
        return f"{key}=null"
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, str | int | float):
        return format_setting(key, value)
    if isinstance(value, list) and is_plain_list(value):
        return quote_for_shell(f"{key}={format_items(value)}")
    raise UnrepeatableSettingError(f"needs {key}, which is no number or text")


def is_plain_list(values: Sequence[object]) -> bool:
    """Whether a list holds texts, numbers and lists of such, as a schedule does."""
    for item in values:
        is_inner_list = isinstance(item, list) and all(isinstance(inner, str | int | float) for inner in item)
        if not is_inner_list and not isinstance(item, str | int | float):
            return False
    return True


def format_items(values: Sequence[Any]) -> str:
    """A list as the command line takes it: `[a,1]`, `[[0,float],[0.1,int8]]`."""
    items = []
    for item in values:
        if isinstance(item, list):
            items.append(format_items(item))
        else:
            items.append(quote_text(item) if isinstance(item, str) else str(item))
    return f"[{','.join(items)}]"


def list_candidate_words(candidates: object) -> Iterator[str]:
    """The words that give `outlier=auto` its candidates; none where they are the defaults.

    Raises:
        UnrepeatableSettingError: for a candidate that the option does not have.
    """
    defaults = read_default_candidates()
    if not isinstance(candidates, Mapping):
        raise UnrepeatableSettingError("needs the candidates of outlier=auto, which the image does not name")
    for name, settings in candidates.items():
        default = defaults.get(name)
        is_known = default is not None and isinstance(settings, Mapping)
        if default is None or not is_known or settings.get("method") != default["method"]:
            raise UnrepeatableSettingError(
                f"needs the candidate {name!r} of outlier=auto, which it does not have"
            )
        for key, value in settings.items():
            if key not in default:
                raise UnrepeatableSettingError(f"needs {key!r} of the candidate {name} of outlier=auto")
            if value != default[key]:
                yield format_value(f"outlier.candidates.{name}.{key}", value)
    for name in defaults:
        if name not in candidates:
            yield f"~outlier.candidates.{name}"
